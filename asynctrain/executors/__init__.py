"""Homes for gradient workers.

Those outside of this process are imported when they are first asked for; ``DaskExecutor`` needs the extra ``dask``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from asynctrain.executors.base import Executor, Session
from asynctrain.executors.fingerprint import numeric_fingerprint
from asynctrain.executors.local import InlineExecutor, ThreadExecutor

if TYPE_CHECKING:
    from asynctrain.executors.dask import DaskExecutor as DaskExecutor
    from asynctrain.executors.group import ExecutorGroup
    from asynctrain.executors.pool import PoolExecutor
    from asynctrain.executors.process import ProcessExecutor

LATE = {"DaskExecutor": "dask", "ExecutorGroup": "group", "PoolExecutor": "pool", "ProcessExecutor": "process"}


def __getattr__(name: str) -> Any:
    if name not in LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"asynctrain.executors.{LATE[name]}"), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('DaskExecutor needs Dask: pip install "asynctrain[dask]"', name=error.name) from error


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
