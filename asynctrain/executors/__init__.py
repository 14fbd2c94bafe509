"""Homes for gradient workers."""

from asynctrain.executors.base import Executor, Session
from asynctrain.executors.fingerprint import numeric_fingerprint
from asynctrain.executors.group import ExecutorGroup
from asynctrain.executors.local import InlineExecutor, ThreadExecutor
from asynctrain.executors.pool import PoolExecutor
from asynctrain.executors.process import ProcessExecutor

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
