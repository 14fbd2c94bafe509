"""A home on Dask: the caller's own cluster, or one that is started on this machine."""

from asynctrain.executors.dask.executor import DaskExecutor

__all__ = ["DaskExecutor"]
