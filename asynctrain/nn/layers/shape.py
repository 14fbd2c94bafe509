"""Layers that only look at their input in another shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn.layers.base import Layer, register_layer
from asynctrain.nn.scope import Scope
from asynctrain.types import Params


@register_layer("flatten")
@dataclass(frozen=True)
class Flatten(Layer):
    """(N, H, W, C) -> (N, H W C), or whatever the axes after the first are; nothing is copied."""

    def output_shape(self, input_shape: Shape) -> Shape:
        """(H, W, C) -> (H W C,)."""
        return (int(np.prod(input_shape)),)

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Shape]:
        """A view of x."""
        return x.reshape(len(x), -1), x.shape

    def backward_input(self, params: Params, saved: Shape, dy: Array, scope: Scope) -> Array:
        """A view of dy."""
        return dy.reshape(saved)
