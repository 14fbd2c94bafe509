"""Pooling of images."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn.kernels import pool
from asynctrain.nn.layers.base import Layer, check_integer, register_layer, times
from asynctrain.nn.scope import Scope
from asynctrain.types import Params


class _Pooled(NamedTuple):
    """What max pooling saves."""

    x: Array
    y: Array


@register_layer("max_pool2d")
@dataclass(frozen=True)
class MaxPool2D(Layer):
    """y[h, w, c] = max_ij x[h s + i, w s + j, c]; dy goes back to the maximum, of equals to the first in row order.

    Args:
        size: of the window in pixels, i and j below it.
        stride: s in pixels; by default the size. Rows and columns that fill no window are left out.
    """

    size: int = 2
    _: KW_ONLY
    stride: int | None = None

    def __post_init__(self) -> None:
        check_integer(self, "size", self.size)
        if self.stride is not None:
            check_integer(self, "stride", self.stride)

    @property
    def _step(self) -> int:
        return self.size if self.stride is None else self.stride

    def output_shape(self, input_shape: Shape) -> Shape:
        """(H, W, C) -> ((H - size) // s + 1, (W - size) // s + 1, C)."""
        if len(input_shape) != 3:
            raise ValueError(f"max_pool2d needs an input of shape (height, width, channels), got {input_shape}")
        height, width, channels = input_shape
        if height < self.size or width < self.size:
            raise ValueError(
                f"max_pool2d with size {self.size} needs an input of at least that size, got {times((height, width))}"
            )
        return (height - self.size) // self._step + 1, (width - self.size) // self._step + 1, channels

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Pooled]:
        """The formula above."""
        y = scope.empty("y", (len(x), *self.output_shape(x.shape[1:])), x.dtype)
        return pool.max_pool(x, self.size, self._step, out=y), _Pooled(x, y)

    def backward_input(self, params: Params, saved: _Pooled, dy: Array, scope: Scope) -> Array:
        """Each dy[h, w, c] goes to where its maximum was; where windows overlap, they add up."""
        return pool.max_pool_backward(
            saved.x,
            saved.y,
            dy,
            self.size,
            self._step,
            out=scope.empty("dx", saved.x.shape, dy.dtype),
            free=scope.empty("free", dy.shape, np.dtype(np.bool_)),
            hit=scope.empty("hit", dy.shape, np.dtype(np.bool_)),
        )
