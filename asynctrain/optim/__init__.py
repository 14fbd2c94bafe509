"""Optimizers as pure functions, and schedules of their learning rates."""

from __future__ import annotations

# Applying one
from asynctrain.optim.apply import initial_state, update_into

# Learning rates
from asynctrain.optim.schedules import Schedule, constant, cosine

# Optimizers, and the parts to compose others of
from asynctrain.optim.transforms import (
    Optimizer,
    State,
    Transform,
    adam,
    adamw,
    add_decayed_weights,
    apply_updates,
    chain,
    from_json,
    scale_by_adam,
    scale_by_learning_rate,
    sgd,
    trace,
)

__all__ = [
    "Optimizer",
    "Schedule",
    "State",
    "Transform",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "chain",
    "constant",
    "cosine",
    "from_json",
    "initial_state",
    "scale_by_adam",
    "scale_by_learning_rate",
    "sgd",
    "trace",
    "update_into",
]
