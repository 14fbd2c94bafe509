"""Homes for gradient workers."""

from asynctrain.executors.base import Executor, Session
from asynctrain.executors.fingerprint import numeric_fingerprint
from asynctrain.executors.local import InlineExecutor, ThreadExecutor

__all__ = ["Executor", "InlineExecutor", "Session", "ThreadExecutor", "numeric_fingerprint"]
