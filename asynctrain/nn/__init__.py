"""Neural networks as pure functions on numpy arrays: no event loop, no files, no clocks, no global random state."""

from __future__ import annotations

# What is found by name
from asynctrain.nn import initializers, losses, models

# Logits as probabilities
from asynctrain.nn.kernels.activations import softmax

# Layers, and what layers of your own are made of
from asynctrain.nn.layers import (
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    Layer,
    MaxPool2D,
    Parameter,
    ReLU,
    Sequential,
    layer_from_json,
    register_layer,
)
from asynctrain.nn.losses import Loss

# Models: layers bound to the shape of their input
from asynctrain.nn.model import Model

# What a pass over a model may use
from asynctrain.nn.scope import Scope, Workspace

__all__ = [
    "Conv2D",
    "Dense",
    "Dropout",
    "Flatten",
    "Layer",
    "Loss",
    "MaxPool2D",
    "Model",
    "Parameter",
    "ReLU",
    "Scope",
    "Sequential",
    "Workspace",
    "initializers",
    "layer_from_json",
    "losses",
    "models",
    "register_layer",
    "softmax",
]
