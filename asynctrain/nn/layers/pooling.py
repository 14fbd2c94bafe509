"""Pooling of images."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from math import prod
from typing import Literal, NamedTuple

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn.kernels import pool
from asynctrain.nn.layers.base import Layer, Pair, check_integer, pair, register_layer, times
from asynctrain.nn.scope import Scope
from asynctrain.types import Params

Padding = Literal["same", "valid"] | int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]]


class _Pooled(NamedTuple):
    """What max pooling saves."""

    x: Array
    y: Array


@dataclass(frozen=True)
class _Pool2D(Layer):
    """Windows over an image; what is done with each is the subclass's."""

    size: int | tuple[int, int] = 2
    _: KW_ONLY
    stride: int | tuple[int, int] | None = None
    padding: Padding = "valid"
    dilation: int | tuple[int, int] = 1

    def __post_init__(self) -> None:
        for argument in ("size", "stride", "dilation"):
            if getattr(self, argument) is not None:
                for number in pair(self, argument):
                    check_integer(self, argument, number)
        for margin in self._fixed_margins():
            for number in margin:
                check_integer(self, "padding", number, least=0)

    def output_shape(self, input_shape: Shape) -> Shape:
        """(H, W, C) -> ((H + top + bottom - reach) // s + 1, ..., C), the reach (size - 1) d + 1; likewise wide."""
        if len(input_shape) != 3:
            raise ValueError(f"{self.kind} needs an input of shape (height, width, channels), got {input_shape}")
        window = self.window(input_shape)
        if not all(span.windows for span in window):
            padded = [span.before + span.length + span.after for span in window]
            raise ValueError(
                f"{self.kind} with {self._extent(window)} needs an input of at least that size, padding included, got "
                f"{times(padded)}"
            )
        if not all(span.places().all() for span in window):
            raise ValueError(
                f"{self.kind}: padding must leave a pixel of the image in each window, got {self.padding!r} for an "
                f"image of {times(input_shape[:2])}"
            )
        return window[0].windows, window[1].windows, input_shape[2]

    def _extent(self, window: pool.Window) -> str:
        """Return the window in words."""
        size = f"size {times(pair(self, 'size'))}"
        if pair(self, "dilation") == (1, 1):
            return size
        reach = times([span.reach for span in window])
        return f"{size} and dilation {times(pair(self, 'dilation'))}, which reaches {reach},"

    def flops(self, input_shape: Shape) -> int:
        """One for each place of each window."""
        return prod(pair(self, "size")) * prod(self.output_shape(input_shape))

    def window(self, shape: Shape) -> pool.Window:
        """Return how the windows lie in an image of ``shape`` (H, W, C)."""
        size, dilation = pair(self, "size"), pair(self, "dilation")
        stride = size if self.stride is None else pair(self, "stride")
        high, wide = (
            pool.Span(size[axis], stride[axis], dilation[axis], *margins, shape[axis])
            for axis in (0, 1)
            for margins in [self._margins(shape[axis], axis, stride[axis], (size[axis] - 1) * dilation[axis] + 1)]
        )
        return high, wide

    def _margins(self, length: int, axis: int, stride: int, reach: int) -> Pair:
        """Return the padding before and after ``length`` pixels along ``axis`` (0 high, 1 wide)."""
        if fixed := self._fixed_margins():
            return fixed[axis]
        total = max(0, (-(-length // stride) - 1) * stride + reach - length)
        return total // 2, total - total // 2

    def _fixed_margins(self) -> tuple[Pair, ...]:
        """The padding ((top, bottom), (left, right)) where it does not depend on the image, else nothing."""
        match self.padding:
            case "same":
                return ()
            case "valid":
                return (0, 0), (0, 0)
            case (int(high), int(wide)):
                return (high, high), (wide, wide)
            case ((top, bottom), (left, right)):
                return (top, bottom), (left, right)
            case str() | tuple():
                raise ValueError(
                    f"{self.kind}: padding must be 'same', 'valid', an integer, two, or two pairs, got {self.padding!r}"
                )
            case everywhere:
                return (everywhere, everywhere), (everywhere, everywhere)


@register_layer("max_pool2d")
@dataclass(frozen=True)
class MaxPool2D(_Pool2D):
    """y[h, w, c] = max_ij x[h s + i d - top, w t + j e - left, c], over the places (i, j) that are in the image.

    dy goes back to the maximum, of equals to the first in row order.

    Args:
        size: of the window in pixels, (high, wide) or one number for both.
        stride: (s, t) in pixels, or one number for both; by default the size. Rows and columns that fill no window are
            left out.
        padding: ``"same"``: as much as makes the output ceil(H / s) high, the odd pixel at the end; ``"valid"``: none;
            the pixels at each side; (high, wide), the pixels above and below and those left and right; or
            ((top, bottom), (left, right)). It is never the maximum: each window must have a pixel of the image too.
        dilation: (d, e), the distance in pixels between the places of a window, or one number for both.
    """

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Pooled]:
        """The formula above."""
        window = self.window(x.shape[1:])
        y = scope.kernels.max_pool(x, window, out=_output(x, window, scope))
        return y, _Pooled(x, y)

    def backward_input(self, params: Params, saved: _Pooled, dy: Array, scope: Scope) -> Array:
        """Each dy[h, w, c] goes to where its maximum was; where windows overlap, they add up."""
        x, y = saved
        scratch = (pool.samples_at_once(y), *y.shape[1:])
        return scope.kernels.max_pool_backward(
            x,
            y,
            dy,
            self.window(x.shape[1:]),
            out=scope.empty("dx", x.shape, dy.dtype),
            rest=scope.empty("rest", (2, *scratch), dy.dtype),
            hit=scope.empty("hit", scratch, np.dtype(np.bool_)),
        )


@register_layer("avg_pool2d")
@dataclass(frozen=True)
class AvgPool2D(_Pool2D):
    """y[h, w, c] = mean_ij x[h s + i d - top, w t + j e - left, c], x being zero outside the image.

    Args:
        size: as in ``MaxPool2D``, and so are stride, padding and dilation.
        count_include_pad: whether padding counts; if not, the mean is over the pixels of the image alone.
    """

    count_include_pad: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.count_include_pad, bool):
            raise TypeError(f"avg_pool2d: count_include_pad must be true or false, got {self.count_include_pad!r}")

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Shape]:
        """The formula above."""
        window = self.window(x.shape[1:])
        return pool.average_pool(x, window, self.count_include_pad, out=_output(x, window, scope)), x.shape

    def backward_input(self, params: Params, saved: Shape, dy: Array, scope: Scope) -> Array:
        """Each dy[h, w, c] goes in equal shares to the pixels it is the mean of, and they add up."""
        return pool.average_pool_backward(
            dy,
            self.window(saved[1:]),
            self.count_include_pad,
            out=scope.empty("dx", saved, dy.dtype),
            share=scope.empty("share", dy.shape, dy.dtype),
        )


@register_layer("global_average_pool")
@dataclass(frozen=True)
class GlobalAveragePool(Layer):
    """y[c] = mean_hw x[h, w, c]: an image of any size as one vector."""

    def output_shape(self, input_shape: Shape) -> Shape:
        """(H, W, C) -> (C,)."""
        return _channels(self, input_shape)

    def flops(self, input_shape: Shape) -> int:
        """One for each element of x."""
        return prod(input_shape)

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Shape]:
        """The mean of all pixels."""
        N, H, W, C = x.shape
        mean = np.full((1, H * W), 1 / (H * W), x.dtype)
        y = scope.empty("y", (N, C), x.dtype)
        np.matmul(mean, x.reshape(N, H * W, C), out=y.reshape(N, 1, C))  # far faster than a sum along a middle axis
        return y, x.shape

    def backward_input(self, params: Params, saved: Shape, dy: Array, scope: Scope) -> Array:
        """dx[h, w, c] = dy[c] / (H W)."""
        _, H, W, _ = saved
        dx = scope.empty("dx", saved, dy.dtype)
        np.multiply(dy[:, None, None, :], dy.dtype.type(1 / (H * W)), out=dx)
        return dx


@register_layer("global_max_pool")
@dataclass(frozen=True)
class GlobalMaxPool(Layer):
    """y[c] = max_hw x[h, w, c]; dy goes back to the maximum, of equals to the first in row order."""

    def output_shape(self, input_shape: Shape) -> Shape:
        """(H, W, C) -> (C,)."""
        return _channels(self, input_shape)

    def flops(self, input_shape: Shape) -> int:
        """One for each element of x."""
        return prod(input_shape)

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Pooled]:
        """The maximum of all pixels."""
        y = scope.empty("y", (len(x), x.shape[3]), x.dtype)
        np.max(x, axis=(1, 2), out=y)
        return y, _Pooled(x, y)

    def backward_input(self, params: Params, saved: _Pooled, dy: Array, scope: Scope) -> Array:
        """Each dy[c] goes to where its maximum was."""
        N, H, W, C = saved.x.shape
        dx = scope.empty("dx", saved.x.shape, dy.dtype)
        dx.fill(0)
        first = saved.x.reshape(N, H * W, C).argmax(axis=1)
        np.put_along_axis(dx.reshape(N, H * W, C), first[:, None], dy[:, None], axis=1)
        return dx


def _output(x: Array, window: pool.Window, scope: Scope) -> Array:
    """Return the buffer of y (N, h, w, C)."""
    N, _, _, C = x.shape
    return scope.empty("y", (N, window[0].windows, window[1].windows, C), x.dtype)


def _channels(layer: Layer, input_shape: Shape) -> Shape:
    """(H, W, C) -> (C,)."""
    if len(input_shape) != 3:
        raise ValueError(f"{layer.kind} needs an input of shape (height, width, channels), got {input_shape}")
    return input_shape[2:]
