"""Runs of layers that one kernel does better together, and how a ``Sequential`` comes to do so.

It is a matter of execution alone: layers, their names, parameters and JSON stay as they are. What is fused is a fixed
rule of the layers and of their input's shape, the same on every home.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn.kernels import conv, dense, pooled
from asynctrain.nn.layers.activation import LeakyReLU, ReLU
from asynctrain.nn.layers.base import Layer
from asynctrain.nn.layers.convolution import Conv2D
from asynctrain.nn.layers.dense import Dense
from asynctrain.nn.layers.normalization import BatchNorm, RectifiedNorm
from asynctrain.nn.layers.pooling import MaxPool2D
from asynctrain.nn.scope import Scope
from asynctrain.types import Params

NamedLayer = tuple[str, Layer]


def fused(children: Mapping[str, Layer], input_shape: Shape) -> list[NamedLayer]:
    """Return what does the work of ``children``, one after the other, for an input of ``input_shape``.

    What stands for several children has the name, and so the parameters and buffers, of the first. Two pooled
    convolutions, one after the other, hand images on in the order of memory that both like best.
    """
    steps = list(_fused(children, input_shape))
    for number in range(1, len(steps)):
        (before, first), (name, second) = steps[number - 1 : number + 1]
        if isinstance(first, PooledConv2D) and isinstance(second, PooledConv2D):
            steps[number - 1] = before, replace(first, gives_planes=True)
            steps[number] = name, replace(second, takes_planes=True)
    return steps


def _fused(children: Mapping[str, Layer], input_shape: Shape) -> Iterator[NamedLayer]:
    """Yield the layers, where it pays several as one.

    Where a max pooling becomes one with the convolution before it, an activation between the two comes last, for a
    quarter of the outputs: a ReLU as a part of it, a leaky one as a layer. They may, as they do not fall: the maximum
    of what they give is what they give for the maximum.
    """
    left = list(children.items())
    while left:
        (name, layer), *left = left
        kinds = [type(layer) for _, layer in left[:2]]  # a subclass may do anything
        if type(layer) is Conv2D:
            between = left[:1] if kinds[:1] in ([ReLU], [LeakyReLU]) else []
            pool = left[len(between)][1] if len(left) > len(between) else None
            if type(pool) is MaxPool2D and _pays(layer, pool, input_shape):
                rectify = kinds[0] is ReLU
                layer = PooledConv2D(layer, pool, rectify)
                left = [*([] if rectify else between), *left[len(between) + 1 :]]
        elif type(layer) is Dense and kinds[:1] == [ReLU]:
            layer = RectifiedDense(layer)
            left = left[1:]
        elif type(layer) is BatchNorm and kinds[:1] == [ReLU]:
            layer = RectifiedNorm(layer)
            left = left[1:]
        yield name, layer
        input_shape = layer.output_shape(input_shape)


def _pays(layer: Conv2D, pool: MaxPool2D, input_shape: Shape) -> bool:
    """Return whether ``PooledConv2D`` can do the work of both, and is faster."""
    plain = conv.Geometry(layer.geometry.window)
    window = pool.window(layer.output_shape(input_shape))
    apart = all(span.stride == span.size and span.dilation == 1 and not (span.before or span.after) for span in window)
    return layer.geometry == plain and apart and pooled.pays(_plan(layer, pool, (1, *input_shape), 4))


def _plan(layer: Conv2D, pool: MaxPool2D, shape: Shape, itemsize: int) -> pooled.Plan:
    """Return the kernel's shapes for images of ``shape`` (N, H, W, C)."""
    high, wide = pool.window(layer.output_shape(shape[1:]))
    size, maxima = (high.size, wide.size), (high.windows, wide.windows)
    return pooled.Plan(shape[0], shape[3], layer.filters, layer.geometry.window, size, maxima, itemsize)


class _Seen(NamedTuple):
    """What a pooled convolution saves."""

    plan: pooled.Plan
    corner: conv.Pair  # the rows and columns of padding before the image
    shape: Shape  # of the image itself
    matrix: Array
    bands: Array
    slices: Array
    ridges: Array
    top: Array
    y: Array


@dataclass(frozen=True)
class PooledConv2D(Layer):
    """y = max over windows of the convolution of x: a ``Conv2D`` of stride 1 and a ``MaxPool2D`` of its size as stride.

    It is no layer that a model is made of, but what a ``Sequential`` computes with; see ``fused``.

    Args:
        layer: the convolution, whose parameters it has.
        pool: the max pooling.
        rectify: whether max(y, 0) comes last.
        takes_planes: whether x lies as (H, C, W, N) in memory, of which it is a view (N, H, W, C); then dx does too.
        gives_planes: whether y is to lie so; then dy does too.
    """

    layer: Conv2D
    pool: MaxPool2D
    rectify: bool = False
    takes_planes: bool = False
    gives_planes: bool = False

    def output_shape(self, input_shape: Shape) -> Shape:
        """That of the two, one after the other."""
        return self.pool.output_shape(self.layer.output_shape(input_shape))

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Seen]:
        """y[h, w, f] = b[f] + max_ij (x * W)[h p + i, w q + j, f]."""
        plan, corner = self._plan(x.shape, x.itemsize)
        matrix = pooled.spread_weight(
            params["weight"],
            plan,
            out=scope.empty("matrix", plan.matrix, x.dtype),
            padded=scope.empty("padded_weight", plan.padded_weight, x.dtype),
        )
        (h, w), F, N = plan.maxima, plan.filters, plan.samples
        if self.gives_planes:
            y = _as_images(scope.empty("y", (h, F, w, N), x.dtype))
        else:
            y = scope.empty("y", (N, h, w, F), x.dtype)
        saved = _Seen(
            plan,
            corner,
            x.shape,
            matrix,
            scope.empty("bands", plan.bands, x.dtype),
            scope.empty("slices", plan.slices, x.dtype),
            scope.empty("ridges", plan.ridges, x.dtype),
            scope.empty("top", plan.top, x.dtype),
            y,
        )
        scope.kernels.pooled_correlate(
            self._planes(x, plan, corner, scope),
            matrix,
            plan,
            out=_as_planes(y),
            bands=saved.bands,
            slices=saved.slices,
            ridges=saved.ridges,
            top=saved.top,
            bias=params["bias"] if self.layer.use_bias else None,
            rectify=self.rectify,
        )
        return y, saved

    def backward(self, params: Params, saved: _Seen, dy: Array, scope: Scope, need_input: bool = True) -> Array | None:
        """Each dy goes to its maximum first: weight and input gradients both come from there."""
        scope.check()
        plan = saved.plan
        scope.kernels.pooled_spread_maxima(
            saved.slices,
            saved.ridges,
            saved.top,
            _as_planes(saved.y),
            _as_planes(dy),
            plan,
            rectify=self.rectify,
        )
        return super().backward(params, saved, dy, scope, need_input)

    def backward_input(self, params: Params, saved: _Seen, dy: Array, scope: Scope) -> Array:
        """That of the convolution, for the gradient of its outputs."""
        plan, (top, left), (_, H, W, _) = saved.plan, saved.corner, saved.shape
        dplanes = scope.kernels.pooled_correlate_backward_input(
            saved.matrix,
            saved.slices,
            plan,
            out=scope.empty("dplanes", plan.dplanes(top + H, left + W), dy.dtype),
            dbands=scope.empty("dbands", plan.dbands, dy.dtype),
            columns=scope.empty("columns", plan.columns, dy.dtype),
        )
        dimages = _as_images(dplanes)[:, top : top + H, left : left + W]
        if self.takes_planes:
            return dimages
        dx = scope.empty("dx", saved.shape, dy.dtype)
        np.copyto(dx, dimages)
        return dx

    def backward_params(self, params: Params, saved: _Seen, dy: Array, scope: Scope) -> None:
        """That of the convolution, for the gradient of its outputs; the bias is added to the maxima alone."""
        plan = saved.plan
        transposed = plan.matrix[::-1]
        dmatrix = pooled.correlate_backward_params(
            saved.bands,
            saved.slices,
            plan,
            out=scope.empty("dmatrix", transposed, dy.dtype),
            partial=scope.empty("partial", (plan.maxima[0], *transposed), dy.dtype),
        )
        pooled.gather_weight(dmatrix, plan, out=scope.gradient("weight"))
        if self.layer.use_bias:
            pooled.bias_backward(saved.top, out=scope.gradient("bias"))

    def _plan(self, shape: Shape, itemsize: int) -> tuple[pooled.Plan, conv.Pair]:
        """Return the kernel's shapes and the padding before the image, for images of ``shape`` (N, H, W, C)."""
        known = self._known_plans.get((shape, itemsize))
        if known is None:
            corner = self.layer.margins(shape[1], 0)[0], self.layer.margins(shape[2], 1)[0]
            known = self._known_plans[shape, itemsize] = _plan(self.layer, self.pool, shape, itemsize), corner
        return known

    @cached_property
    def _known_plans(self) -> dict[tuple[Shape, int], tuple[pooled.Plan, conv.Pair]]:
        return {}

    def _planes(self, x: Array, plan: pooled.Plan, corner: conv.Pair, scope: Scope) -> Array:
        """Return x as planes, with what the patches see of its padding."""
        H, _, W, _ = plan.planes
        if self.takes_planes and corner == (0, 0) and (x.shape[1] >= H and x.shape[2] >= W):
            return _as_planes(x)
        planes = scope.empty("planes", plan.planes, x.dtype)
        planes.fill(0)  # all of it: in few channels that is less work than to find the margins
        rows, from_rows = conv.overlap(x.shape[1], H, corner[0])
        columns, from_columns = conv.overlap(x.shape[2], W, corner[1])
        np.copyto(_as_images(planes)[:, rows, columns], x[:, from_rows, from_columns])
        return planes


def _as_planes(images: Array) -> Array:
    """Return images (N, H, W, C) as a view (H, C, W, N)."""
    return images.transpose(1, 3, 2, 0)


def _as_images(planes: Array) -> Array:
    """Return planes (H, C, W, N) as a view (N, H, W, C)."""
    return planes.transpose(3, 0, 2, 1)


class _Dealt(NamedTuple):
    """What a dense layer with a ReLU saves."""

    x: Array
    y: Array


@dataclass(frozen=True)
class RectifiedDense(Layer):
    """y = max(x W + b, 0): a ``Dense`` and a ``ReLU``; like ``PooledConv2D`` no layer that a model is made of.

    Args:
        layer: the dense one, whose parameters it has.
    """

    layer: Dense

    def output_shape(self, input_shape: Shape) -> Shape:
        """That of the dense layer."""
        return self.layer.output_shape(input_shape)

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Dealt]:
        """The formula above."""
        y = scope.empty("y", (len(x), self.layer.units), x.dtype)
        return dense.affine(x, params["weight"], params["bias"], out=y, rectify=True), _Dealt(x, y)

    def backward(self, params: Params, saved: _Dealt, dy: Array, scope: Scope, need_input: bool = True) -> Array | None:
        """dy goes through the ReLU first: weight and input gradients both take what comes through."""
        scope.check()
        dz = scope.over("dz", dy)
        positive = scope.empty("positive", dy.shape, np.dtype(np.bool_))
        dense.rectifier_backward(saved.y, dy, out=dz, positive=positive)
        return super().backward(params, saved, dz, scope, need_input)

    def backward_input(self, params: Params, saved: _Dealt, dy: Array, scope: Scope) -> Array:
        """That of the dense layer."""
        return self.layer.backward_input(params, saved.x, dy, scope)

    def backward_params(self, params: Params, saved: _Dealt, dy: Array, scope: Scope) -> None:
        """That of the dense layer."""
        self.layer.backward_params(params, saved.x, dy, scope)
