"""The training run."""

from asynctrain.train.controllers import Controller, Decision, EarlyStopping, KeepBest, ReduceOnPlateau
from asynctrain.train.history import History
from asynctrain.train.progress import Progress
from asynctrain.train.run import Run
from asynctrain.train.saving import Saving
from asynctrain.train.state import TrainState
from asynctrain.train.trainer import Trainer

__all__ = [
    "Controller",
    "Decision",
    "EarlyStopping",
    "History",
    "KeepBest",
    "Progress",
    "ReduceOnPlateau",
    "Run",
    "Saving",
    "TrainState",
    "Trainer",
]
