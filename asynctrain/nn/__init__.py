"""Neural networks as pure functions on numpy arrays: no event loop, no files, no clocks, no global random state."""

from __future__ import annotations

# What is found by name
from asynctrain.nn import initializers, losses, models

# Logits as probabilities
from asynctrain.nn.kernels.activations import softmax

# Layers, and what layers of your own are made of
from asynctrain.nn.layers import (
    ELU,
    GELU,
    AvgPool2D,
    BatchNorm,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalAveragePool,
    GlobalMaxPool,
    GroupNorm,
    Layer,
    LayerNorm,
    LeakyReLU,
    LogSoftmax,
    MaxPool2D,
    Parallel,
    Parameter,
    ReLU,
    Reshape,
    Residual,
    Sequential,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
    layer_from_json,
    register_layer,
)
from asynctrain.nn.losses import Loss

# Models: layers bound to the shape of their input
from asynctrain.nn.model import Model

# What a pass over a model may use
from asynctrain.nn.scope import Scope, Workspace

__all__ = [
    "ELU",
    "GELU",
    "AvgPool2D",
    "BatchNorm",
    "Conv2D",
    "Dense",
    "Dropout",
    "Flatten",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "GroupNorm",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "LogSoftmax",
    "Loss",
    "MaxPool2D",
    "Model",
    "Parallel",
    "Parameter",
    "ReLU",
    "Reshape",
    "Residual",
    "Scope",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "Workspace",
    "initializers",
    "layer_from_json",
    "losses",
    "models",
    "register_layer",
    "softmax",
]
