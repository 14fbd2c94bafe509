"""Non-linearities, element by element."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn.kernels import activations
from asynctrain.nn.layers.base import Layer, register_layer
from asynctrain.nn.scope import Scope
from asynctrain.types import Params


@register_layer("relu")
@dataclass(frozen=True)
class ReLU(Layer):
    """y = max(x, 0), element by element, of any shape; dx = dy [x > 0]."""

    def output_shape(self, input_shape: Shape) -> Shape:
        """Unchanged."""
        return input_shape

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array]:
        """y = max(x, 0)."""
        y = activations.relu(x, out=scope.empty("y", x.shape, x.dtype))
        return y, y

    def backward_input(self, params: Params, saved: Array, dy: Array, scope: Scope) -> Array:
        """dx = dy [y > 0]."""
        return activations.relu_backward(
            saved,
            dy,
            out=scope.empty("dx", dy.shape, dy.dtype),
            positive=scope.empty("positive", dy.shape, np.dtype(np.bool_)),
        )
