"""The rectifier and its derivative, each in one pass over memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from asynctrain.arena import Array
from asynctrain.nn.kernels.compiled.jit import compiled

PIECE = 1024  # elements, that stay in the first-level cache


def relu(x: Array, *, out: Array) -> Array:
    """Write y = max(x, 0) into ``out`` and return it; a NaN stays one."""
    _relu(x.reshape(-1), out.reshape(-1))
    return out


@compiled
def _relu(x: Array, y: Array) -> None:
    zero = x.dtype.type(0)
    for i in range(x.size):
        y[i] = zero if x[i] < zero else x[i]  # noqa: FURB136 - max would lose a NaN


def relu_backward(y: Array, dy: Array, *, out: Array, positive: Array) -> Array:
    """Write dx = dy [y > 0] into ``out`` and return it; ``positive`` is not used."""
    _relu_backward(y.reshape(-1), dy.reshape(-1), out.reshape(-1))
    return out


@compiled
def _relu_backward(y: Array, dy: Array, dx: Array) -> None:
    """In pieces, as dx may be dy: the compiler makes vectors only of loops that do not write what they read."""
    zero = dy.dtype.type(0)
    piece = np.empty(PIECE, dy.dtype)
    for start in range(0, y.size, PIECE):
        value, gradient, target = y[start : start + PIECE], dy[start : start + PIECE], dx[start : start + PIECE]
        for i in range(value.size):
            piece[i] = gradient[i] if value[i] > zero else zero
        for i in range(value.size):
            target[i] = piece[i]


def warm_up(dtype: np.dtype[Any]) -> None:
    """Compile the kernels for arrays of ``dtype``."""
    x = np.zeros(1, dtype)
    relu(x, out=x)
    relu_backward(x, x, out=x, positive=x)
