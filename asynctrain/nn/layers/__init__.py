"""Layers: pure functions on arrays, described by frozen dataclasses whose fields are their JSON.

A layer holds neither parameters nor state. Images are (N, H, W, C), vectors (N, features); the shapes that layers talk
about leave out N. Forward and derivative stand side by side; the derivative comes in two parts, as the second can run
beside the chain of input gradients:

    backward_input   dx from dy: the chain, one layer after the other
    backward_params  weight gradients from dy: free once the chain has passed

So that parts may overlap, a layer only reads what it is handed (x, saved, dy), writes only buffers of its own, and
keeps those of its two backward parts apart.
"""

from __future__ import annotations

from asynctrain.nn.layers.activation import ELU, GELU, LeakyReLU, LogSoftmax, ReLU, Sigmoid, SiLU, Softmax, Tanh
from asynctrain.nn.layers.base import Layer, Parameter, Placed, layer_from_json, register_layer
from asynctrain.nn.layers.containers import Parallel, Residual, Sequential
from asynctrain.nn.layers.convolution import Conv2D
from asynctrain.nn.layers.dense import Dense
from asynctrain.nn.layers.dropout import Dropout
from asynctrain.nn.layers.normalization import BatchNorm, GroupNorm, LayerNorm
from asynctrain.nn.layers.pooling import AvgPool2D, GlobalAveragePool, GlobalMaxPool, MaxPool2D
from asynctrain.nn.layers.shape import Flatten, Reshape

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
    "MaxPool2D",
    "Parallel",
    "Parameter",
    "Placed",
    "ReLU",
    "Reshape",
    "Residual",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Tanh",
    "layer_from_json",
    "register_layer",
]
