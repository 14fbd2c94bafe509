"""The affine map of vectors, with a ReLU behind it or without, and its two derivatives."""

from __future__ import annotations

import numpy as np

from asynctrain.arena import Array


def affine(x: Array, weight: Array, bias: Array, *, out: Array, rectify: bool = False) -> Array:
    """Write y = x W + b, or max(x W + b, 0), into ``out`` (N, O) and return it; x (N, I), weight (I, O), bias (O,)."""
    np.matmul(x, weight, out=out)
    np.add(out, bias, out=out)
    return np.maximum(out, 0, out=out) if rectify else out


def rectifier_backward(y: Array, dy: Array, *, out: Array, positive: Array) -> Array:
    """Write dy [y > 0] into ``out`` and return it; ``positive`` is bool scratch in the shape of y."""
    return np.multiply(dy, np.greater(y, 0, out=positive), out=out)


def affine_backward_input(weight: Array, dy: Array, *, out: Array) -> Array:
    """Write dx = dy W^T into ``out`` (N, I) and return it."""
    return np.matmul(dy, weight.T, out=out)


def affine_backward_params(x: Array, dy: Array, *, out_weight: Array, out_bias: Array) -> None:
    """Write dW = x^T dy (I, O) and db = sum_n dy_n (O,)."""
    np.matmul(x.T, dy, out=out_weight)
    np.add.reduce(dy, axis=0, out=out_bias)
