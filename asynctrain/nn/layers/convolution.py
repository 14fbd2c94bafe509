"""Convolution of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn import initializers
from asynctrain.nn.kernels import conv, winograd
from asynctrain.nn.kernels.backend import NUMPY, Kernels
from asynctrain.nn.layers.base import Layer, Parameter, check_integer, pair, register_layer, times
from asynctrain.nn.scope import Scope
from asynctrain.types import Params

Padding = Literal["same", "valid"] | int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]]


class _Seen(NamedTuple):
    """What a convolution saves."""

    x: Array  # padded, where the algorithm wants it so
    shape: Shape  # of the image itself
    corner: conv.Pair  # the rows and columns of padding before the image
    algorithm: _Algorithm
    tiles: Array | None = None  # of the image, transformed, where the algorithm keeps them


@register_layer("conv2d")
@dataclass(frozen=True)
class Conv2D(Layer):
    """y[h, w, f] = b[f] + sum_ijc x[h s + i d - top, w t + j e - left, c] W[i, j, c, f].

    x is zero outside the image, W is ``weight`` (kh, kw, C / groups, F), b is ``bias`` (F,). With groups, filter f sees
    the channels of its group alone, and c counts within them: group g has the g-th part of the channels and of the
    filters.

    Args:
        filters: F, at least 1.
        kernel_size: (kh, kw) in pixels, or one number for both.
        stride: (s, t) in pixels, or one number for both.
        padding: ``"same"``: as much as makes the output ceil(H / s) high, the odd pixel at the end; ``"valid"``: none;
            the pixels at each side; (high, wide), the pixels above and below and those left and right; or
            ((top, bottom), (left, right)).
        dilation: (d, e), the distance in pixels between the places of a window, or one number for both.
        groups: divides C and F; as many as channels makes the convolution depthwise.
        use_bias: whether there is a b; before a normalisation it is of no use.
        initializer: of the weight.
    """

    leaves_output: ClassVar[bool] = True

    filters: int
    kernel_size: int | tuple[int, int] = 3
    _: KW_ONLY
    stride: int | tuple[int, int] = 1
    padding: Padding = "same"
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    use_bias: bool = True
    initializer: str = "he_normal"

    def __post_init__(self) -> None:
        for argument in ("filters", "groups"):
            check_integer(self, argument, getattr(self, argument))
        for argument in ("kernel_size", "stride", "dilation"):
            for number in pair(self, argument):
                check_integer(self, argument, number)
        if self.filters % self.groups:
            raise ValueError(f"conv2d: groups must divide the {self.filters} filters, got {self.groups}")
        if not isinstance(self.use_bias, bool):
            raise TypeError(f"conv2d: use_bias must be true or false, got {self.use_bias!r}")
        for margin in self._fixed_margins:
            for number in margin:
                check_integer(self, "padding", number, least=0)
        initializers.get(self.initializer)

    @cached_property
    def geometry(self) -> conv.Geometry:
        """What the windows look like."""
        return conv.Geometry(pair(self, "kernel_size"), pair(self, "stride"), pair(self, "dilation"), self.groups)

    @cached_property
    def _fixed_margins(self) -> tuple[conv.Pair, ...]:
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
                    f"conv2d: padding must be 'same', 'valid', an integer, two, or two pairs, got {self.padding!r}"
                )
            case everywhere:
                return (everywhere, everywhere), (everywhere, everywhere)

    def margins(self, length: int, axis: int) -> conv.Pair:
        """Return the padding before and after ``length`` pixels along ``axis`` (0 high, 1 wide)."""
        if self._fixed_margins:
            return self._fixed_margins[axis]
        stride = self.geometry.stride[axis]
        total = max(0, (-(-length // stride) - 1) * stride + self.geometry.reach[axis] - length)
        return total // 2, total - total // 2

    def output_shape(self, input_shape: Shape) -> Shape:
        """(H, W, C) -> ((H + top + bottom - reach) // s + 1, ..., F), the reach (kh - 1) d + 1; likewise wide."""
        if len(input_shape) != 3:
            raise ValueError(f"conv2d needs an input of shape (height, width, channels), got {input_shape}")
        if input_shape[2] % self.groups:
            raise ValueError(
                f"conv2d with groups {self.groups} needs channels in a multiple of that, got {input_shape[2]}"
            )
        padded = [length + sum(self.margins(length, axis)) for axis, length in enumerate(input_shape[:2])]
        reach, stride = self.geometry.reach, self.geometry.stride
        if padded[0] < reach[0] or padded[1] < reach[1]:
            raise ValueError(
                f"conv2d with {self._extent} needs an input of at least that size, padding included, got "
                f"{times(padded)}"
            )
        height, width = ((padded[axis] - reach[axis]) // stride[axis] + 1 for axis in (0, 1))
        return height, width, self.filters

    @property
    def _extent(self) -> str:
        """The window in words."""
        size = f"kernel_size {times(self.geometry.window)}"
        if self.geometry.dilation == (1, 1):
            return size
        return f"{size} and dilation {times(self.geometry.dilation)}, which reaches {times(self.geometry.reach)},"

    def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """W from the initializer, b zero."""
        shape = (*self.geometry.window, input_shape[2] // self.groups, self.filters)
        parameters = {"weight": Parameter(shape, self.initializer)}
        if self.use_bias:
            parameters["bias"] = Parameter((self.filters,), "zeros")
        return parameters

    def flops(self, input_shape: Shape) -> int:
        """2 kh kw C / groups for each element of y, whatever the algorithm; the bias begins each sum."""
        kh, kw = self.geometry.window
        return 2 * kh * kw * (input_shape[2] // self.groups) * prod(self.output_shape(input_shape))

    def activations(self, input_shape: Shape) -> int:
        """y, and the padded image or the transformed tiles where the algorithm keeps such; for a large microbatch."""
        H, W, C = input_shape
        y = self.output_shape(input_shape)
        if self._algorithm((32, *y), C, NUMPY) is _WINOGRAD:
            return prod(y) + prod(winograd.blocks((1, *y)).seen(1, C))
        padded = (H + sum(self.margins(H, 0))) * (W + sum(self.margins(W, 1))) * C
        return prod(y) + (padded if padded > H * W * C else 0)

    def _algorithm(self, output: Shape, channels: int, kernels: Kernels) -> _Algorithm:
        """Return what computes an ``output`` (N, h, w, F), by a fixed rule of the shapes."""
        if self.groups == self.filters == channels > 1:
            return _DEPTHWISE
        plain = conv.Geometry((3, 3))
        return _WINOGRAD if self.geometry == plain and kernels.winograd_pays(output, channels) else _COLUMNS

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Seen]:
        """The formula above."""
        y = scope.empty("y", (len(x), *self.output_shape(x.shape[1:])), x.dtype)
        algorithm = self._algorithm(y.shape, x.shape[3], scope.kernels)
        seen = self._pad(x, scope, algorithm)
        seen = seen._replace(tiles=algorithm.tiles(x.shape[3], y, scope))
        bias = params["bias"] if self.use_bias else None
        algorithm.forward(seen, params["weight"], bias, self.geometry, y, scope)
        return y, seen

    def backward_input(self, params: Params, saved: _Seen, dy: Array, scope: Scope) -> Array:
        """dx[u, v, c] = sum_hwf dy[h, w, f] W[u + top - h s, v + left - w t, c, f], where W has such an entry.

        With dilation, W[i, j] is met where u + top - h s = i d and v + left - w t = j e.
        """
        dx = scope.empty("dx", saved.shape, dy.dtype)
        return saved.algorithm.backward_input(saved, params["weight"], dy, self.geometry, dx, scope)

    def backward_params(self, params: Params, saved: _Seen, dy: Array, scope: Scope) -> None:
        """dW[i, j, c, f] = sum_nhw x[n, h s + i d - top, w t + j e - left, c] dy[n, h, w, f]; db = sum_nhw dy."""
        saved.algorithm.backward_params(saved, dy, self.geometry, scope.gradient("weight"), scope)
        if self.use_bias:
            ones = scope.empty("ones", (dy.size // self.filters,), dy.dtype)
            conv.bias_backward(dy, out=scope.gradient("bias"), ones=ones)

    def _pad(self, x: Array, scope: Scope, algorithm: _Algorithm) -> _Seen:
        N, H, W, C = x.shape
        (top, bottom), (left, right) = self.margins(H, 0), self.margins(W, 1)
        if not algorithm.pads or not (top or bottom or left or right):
            return _Seen(x, x.shape, (top, left), algorithm)
        padded = scope.empty("padded", (N, top + H + bottom, left + W + right, C), x.dtype)
        return _Seen(conv.place(x, (top, left), (1, 1), out=padded), x.shape, (top, left), algorithm)


class _Algorithm:
    """One way to convolve: gives the kernels their scratch memory."""

    pads: ClassVar[bool]  # whether the kernels take the image with its padding

    def tiles(self, channels: int, y: Array, scope: Scope) -> Array | None:
        """Return memory for the image's tiles, transformed, if training keeps them for the weight gradient."""
        return None

    def forward(
        self, seen: _Seen, weight: Array, bias: Array | None, geometry: conv.Geometry, y: Array, scope: Scope
    ) -> Array:
        raise NotImplementedError

    def backward_input(
        self, seen: _Seen, weight: Array, dy: Array, geometry: conv.Geometry, dx: Array, scope: Scope
    ) -> Array:
        raise NotImplementedError

    def backward_params(self, seen: _Seen, dy: Array, geometry: conv.Geometry, dweight: Array, scope: Scope) -> Array:
        raise NotImplementedError


class _Columns(_Algorithm):
    """Matrix products over tiles of columns: every convolution."""

    pads = True

    def forward(
        self, seen: _Seen, weight: Array, bias: Array | None, geometry: conv.Geometry, y: Array, scope: Scope
    ) -> Array:
        columns = _columns("columns", y.shape, geometry, seen.x, scope)
        return scope.kernels.conv_correlate(seen.x, weight, geometry, out=y, columns=columns, bias=bias)

    def backward_input(
        self, seen: _Seen, weight: Array, dy: Array, geometry: conv.Geometry, dx: Array, scope: Scope
    ) -> Array:
        if geometry.stride != (1, 1):
            columns = _columns("columns_of_dx", dy.shape, geometry, seen.x, scope)
            padded = scope.empty("padded_dx", seen.x.shape, dy.dtype)
            return scope.kernels.conv_scatter(weight, dy, seen.corner, geometry, out=dx, padded=padded, columns=columns)
        padded = _spread(dy, geometry, dx, scope)
        return scope.kernels.conv_correlate_backward_input(
            weight,
            dy,
            seen.corner,
            geometry,
            out=dx,
            padded=padded,
            flipped=scope.empty("flipped", (*geometry.window, dy.shape[3] // geometry.groups, dx.shape[3]), dy.dtype),
            columns=_columns("columns_of_dy", dx.shape, geometry, padded, scope),
        )

    def backward_params(self, seen: _Seen, dy: Array, geometry: conv.Geometry, dweight: Array, scope: Scope) -> Array:
        columns = _columns("columns", dy.shape, geometry, seen.x, scope)
        partial = scope.empty("partial", dweight.shape, dy.dtype)
        return scope.kernels.conv_correlate_backward_params(
            seen.x, dy, geometry, out=dweight, columns=columns, partial=partial
        )


class _Depthwise(_Algorithm):
    """One pass over all places of a window, where each channel has one filter."""

    pads = True

    def forward(
        self, seen: _Seen, weight: Array, bias: Array | None, geometry: conv.Geometry, y: Array, scope: Scope
    ) -> Array:
        repeated = scope.empty("repeated", (*geometry.window, *y.shape[2:]), y.dtype)
        return scope.kernels.depthwise_correlate(seen.x, weight, geometry, out=y, repeated=repeated, bias=bias)

    def backward_input(
        self, seen: _Seen, weight: Array, dy: Array, geometry: conv.Geometry, dx: Array, scope: Scope
    ) -> Array:
        repeated = scope.empty("repeated_for_dx", (*geometry.window, *dx.shape[2:]), dy.dtype)
        spread = _spread(dy, geometry, dx, scope)
        return scope.kernels.depthwise_correlate_backward_input(
            weight, dy, seen.corner, geometry, out=dx, spread=spread, repeated=repeated
        )

    def backward_params(self, seen: _Seen, dy: Array, geometry: conv.Geometry, dweight: Array, scope: Scope) -> Array:
        partial = scope.empty("partial", (len(dy), *geometry.window, dy.shape[3]), dy.dtype)
        return scope.kernels.depthwise_correlate_backward_params(seen.x, dy, geometry, out=dweight, partial=partial)


class _Winograd(_Algorithm):
    """Minimal filtering of tiles: 3x3, stride 1, many channels."""

    pads = False

    def forward(
        self, seen: _Seen, weight: Array, bias: Array | None, geometry: conv.Geometry, y: Array, scope: Scope
    ) -> Array:
        spectrum, scratch = self._buffers("", y.shape, seen.x.shape[3], y.dtype, scope)
        return scope.kernels.winograd_correlate(
            seen.x,
            weight,
            seen.corner,
            out=y,
            spectrum=spectrum,
            scratch=scratch,
            bias=bias,
            seen=seen.tiles,
        )

    def backward_input(
        self, seen: _Seen, weight: Array, dy: Array, geometry: conv.Geometry, dx: Array, scope: Scope
    ) -> Array:
        C, F = weight.shape[2:]
        spectrum, scratch = self._buffers("_for_dx", dx.shape, F, dy.dtype, scope)
        return scope.kernels.winograd_correlate_backward_input(
            weight,
            dy,
            seen.corner,
            out=dx,
            flipped=scope.empty("flipped", (3, 3, F, C), dy.dtype),
            spectrum=spectrum,
            scratch=scratch,
        )

    def backward_params(self, seen: _Seen, dy: Array, geometry: conv.Geometry, dweight: Array, scope: Scope) -> Array:
        spectrum, scratch = self._buffers("", dy.shape, seen.shape[3], dy.dtype, scope)
        partial = scope.empty("partial", spectrum.shape, dy.dtype)
        return scope.kernels.winograd_correlate_backward_params(
            seen.x,
            dy,
            seen.corner,
            out=dweight,
            spectrum=spectrum,
            partial=partial,
            scratch=scratch,
            seen=seen.tiles,
        )

    def tiles(self, channels: int, y: Array, scope: Scope) -> Array | None:
        if not (scope.train and scope.kernels.winograd_keeps_tiles):
            return None
        return scope.empty("seen", winograd.blocks(y.shape).seen(len(y), channels), y.dtype)

    def _buffers(
        self, suffix: str, output: Shape, channels: int, dtype: np.dtype[Any], scope: Scope
    ) -> tuple[Array, Array]:
        """Return memory for the filters' spectrum and for a block's tiles; F is the last of ``output``."""
        filters = output[3]
        plan = winograd.blocks(output)
        spectrum = scope.empty(f"spectrum{suffix}", (36, channels, filters), dtype)
        return spectrum, scope.empty(f"tiles{suffix}", plan.scratch(max(channels, filters)), dtype)


_COLUMNS, _DEPTHWISE, _WINOGRAD = _Columns(), _Depthwise(), _Winograd()


def _columns(name: str, output: Shape, geometry: conv.Geometry, x: Array, scope: Scope) -> Array:
    """Return memory for the columns of one tile."""
    plan = conv.tiling(output, geometry, x.shape[3], x.itemsize)
    return scope.empty(name, (plan.scratch,), x.dtype)


def _spread(dy: Array, geometry: conv.Geometry, dx: Array, scope: Scope) -> Array:
    """Return memory for dy spread by the stride, with a margin that the windows of dx need."""
    high, wide = geometry.reach
    N, H, W, _ = dx.shape
    return scope.empty("spread", (N, H + high - 1, W + wide - 1, dy.shape[3]), dy.dtype)
