"""Maximum over windows, and its derivative."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from asynctrain.arena import Array


def _taps(x: Array, y: Array, size: int, stride: int) -> Iterator[Array]:
    """Yield, for each place of a window in row order, the view of ``x`` with that place's element of every window."""
    height, width = y.shape[1] * stride, y.shape[2] * stride
    for i, j in product(range(size), range(size)):
        yield x[:, i : i + height : stride, j : j + width : stride]


def max_pool(x: Array, size: int, stride: int, *, out: Array) -> Array:
    """Write y[n, h, w, c] = max_ij x[n, h stride + i, w stride + j, c], i and j below ``size``, and return it.

    x: (N, H, W, C). out: (N, (H - size) // stride + 1, (W - size) // stride + 1, C).
    """
    taps = _taps(x, out, size, stride)
    np.copyto(out, next(taps))
    for tap in taps:
        np.maximum(out, tap, out=out)
    return out


def max_pool_backward(
    x: Array, y: Array, dy: Array, size: int, stride: int, *, out: Array, free: Array, hit: Array
) -> Array:
    """Write dx into ``out`` and return it: each window's dy goes to its maximum, on ties to the first in row order.

    x and out: (N, H, W, C). y and dy: as ``max_pool`` made them. free and hit: bool scratch in the shape of y.
    """
    out.fill(0)
    free.fill(True)
    for tap, dx in zip(_taps(x, y, size, stride), _taps(out, y, size, stride), strict=True):
        np.equal(tap, y, out=hit)
        np.logical_and(hit, free, out=hit)
        np.not_equal(free, hit, out=free)
        if stride >= size:
            np.multiply(dy, hit, out=dx)
        else:
            np.add(dx, dy, out=dx, where=hit)
    return out
