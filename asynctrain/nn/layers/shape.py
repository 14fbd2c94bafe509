"""Layers that only look at their input in another shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from asynctrain.arena import Array, Shape
from asynctrain.nn.layers.base import Layer, check_integer, register_layer, times
from asynctrain.nn.scope import Scope
from asynctrain.types import Params


@register_layer("flatten")
@dataclass(frozen=True)
class Flatten(Layer):
    """(N, H, W, C) -> (N, H W C), or whatever the axes after the first are; nothing is copied."""

    def output_shape(self, input_shape: Shape) -> Shape:
        """(H, W, C) -> (H W C,)."""
        return (prod(input_shape),)

    def flops(self, input_shape: Shape) -> int:
        """None: y is a view."""
        return 0

    def activations(self, input_shape: Shape) -> int:
        """None: y is a view."""
        return 0

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Shape]:
        """A view of x."""
        return x.reshape(len(x), -1), x.shape

    def backward_input(self, params: Params, saved: Shape, dy: Array, scope: Scope) -> Array:
        """A view of dy."""
        return dy.reshape(saved)


@register_layer("reshape")
@dataclass(frozen=True)
class Reshape(Layer):
    """Each sample in another shape, its elements in the same order; nothing is copied.

    Args:
        shape: of a sample, without the batch axis; as many elements as x has.
    """

    shape: Sequence[int]

    def __post_init__(self) -> None:
        if not isinstance(self.shape, Sequence):
            raise TypeError(f"reshape: shape must be a sequence of integers, got {self.shape!r}")
        object.__setattr__(self, "shape", tuple(self.shape))
        for length in self.shape:
            check_integer(self, "shape", length)

    def output_shape(self, input_shape: Shape) -> Shape:
        """The shape that was asked for."""
        if prod(self.shape) != prod(input_shape):
            raise ValueError(
                f"reshape: shape must have the {prod(input_shape)} elements of the input {times(input_shape)}, got "
                f"{times(self.shape)}"
            )
        return tuple(self.shape)

    def flops(self, input_shape: Shape) -> int:
        """None: y is a view."""
        return 0

    def activations(self, input_shape: Shape) -> int:
        """None: y is a view."""
        return 0

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Shape]:
        """A view of x."""
        return x.reshape(len(x), *self.shape), x.shape

    def backward_input(self, params: Params, saved: Shape, dy: Array, scope: Scope) -> Array:
        """A view of dy."""
        return dy.reshape(saved)
