"""Homes for gradient workers.

``DaskExecutor`` is imported when it is first asked for: it needs the extra ``dask``.
"""

from typing import TYPE_CHECKING, Any

from asynctrain.executors.base import Executor, Session
from asynctrain.executors.fingerprint import numeric_fingerprint
from asynctrain.executors.group import ExecutorGroup
from asynctrain.executors.local import InlineExecutor, ThreadExecutor
from asynctrain.executors.pool import PoolExecutor
from asynctrain.executors.process import ProcessExecutor

if TYPE_CHECKING:
    from asynctrain.executors.dask import DaskExecutor as DaskExecutor


def __getattr__(name: str) -> Any:
    if name != "DaskExecutor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from asynctrain.executors.dask import DaskExecutor
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('DaskExecutor needs Dask: pip install "asynctrain[dask]"', name=error.name) from error
    return DaskExecutor


__all__ = [
    "Executor",
    "ExecutorGroup",
    "InlineExecutor",
    "PoolExecutor",
    "ProcessExecutor",
    "Session",
    "ThreadExecutor",
    "numeric_fingerprint",
]
