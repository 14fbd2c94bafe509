"""The affine map of vectors, and its two derivatives."""

from __future__ import annotations

import numpy as np

from asynctrain.arena import Array


def affine(x: Array, weight: Array, bias: Array, *, out: Array) -> Array:
    """Write y = x W + b into ``out`` (N, O) and return it; x (N, I), weight (I, O), bias (O,)."""
    np.matmul(x, weight, out=out)
    return np.add(out, bias, out=out)


def affine_backward_input(weight: Array, dy: Array, *, out: Array) -> Array:
    """Write dx = dy W^T into ``out`` (N, I) and return it."""
    return np.matmul(dy, weight.T, out=out)


def affine_backward_params(x: Array, dy: Array, *, out_weight: Array, out_bias: Array) -> None:
    """Write dW = x^T dy (I, O) and db = sum_n dy_n (O,)."""
    np.matmul(x.T, dy, out=out_weight)
    np.sum(dy, axis=0, out=out_bias)
