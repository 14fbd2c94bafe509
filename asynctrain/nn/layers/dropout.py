"""Dropout."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn.layers.base import Layer, register_layer
from asynctrain.nn.scope import Scope
from asynctrain.types import Params


@register_layer("dropout")
@dataclass(frozen=True)
class Dropout(Layer):
    """In training y = x m / (1 - rate), m being 0 with probability ``rate``, else 1; otherwise y = x.

    Srivastava et al., JMLR 15 (2014), scaled in training so that nothing is to be done in prediction.

    Args:
        rate: from 0 up to, but not including, 1.
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"dropout: rate must be at least 0 and below 1, got {self.rate}")

    def output_shape(self, input_shape: Shape) -> Shape:
        """Unchanged."""
        return input_shape

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array | None]:
        """y = x m / (1 - rate) in training, else x itself."""
        if not scope.train or self.rate == 0:
            return x, None
        mask = self._mask(x, scope)
        return np.multiply(x, mask, out=scope.empty("y", x.shape, x.dtype)), mask

    def backward_input(self, params: Params, saved: Array | None, dy: Array, scope: Scope) -> Array:
        """dx = dy m / (1 - rate) in training, else dy itself."""
        if saved is None:
            return dy
        return np.multiply(dy, saved, out=scope.empty("dx", dy.shape, dy.dtype))

    def _mask(self, x: Array, scope: Scope) -> Array:
        drawn = scope.empty("drawn", x.shape, np.dtype(np.float32))  # the same mask, whatever x's dtype
        scope.rng().random(out=drawn, dtype=np.float32)
        kept = np.greater_equal(drawn, np.float32(self.rate), out=scope.empty("kept", x.shape, np.dtype(np.bool_)))
        mask = scope.empty("mask", x.shape, x.dtype)
        np.multiply(kept, x.dtype.type(1 / (1 - self.rate)), out=mask)
        return mask
