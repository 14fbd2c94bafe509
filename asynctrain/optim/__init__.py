"""Optimizers as pure functions, and schedules of their learning rates."""

from __future__ import annotations

# Applying one
from asynctrain.optim.apply import bound, initial_state, measured, update_into

# Optimizers made of optimizers
from asynctrain.optim.composition import accumulate, average_weights, delayed, freeze, frozen, groups

# Optimizers
from asynctrain.optim.optimizers import adagrad, adam, adamw, nadam, rmsprop, sgd

# Learning rates
from asynctrain.optim.schedules import (
    Schedule,
    constant,
    cosine,
    cosine_restarts,
    exponential,
    linear,
    one_cycle,
    stepwise,
)

# The parts to compose others of
from asynctrain.optim.transforms import (
    Optimizer,
    Reduction,
    State,
    Transform,
    add_decayed_weights,
    apply_updates,
    chain,
    clip_by_global_norm,
    clip_by_value,
    from_json,
    scale_by_adagrad,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_rms,
    trace,
)

__all__ = [
    "Optimizer",
    "Reduction",
    "Schedule",
    "State",
    "Transform",
    "accumulate",
    "adagrad",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "average_weights",
    "bound",
    "chain",
    "clip_by_global_norm",
    "clip_by_value",
    "constant",
    "cosine",
    "cosine_restarts",
    "delayed",
    "exponential",
    "freeze",
    "from_json",
    "frozen",
    "groups",
    "initial_state",
    "linear",
    "measured",
    "nadam",
    "one_cycle",
    "rmsprop",
    "scale_by_adagrad",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_rms",
    "sgd",
    "stepwise",
    "trace",
    "update_into",
]
