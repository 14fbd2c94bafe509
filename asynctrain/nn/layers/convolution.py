"""Convolution of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn import initializers
from asynctrain.nn.kernels import conv
from asynctrain.nn.layers.base import Layer, Parameter, check_integer, pair, register_layer, times
from asynctrain.nn.scope import Scope
from asynctrain.types import Params

Padding = Literal["same", "valid"] | int


class _Seen(NamedTuple):
    """What a convolution saves: the padded image, the image's own shape, and where in the former it begins."""

    padded: Array
    shape: Shape
    corner: conv.Pair


@register_layer("conv2d")
@dataclass(frozen=True)
class Conv2D(Layer):
    """y[h, w, f] = b[f] + sum_ijc x[h s + i - top, w t + j - left, c] W[i, j, c, f], x being zero outside the image.

    W is ``weight`` (kh, kw, C, F), b is ``bias`` (F,).

    Args:
        filters: F, at least 1.
        kernel_size: (kh, kw) in pixels, or one number for both.
        stride: (s, t) in pixels, or one number for both.
        padding: ``"same"``: as much as makes the output ceil(H / s) high, the odd pixel at the end; ``"valid"``: none;
            or the pixels at each side.
        initializer: of the weight.
    """

    filters: int
    kernel_size: int | tuple[int, int] = 3
    _: KW_ONLY
    stride: int | tuple[int, int] = 1
    padding: Padding = "same"
    initializer: str = "he_normal"

    def __post_init__(self) -> None:
        check_integer(self, "filters", self.filters)
        for argument in ("kernel_size", "stride"):
            for number in pair(self, argument):
                check_integer(self, argument, number)
        if self.padding not in ("same", "valid"):
            if isinstance(self.padding, str):
                raise ValueError(f"conv2d: padding must be 'same', 'valid' or an integer, got {self.padding!r}")
            check_integer(self, "padding", self.padding, least=0)
        initializers.get(self.initializer)

    @cached_property
    def _window(self) -> conv.Pair:
        return pair(self, "kernel_size")

    @cached_property
    def _stride(self) -> conv.Pair:
        return pair(self, "stride")

    def _margins(self, length: int, axis: int) -> conv.Pair:
        """Return the padding before and after ``length`` pixels along ``axis`` (0 high, 1 wide)."""
        if self.padding == "valid":
            return 0, 0
        if self.padding == "same":
            stride = self._stride[axis]
            total = max(0, (-(-length // stride) - 1) * stride + self._window[axis] - length)
            return total // 2, total - total // 2
        return self.padding, self.padding

    def output_shape(self, input_shape: Shape) -> Shape:
        """(H, W, C) -> ((H + top + bottom - kh) // s + 1, (W + left + right - kw) // t + 1, F)."""
        if len(input_shape) != 3:
            raise ValueError(f"conv2d needs an input of shape (height, width, channels), got {input_shape}")
        padded = [length + sum(self._margins(length, axis)) for axis, length in enumerate(input_shape[:2])]
        if padded[0] < self._window[0] or padded[1] < self._window[1]:
            raise ValueError(
                f"conv2d with kernel_size {times(self._window)} needs an input of at least that size, padding "
                f"included, got {times(padded)}"
            )
        height, width = ((padded[axis] - self._window[axis]) // self._stride[axis] + 1 for axis in (0, 1))
        return height, width, self.filters

    def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """W from the initializer, b zero."""
        return {
            "weight": Parameter((*self._window, input_shape[2], self.filters), self.initializer),
            "bias": Parameter((self.filters,), "zeros"),
        }

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Seen]:
        """The formula above, as tiles of matrix products."""
        seen = self._pad(x, scope)
        y = scope.empty("y", (len(x), *self.output_shape(x.shape[1:])), x.dtype)
        columns = self._columns("columns", y.shape, x.shape[3], x.dtype, scope)
        conv.correlate(seen.padded, params["weight"], self._stride, out=y, columns=columns, bias=params["bias"])
        return y, seen

    def backward_input(self, params: Params, saved: _Seen, dy: Array, scope: Scope) -> Array:
        """dx[u, v, c] = sum_hwf dy[h, w, f] W[u + top - h s, v + left - w t, c, f], where W has such an entry."""
        weight = params["weight"]
        kh, kw, C, F = weight.shape
        N, H, W, _ = saved.shape
        dx = scope.empty("dx", saved.shape, dy.dtype)
        return conv.correlate_backward_input(
            weight,
            dy,
            saved.corner,
            self._stride,
            out=dx,
            spread=scope.empty("spread", (N, H + kh - 1, W + kw - 1, F), dy.dtype),
            flipped=scope.empty("flipped", (kh, kw, F, C), dy.dtype),
            columns=self._columns("columns_of_dy", dx.shape, F, dy.dtype, scope),
        )

    def backward_params(self, params: Params, saved: _Seen, dy: Array, scope: Scope) -> None:
        """dW[i, j, c, f] = sum_nhw x[n, h s + i - top, w t + j - left, c] dy[n, h, w, f], db = sum_nhw dy[n, h, w]."""
        gradient = scope.gradient("weight")
        channels = saved.shape[3]
        conv.correlate_backward_params(
            saved.padded,
            dy,
            self._stride,
            out_weight=gradient,
            out_bias=scope.gradient("bias"),
            columns=self._columns("columns", dy.shape, channels, dy.dtype, scope),
            partial=scope.empty("partial", (gradient.size // self.filters, self.filters), dy.dtype),
            ones=scope.empty("ones", (dy.size // self.filters,), dy.dtype),
        )

    def _pad(self, x: Array, scope: Scope) -> _Seen:
        N, H, W, C = x.shape
        (top, bottom), (left, right) = self._margins(H, 0), self._margins(W, 1)
        if not (top or bottom or left or right):
            return _Seen(x, x.shape, (0, 0))
        padded = scope.empty("padded", (N, top + H + bottom, left + W + right, C), x.dtype)
        return _Seen(conv.place(x, (top, left), (1, 1), out=padded), x.shape, (top, left))

    def _columns(self, name: str, output: Shape, channels: int, dtype: np.dtype[Any], scope: Scope) -> Array:
        plan = conv.tiling(output, self._window, channels, dtype.itemsize)
        return scope.empty(name, (plan.scratch,), dtype)
