"""asynctrain trains image models inside asyncio programs.

A training run is awaited, cancelled and followed like any other coroutine, and ends with the same bits wherever its
gradients were computed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from asynctrain import data, errors, executors, nn, optim
from asynctrain._version import __version__

# Images: where they are, and how they become batches (more kinds of sources are in asynctrain.data)
from asynctrain.data import ArrayDataset, ImageFolder, Loader, Pipeline, StreamLoader, augment

# Homes: where gradients are computed
from asynctrain.executors import Executor, InlineExecutor, Session, ThreadExecutor, numeric_fingerprint

# Trained models in use
from asynctrain.inference import Classifier, EvaluationResult, Prediction

# Models: ready ones, and layers to build others of
from asynctrain.nn import Model, models

# Training: a run, what it tells as it goes, who listens, and what it leaves
from asynctrain.train import History, Progress, Run, Trainer, TrainState, events

# What decides about a run, and when it is saved
from asynctrain.train.controllers import Controller, Decision, EarlyStopping, KeepBest, ReduceOnPlateau
from asynctrain.train.saving import Saving

# What flows between them
from asynctrain.types import Batch, Cursor, Normalization, Program, Record

# Homes outside of this process, who listens, what is measured: imported when they are first asked for
if TYPE_CHECKING:
    from asynctrain import metrics
    from asynctrain.executors import DaskExecutor as DaskExecutor
    from asynctrain.executors import ExecutorGroup, PoolExecutor, ProcessExecutor
    from asynctrain.train import callbacks

_LATE = {"callbacks": "asynctrain.train.callbacks", "metrics": "asynctrain.metrics"}


def __getattr__(name: str) -> Any:
    if name in executors.LATE:
        return getattr(executors, name)
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(_LATE[name])


__all__ = [
    "ArrayDataset",
    "Batch",
    "Classifier",
    "Controller",
    "Cursor",
    "Decision",
    "EarlyStopping",
    "EvaluationResult",
    "Executor",
    "ExecutorGroup",
    "History",
    "ImageFolder",
    "InlineExecutor",
    "KeepBest",
    "Loader",
    "Model",
    "Normalization",
    "Pipeline",
    "PoolExecutor",
    "Prediction",
    "ProcessExecutor",
    "Program",
    "Progress",
    "Record",
    "ReduceOnPlateau",
    "Run",
    "Saving",
    "Session",
    "StreamLoader",
    "ThreadExecutor",
    "TrainState",
    "Trainer",
    "__version__",
    "augment",
    "callbacks",
    "data",
    "errors",
    "events",
    "metrics",
    "models",
    "nn",
    "numeric_fingerprint",
    "optim",
]
