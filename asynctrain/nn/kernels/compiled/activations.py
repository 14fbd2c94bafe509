"""The rectifier and its derivative, each in one pass over memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from asynctrain.arena import Array
from asynctrain.nn.kernels.compiled.jit import compiled


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
    zero = dy.dtype.type(0)
    for i in range(y.size):
        dx[i] = dy[i] if y[i] > zero else zero


def warm_up(dtype: np.dtype[Any]) -> None:
    """Compile the kernels for arrays of ``dtype``."""
    x = np.zeros(1, dtype)
    relu(x, out=x)
    relu_backward(x, x, out=x, positive=x)
