"""Non-linearities: element by element, and softmax over the last axis."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn.kernels import activations
from asynctrain.nn.layers.base import Layer, register_layer
from asynctrain.nn.scope import Scope
from asynctrain.types import Params


class _SameShape(Layer):
    """A layer whose y has the shape of x, which may be any."""

    def output_shape(self, input_shape: Shape) -> Shape:
        """Unchanged."""
        return input_shape


def _scratch(name: str, x: Array, scope: Scope, rows: int = 1) -> Array:
    """Return scratch of one block, or several in rows, in x's dtype."""
    size = activations.block_size(x)
    return scope.empty(name, (rows, size) if rows > 1 else (size,), x.dtype)


def _positive(dy: Array, scope: Scope) -> Array:
    return scope.empty("positive", (activations.block_size(dy),), np.dtype(np.bool_))


@register_layer("relu")
@dataclass(frozen=True)
class ReLU(_SameShape):
    """y = max(x, 0), element by element, of any shape; dx = dy [x > 0]."""

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array]:
        """y = max(x, 0)."""
        y = scope.kernels.relu(x, out=scope.over("y", x))
        return y, y

    def backward_input(self, params: Params, saved: Array, dy: Array, scope: Scope) -> Array:
        """dx = dy [y > 0]."""
        return scope.kernels.relu_backward(saved, dy, out=scope.over("dx", dy), positive=_positive(dy, scope))


@register_layer("leaky_relu")
@dataclass(frozen=True)
class LeakyReLU(_SameShape):
    """y = x where x > 0, else slope x (Maas et al. 2013).

    Args:
        slope: from 0 to 1; also the derivative at 0.
    """

    slope: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.slope <= 1:
            raise ValueError(f"leaky_relu: slope must be at least 0 and at most 1, got {self.slope}")

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array]:
        """y = max(x, slope x)."""
        return activations.leaky_relu(x, self.slope, out=scope.empty("y", x.shape, x.dtype)), x

    def backward_input(self, params: Params, saved: Array, dy: Array, scope: Scope) -> Array:
        """dx = dy where x > 0, else slope dy."""
        dx = scope.empty("dx", dy.shape, dy.dtype)
        return activations.leaky_relu_backward(saved, dy, self.slope, out=dx, positive=_positive(dy, scope))


@register_layer("elu")
@dataclass(frozen=True)
class ELU(_SameShape):
    """y = x where x > 0, else alpha (exp(x) - 1) (Clevert et al. 2016, arXiv:1511.07289).

    Args:
        alpha: above 0; -alpha is what y goes to far below 0.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"elu: alpha must be above 0, got {self.alpha}")

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array]:
        """The formula above."""
        y = scope.empty("y", x.shape, x.dtype)
        return activations.elu(x, self.alpha, out=y, scratch=_scratch("scratch", x, scope)), y

    def backward_input(self, params: Params, saved: Array, dy: Array, scope: Scope) -> Array:
        """dx = dy where y > 0, else dy (y + alpha)."""
        dx = scope.empty("dx", dy.shape, dy.dtype)
        return activations.elu_backward(saved, dy, self.alpha, out=dx, positive=_positive(dy, scope))


@register_layer("sigmoid")
@dataclass(frozen=True)
class Sigmoid(_SameShape):
    """y = 1 / (1 + exp(-x)), which no x makes overflow."""

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array]:
        """The formula above."""
        y = scope.empty("y", x.shape, x.dtype)
        return activations.sigmoid(x, out=y, scratch=_scratch("scratch", x, scope)), y

    def backward_input(self, params: Params, saved: Array, dy: Array, scope: Scope) -> Array:
        """dx = dy y (1 - y)."""
        return activations.sigmoid_backward(saved, dy, out=scope.empty("dx", dy.shape, dy.dtype))


@register_layer("tanh")
@dataclass(frozen=True)
class Tanh(_SameShape):
    """y = tanh(x)."""

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array]:
        """The formula above."""
        y = activations.tanh(x, out=scope.empty("y", x.shape, x.dtype))
        return y, y

    def backward_input(self, params: Params, saved: Array, dy: Array, scope: Scope) -> Array:
        """dx = dy (1 - y^2)."""
        return activations.tanh_backward(saved, dy, out=scope.empty("dx", dy.shape, dy.dtype))


class _Opened(NamedTuple):
    """What a gated layer saves: its input, and the gate, which is the share of it that comes through."""

    x: Array
    gate: Array


class _Gated(_SameShape):
    """y = x g(x), and so dx = dy (g + x g'); the gate g is the subclass's."""

    def activations(self, input_shape: Shape) -> int:
        """y and the gate."""
        return 2 * prod(input_shape)

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Opened]:
        """y = x g(x)."""
        gate = self._gate(x, scope, scope.empty("gate", x.shape, x.dtype))
        return activations.gated(x, gate, out=scope.empty("y", x.shape, x.dtype)), _Opened(x, gate)

    def backward_input(self, params: Params, saved: _Opened, dy: Array, scope: Scope) -> Array:
        """dx = dy (g + x g')."""
        dx = scope.empty("dx", dy.shape, dy.dtype)
        slope = self._slope(saved, scope, dx)
        return activations.gated_backward(saved.x, saved.gate, slope, dy, out=dx)

    def _gate(self, x: Array, scope: Scope, out: Array) -> Array:
        """Write g(x) into ``out`` and return it."""
        raise NotImplementedError

    def _slope(self, saved: _Opened, scope: Scope, out: Array) -> Array:
        """Write g'(x) into ``out`` and return it."""
        raise NotImplementedError


@register_layer("silu")
@dataclass(frozen=True)
class SiLU(_Gated):
    """y = x / (1 + exp(-x)), also called swish (Elfwing et al. 2018, arXiv:1702.03118)."""

    def _gate(self, x: Array, scope: Scope, out: Array) -> Array:
        return activations.sigmoid(x, out=out, scratch=_scratch("scratch", x, scope))

    def _slope(self, saved: _Opened, scope: Scope, out: Array) -> Array:
        return activations.sigmoid_slope(saved.gate, out=out)


@register_layer("gelu")
@dataclass(frozen=True)
class GELU(_Gated):
    """y = x P(X <= x), X standard normal (Hendrycks and Gimpel 2016, arXiv:1606.08415).

    Args:
        approximate: ``"none"``: the normal distribution to the last digits of the dtype; ``"tanh"``: the paper's
            (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 in its place, which is off by up to 5e-4 and cheaper.
    """

    approximate: Literal["none", "tanh"] = "none"

    def __post_init__(self) -> None:
        if self.approximate not in ("none", "tanh"):
            raise ValueError(f"gelu: approximate must be 'none' or 'tanh', got {self.approximate!r}")

    def _gate(self, x: Array, scope: Scope, out: Array) -> Array:
        if self.approximate == "tanh":
            return activations.tanh_gate(x, out=out)
        return activations.normal_cdf(x, out=out, scratch=_scratch("scratch", x, scope, rows=3))

    def _slope(self, saved: _Opened, scope: Scope, out: Array) -> Array:
        if self.approximate == "tanh":
            scratch = _scratch("scratch", saved.x, scope)
            return activations.tanh_gate_slope(saved.x, saved.gate, out=out, scratch=scratch)
        return activations.normal_density(saved.x, out=out)


@register_layer("softmax")
@dataclass(frozen=True)
class Softmax(_SameShape):
    """y_k = exp(x_k) / sum_j exp(x_j), over the last axis.

    The losses take logits: a classifier needs no softmax of its own.
    """

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array]:
        """The formula above, the largest x_j taken off all of them first."""
        y = activations.softmax(x, out=scope.empty("y", x.shape, x.dtype))
        return y, y

    def backward_input(self, params: Params, saved: Array, dy: Array, scope: Scope) -> Array:
        """dx = y (dy - sum_j y_j dy_j)."""
        return activations.softmax_backward(saved, dy, out=scope.empty("dx", dy.shape, dy.dtype))


@register_layer("log_softmax")
@dataclass(frozen=True)
class LogSoftmax(_SameShape):
    """y_k = x_k - log sum_j exp(x_j), over the last axis."""

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array]:
        """The formula above, the largest x_j taken off all of them first."""
        y = activations.log_softmax(x, out=scope.empty("y", x.shape, x.dtype))
        return y, y

    def backward_input(self, params: Params, saved: Array, dy: Array, scope: Scope) -> Array:
        """dx = dy - exp(y) sum_j dy_j."""
        return activations.log_softmax_backward(saved, dy, out=scope.empty("dx", dy.shape, dy.dtype))
