"""Runs of layers that one kernel does better together, and how a ``Sequential`` comes to do so.

It is a matter of execution alone: layers, their names, parameters and JSON stay as they are. What is fused is a fixed
rule of the layers and of their input's shape, the same on every home.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn.kernels import conv, pooled
from asynctrain.nn.layers.activation import LeakyReLU, ReLU
from asynctrain.nn.layers.base import Layer
from asynctrain.nn.layers.convolution import Conv2D
from asynctrain.nn.layers.pooling import MaxPool2D
from asynctrain.nn.scope import Scope
from asynctrain.types import Params

NamedLayer = tuple[str, Layer]


def fused(children: Mapping[str, Layer], input_shape: Shape) -> Iterator[NamedLayer]:
    """Yield what does the work of ``children``, one after the other, for an input of ``input_shape``.

    Where it pays, a convolution and the max pooling behind it are one. An activation between the two then comes after
    both, for a quarter of the outputs: it must not fall, as the maximum of what it gives is then what it gives for the
    maximum. What stands for several children has the name, and so the parameters and buffers, of the first.
    """
    left = list(children.items())
    while left:
        (name, layer), *left = left
        between = left[:1] if left and type(left[0][1]) in (ReLU, LeakyReLU) else []
        pool = left[len(between)][1] if len(left) > len(between) else None
        if type(layer) is Conv2D and type(pool) is MaxPool2D and _pays(layer, pool, input_shape):  # not of a subclass
            layer = PooledConv2D(layer, pool)
            left = [*between, *left[len(between) + 1 :]]
        yield name, layer
        input_shape = layer.output_shape(input_shape)


def _pays(layer: Conv2D, pool: MaxPool2D, input_shape: Shape) -> bool:
    """Return whether ``PooledConv2D`` can do the work of both, and is faster."""
    plain = conv.Geometry(layer.geometry.window)
    window = pool.window(layer.output_shape(input_shape))
    apart = all(span.stride == span.size and span.dilation == 1 and not (span.before or span.after) for span in window)
    return layer.geometry == plain and apart and pooled.pays(_plan(layer, pool, (1, *input_shape)))


def _plan(layer: Conv2D, pool: MaxPool2D, shape: Shape) -> pooled.Plan:
    """Return the kernel's shapes for images of ``shape`` (N, H, W, C)."""
    high, wide = pool.window(layer.output_shape(shape[1:]))
    maxima = high.windows, wide.windows
    return pooled.Plan(shape[0], shape[3], layer.filters, layer.geometry.window, (high.size, wide.size), maxima)


class _Seen(NamedTuple):
    """What a pooled convolution saves."""

    plan: pooled.Plan
    shape: Shape  # of the image itself
    planes: Array
    matrix: Array
    slices: Array
    top: Array


@dataclass(frozen=True)
class PooledConv2D(Layer):
    """y = max over windows of the convolution of x: a ``Conv2D`` of stride 1 and a ``MaxPool2D`` of its size as stride.

    It is no layer that a model is made of, but what a ``Sequential`` computes with; see ``fused``.

    Args:
        layer: the convolution, whose parameters it has.
        pool: the max pooling.
    """

    layer: Conv2D
    pool: MaxPool2D

    def output_shape(self, input_shape: Shape) -> Shape:
        """That of the two, one after the other."""
        return self.pool.output_shape(self.layer.output_shape(input_shape))

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Seen]:
        """y[h, w, f] = b[f] + max_ij (x * W)[h p + i, w q + j, f]."""
        plan = _plan(self.layer, self.pool, x.shape)
        planes = scope.empty("planes", plan.planes, x.dtype)
        conv.place(x, self._corner(x.shape), (1, 1), out=planes.transpose(3, 0, 1, 2))
        matrix = pooled.spread_weight(params["weight"], plan, out=scope.empty("matrix", plan.matrix, x.dtype))
        slices = scope.empty("slices", plan.slices, x.dtype)
        top = scope.empty("top", plan.top, x.dtype)
        y = pooled.correlate(
            planes,
            matrix,
            plan,
            out=scope.empty("y", (len(x), *plan.maxima, plan.filters), x.dtype),
            slices=slices,
            top=top,
            columns=scope.empty("columns", (plan.columns(x.itemsize),), x.dtype),
            bias=params["bias"] if self.layer.use_bias else None,
        )
        return y, _Seen(plan, x.shape, planes, matrix, slices, top)

    def backward(self, params: Params, saved: _Seen, dy: Array, scope: Scope, need_input: bool = True) -> Array | None:
        """Each dy goes to its maximum first: weight and input gradients both come from there."""
        scope.check()
        pooled.spread_maxima(
            saved.slices,
            saved.top,
            dy,
            saved.plan,
            rest=scope.empty("rest", saved.top.shape, dy.dtype),
            hit=scope.empty("hit", saved.top.shape, np.dtype(np.bool_)),
        )
        return super().backward(params, saved, dy, scope, need_input)

    def backward_input(self, params: Params, saved: _Seen, dy: Array, scope: Scope) -> Array:
        """That of the convolution, for the gradient of its outputs."""
        plan = saved.plan
        columns = scope.empty("columns_of_dx", (plan.columns(dy.itemsize),), dy.dtype)
        dplanes = scope.empty("dplanes", plan.planes, dy.dtype)
        pooled.correlate_backward_input(saved.matrix, saved.slices, plan, out=dplanes, columns=columns)
        top, left = self._corner(saved.shape)
        dx = scope.empty("dx", saved.shape, dy.dtype)
        return conv.place(dplanes.transpose(3, 0, 1, 2), (-top, -left), (1, 1), out=dx)

    def backward_params(self, params: Params, saved: _Seen, dy: Array, scope: Scope) -> None:
        """That of the convolution, for the gradient of its outputs; the bias is added to the maxima alone."""
        plan = saved.plan
        transposed = plan.matrix[::-1]
        dmatrix = pooled.correlate_backward_params(
            saved.planes,
            saved.slices,
            plan,
            out=scope.empty("dmatrix", transposed, dy.dtype),
            partial=scope.empty("partial", transposed, dy.dtype),
            columns=scope.empty("columns", (plan.columns(dy.itemsize),), dy.dtype),
        )
        pooled.gather_weight(dmatrix.T, plan, out=scope.gradient("weight"))
        if self.layer.use_bias:
            ones = scope.empty("ones", (dy.size // plan.filters,), dy.dtype)
            conv.bias_backward(dy, out=scope.gradient("bias"), ones=ones)

    def _corner(self, shape: Shape) -> conv.Pair:
        """Return how many rows and columns of padding come before an image of ``shape`` (N, H, W, C)."""
        return self.layer.margins(shape[1], 0)[0], self.layer.margins(shape[2], 1)[0]
