"""Element-wise non-linearities, each with its derivative below it, and softmax.

Those of several operations take them in blocks of ``BLOCK`` elements, which stay in cache from one to the next.
Arguments called ``out`` are C-contiguous; ``scratch`` and ``positive`` have ``block_size(x)`` elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import pi, sqrt
from typing import Any

import numpy as np

from asynctrain.arena import Array

BLOCK = 2**16  # elements: 256 KiB of float32


def block_size(x: Array) -> int:
    """Return the elements of scratch that the kernels want for x."""
    return min(x.size, BLOCK)


def _blocks(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Yield the arrays, all of one size, block by block, as flat views."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, BLOCK):
        yield tuple(array[start : start + BLOCK] for array in flat)


def relu(x: Array, *, out: Array) -> Array:
    """Write y = max(x, 0) into ``out``, which may be x, and return it."""
    zeros = np.zeros(block_size(x), x.dtype)  # with one number for all it takes twice as long
    for value, target in _blocks(x, out):
        np.maximum(value, zeros[: value.size], out=target)
    return out


def relu_backward(y: Array, dy: Array, *, out: Array, positive: Array) -> Array:
    """Write dx = dy [y > 0] into ``out``, which may be dy, and return it; at 0 the derivative is taken to be 0.

    ``positive`` is bool scratch.
    """
    for value, gradient, target in _blocks(y, dy, out):
        np.multiply(gradient, np.greater(value, 0, out=positive[: value.size]), out=target)
    return out


def leaky_relu(x: Array, slope: float, *, out: Array) -> Array:
    """Write y = max(x, slope x), the slope from 0 to 1, into ``out`` and return it."""
    for value, target in _blocks(x, out):
        np.multiply(value, slope, out=target)
        np.maximum(value, target, out=target)
    return out


def leaky_relu_backward(x: Array, dy: Array, slope: float, *, out: Array, positive: Array) -> Array:
    """Write dx = dy max([x > 0], slope) into ``out`` and return it; ``positive`` is bool scratch."""
    for value, gradient, target in _blocks(x, dy, out):
        np.copyto(target, np.greater(value, 0, out=positive[: value.size]))
        np.maximum(target, slope, out=target)
        np.multiply(target, gradient, out=target)
    return out


def elu(x: Array, alpha: float, *, out: Array, scratch: Array) -> Array:
    """Write y = max(x, 0) + alpha (exp(min(x, 0)) - 1) into ``out`` and return it."""
    for value, target in _blocks(x, out):
        below = np.minimum(value, 0, out=scratch[: value.size])
        np.expm1(below, out=below)
        np.multiply(below, alpha, out=below)
        np.maximum(value, 0, out=target)
        np.add(target, below, out=target)
    return out


def elu_backward(y: Array, dy: Array, alpha: float, *, out: Array, positive: Array) -> Array:
    """Write dx = dy where y > 0, else dy (y + alpha), into ``out`` and return it; ``positive`` is bool scratch."""
    for value, gradient, target in _blocks(y, dy, out):
        np.add(value, alpha, out=target)
        np.copyto(target, 1, where=np.greater(value, 0, out=positive[: value.size]))
        np.multiply(target, gradient, out=target)
    return out


def sigmoid(x: Array, *, out: Array, scratch: Array) -> Array:
    """Write y = 1 / (1 + exp(-x)) into ``out`` and return it.

    As exp(min(x, 0)) / (1 + exp(-|x|)) no exponential overflows, and none of a small y's digits are lost.
    """
    for value, target in _blocks(x, out):
        below = np.absolute(value, out=scratch[: value.size])
        np.negative(below, out=below)
        np.exp(below, out=below)
        np.add(below, 1, out=below)
        np.minimum(value, 0, out=target)
        np.exp(target, out=target)
        np.divide(target, below, out=target)
    return out


def sigmoid_backward(y: Array, dy: Array, *, out: Array) -> Array:
    """Write dx = dy y (1 - y) into ``out`` and return it."""
    for value, gradient, target in _blocks(y, dy, out):
        np.subtract(1, value, out=target)
        np.multiply(target, value, out=target)
        np.multiply(target, gradient, out=target)
    return out


def tanh(x: Array, *, out: Array) -> Array:
    """Write y = tanh(x) into ``out`` and return it."""
    return np.tanh(x, out=out)


def tanh_backward(y: Array, dy: Array, *, out: Array) -> Array:
    """Write dx = dy (1 - y^2) into ``out`` and return it."""
    for value, gradient, target in _blocks(y, dy, out):
        np.multiply(value, value, out=target)
        np.subtract(1, target, out=target)
        np.multiply(target, gradient, out=target)
    return out


def gated(x: Array, gate: Array, *, out: Array) -> Array:
    """Write y = x g(x) into ``out`` and return it; ``gate`` is g(x)."""
    return np.multiply(x, gate, out=out)


def gated_backward(x: Array, gate: Array, slope: Array, dy: Array, *, out: Array) -> Array:
    """Write dx = dy (g + x g') into ``out`` and return it; ``slope``, which may be ``out``, is g'."""
    for value, opened, steep, gradient, target in _blocks(x, gate, slope, dy, out):
        np.multiply(value, steep, out=target)
        np.add(target, opened, out=target)
        np.multiply(target, gradient, out=target)
    return out


def sigmoid_slope(gate: Array, *, out: Array) -> Array:
    """Write g' = g (1 - g) of the sigmoid g into ``out`` and return it."""
    for opened, target in _blocks(gate, out):
        np.subtract(1, opened, out=target)
        np.multiply(target, opened, out=target)
    return out


# (1 + 2 z) exp(z^2) erfc(z) = sum_k a_k T_k((z - 3.75) / (z + 3.75)) for z >= 0, the T_k Chebyshev's polynomials: the
# expansion of Shepherd and Laframboise (Mathematics of Computation 36, 1981). Left out after a_24, it is good to 5e-18,
# after a_12 to 6e-9.
_CHEBYSHEV = (
    1.1775789345674018,
    -0.0045900545806464773,
    -0.084249133366517916,
    0.05920993999819189,
    -0.026658668435305752,
    0.0090749976707052651,
    -0.0024131635404176082,
    0.00049077583652580863,
    -6.9169733025012064e-5,
    4.1390279860730102e-6,
    7.7403830661984907e-7,
    -2.1886401049234396e-7,
    1.076499946567091e-8,
    4.5219598112182869e-9,
    -7.7544002088313511e-10,
    -6.3180883408866845e-11,
    2.8687950109306699e-11,
    1.9455868545777347e-13,
    -9.6546967484334389e-13,
    3.2525481481487398e-14,
    3.3478119482868054e-14,
    -1.8645628804193131e-15,
    -1.2507950530688647e-15,
    7.4182352566240435e-17,
    5.0681489047961113e-17,
)
_KNEE = 3.75
_FAR = 50  # standard deviations: beyond, the tail is 0 in both dtypes, and a square might overflow


@cache
def _polynomial(dtype: np.dtype[Any]) -> Array:
    from numpy.polynomial.chebyshev import cheb2poly

    coefficients: Array = cheb2poly(_CHEBYSHEV[:13] if dtype == np.float32 else _CHEBYSHEV).astype(dtype)
    return coefficients


def normal_cdf(x: Array, *, out: Array, scratch: Array) -> Array:
    """Write P(X <= x) of a standard normal X, which is erfc(-x / sqrt(2)) / 2, into ``out`` and return it.

    What is computed is the tail below -|x|, so that small values have a small relative error too: a few units in the
    last place, times x^2. ``scratch`` is (3, block_size(x)).
    """
    polynomial = _polynomial(x.dtype)
    for value, target in _blocks(x, out):
        size, t, tail = scratch[:, : value.size]
        np.absolute(value, out=size)  # sqrt(2) z
        np.minimum(size, _FAR, out=size)
        np.add(size, sqrt(2) * _KNEE, out=t)
        np.divide(-2 * sqrt(2) * _KNEE, t, out=t)
        np.add(t, 1, out=t)  # (z - knee) / (z + knee)
        _horner(polynomial, t, out=tail)
        np.multiply(size, size, out=t)
        np.multiply(t, -0.5, out=t)
        np.exp(t, out=t)
        np.multiply(tail, t, out=tail)
        np.multiply(size, 2 * sqrt(2), out=size)
        np.add(size, 2, out=size)  # 2 (1 + 2 z)
        np.divide(tail, size, out=tail)
        np.copysign(tail, value, out=tail)
        np.subtract(~np.signbit(value), tail, out=target, dtype=x.dtype)  # 1 - tail above 0, the tail below
    return out


def _horner(polynomial: Array, t: Array, *, out: Array) -> None:
    """Write sum_k polynomial[k] t^k into ``out``."""
    out.fill(polynomial[-1])
    for coefficient in polynomial[-2::-1]:
        np.multiply(out, t, out=out)
        np.add(out, coefficient, out=out)


def normal_density(x: Array, *, out: Array) -> Array:
    """Write exp(-x^2 / 2) / sqrt(2 pi), the derivative of ``normal_cdf``, into ``out`` and return it."""
    for value, target in _blocks(x, out):
        np.clip(value, -_FAR, _FAR, out=target)
        np.multiply(target, target, out=target)
        np.multiply(target, -0.5, out=target)
        np.exp(target, out=target)
        np.multiply(target, 1 / sqrt(2 * pi), out=target)
    return out


_CUBIC = 0.044715


def tanh_gate(x: Array, *, out: Array) -> Array:
    """Write g = (1 + tanh(u)) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3), into ``out`` and return it."""
    for value, target in _blocks(x, out):
        np.clip(value, -20, 20, out=target)  # beyond, tanh is 1 or -1
        np.multiply(target, target, out=target)
        np.multiply(target, _CUBIC, out=target)
        np.add(target, 1, out=target)
        np.multiply(target, value, out=target)
        np.multiply(target, sqrt(2 / pi), out=target)
        np.tanh(target, out=target)
        np.add(target, 1, out=target)
        np.multiply(target, 0.5, out=target)
    return out


def tanh_gate_slope(x: Array, gate: Array, *, out: Array, scratch: Array) -> Array:
    """Write g' = 2 g (1 - g) sqrt(2 / pi) (1 + 3 0.044715 x^2) into ``out`` and return it."""
    for value, opened, target in _blocks(x, gate, out):
        rise = np.clip(value, -20, 20, out=scratch[: value.size])
        np.multiply(rise, rise, out=rise)
        np.multiply(rise, 3 * _CUBIC, out=rise)
        np.add(rise, 1, out=rise)
        np.multiply(rise, 2 * sqrt(2 / pi), out=rise)
        np.subtract(1, opened, out=target)
        np.multiply(target, opened, out=target)
        np.multiply(target, rise, out=target)
    return out


def softmax(logits: Array, *, out: Array | None = None) -> Array:
    """Return exp(z_k) / sum_j exp(z_j) of the last axis of ``logits`` z, stably, in the same dtype.

    It is written into ``out`` if that is given, else it is a new array.
    """
    exponentials: Array = np.subtract(logits, logits.max(axis=-1, keepdims=True), out=out)
    np.exp(exponentials, out=exponentials)
    exponentials /= exponentials.sum(axis=-1, keepdims=True)
    return exponentials


def softmax_backward(y: Array, dy: Array, *, out: Array) -> Array:
    """Write dx = y (dy - sum_j y_j dy_j), over the last axis, into ``out`` and return it."""
    shares = np.einsum("...c,...c->...", y, dy)
    np.subtract(dy, shares[..., np.newaxis], out=out)
    return np.multiply(y, out, out=out)


def log_softmax(logits: Array, *, out: Array) -> Array:
    """Write z_k - log sum_j exp(z_j) of the last axis of ``logits`` z, stably, into ``out`` and return it."""
    largest = logits.max(axis=-1, keepdims=True)
    np.subtract(logits, largest, out=out)
    sums = np.exp(out, out=out).sum(axis=-1, keepdims=True)
    np.subtract(logits, largest, out=out)
    np.subtract(out, np.log(sums), out=out)
    return out


def log_softmax_backward(y: Array, dy: Array, *, out: Array) -> Array:
    """Write dx = dy - exp(y) sum_j dy_j, over the last axis, into ``out`` and return it."""
    np.exp(y, out=out)
    np.multiply(out, dy.sum(axis=-1, keepdims=True), out=out)
    return np.subtract(dy, out, out=out)
