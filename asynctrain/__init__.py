"""asynctrain trains image models inside asyncio programs.

A training run is awaited, cancelled and followed like any other coroutine, and ends with the same bits wherever its
gradients were computed.
"""

from asynctrain import data, errors, nn, optim
from asynctrain._version import __version__

# Images: where they are, and how they become batches (more kinds of sources are in asynctrain.data)
from asynctrain.data import ArrayDataset, ImageFolder, Loader, Pipeline, StreamLoader, augment

# Homes: where gradients are computed
from asynctrain.executors import Executor, InlineExecutor, Session, ThreadExecutor, numeric_fingerprint

# Trained models in use
from asynctrain.inference import Classifier, Evaluation, Prediction

# Models: ready ones, and layers to build others of
from asynctrain.nn import Model, models

# Training: a run, what it tells as it goes, and what it leaves
from asynctrain.train import History, Run, Trainer, TrainState, events

# What flows between them
from asynctrain.types import Batch, Cursor, Normalization, Program, Record

__all__ = [
    "ArrayDataset",
    "Batch",
    "Classifier",
    "Cursor",
    "Evaluation",
    "Executor",
    "History",
    "ImageFolder",
    "InlineExecutor",
    "Loader",
    "Model",
    "Normalization",
    "Pipeline",
    "Prediction",
    "Program",
    "Record",
    "Run",
    "Session",
    "StreamLoader",
    "ThreadExecutor",
    "TrainState",
    "Trainer",
    "__version__",
    "augment",
    "data",
    "errors",
    "events",
    "models",
    "nn",
    "numeric_fingerprint",
    "optim",
]
