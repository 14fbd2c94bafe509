"""The training run."""

from asynctrain.train.history import History
from asynctrain.train.run import Run
from asynctrain.train.state import TrainState
from asynctrain.train.trainer import Trainer

__all__ = ["History", "Run", "TrainState", "Trainer"]
