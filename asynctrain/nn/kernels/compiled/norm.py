"""Batch normalisation: moments, the affine map, and its derivative, each in one pass over memory.

Arrays are (R, C). The kernels lay rows side by side where channels are few, so that the loops over them are long, and
add float32 rows of one block only, which are then added up in float64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from asynctrain.arena import Array
from asynctrain.nn.kernels.compiled.jit import compiled

WIDE = 256  # elements in rows that are side by side, at most
BLOCK = 64  # such rows in a block, which stays in the first-level cache


@lru_cache(maxsize=256)
def _side_by_side(rows: int, channels: int) -> int:
    """Return how many rows are laid side by side: the largest divisor of ``rows`` that gives at most ``WIDE``."""
    return next(width for width in range(max(1, WIDE // channels), 0, -1) if rows % width == 0)


def _wide(*arrays: Array) -> list[Array]:
    """Return the arrays (R, C) as views (R / w, w C)."""
    rows, channels = arrays[0].shape
    length = _side_by_side(rows, channels) * channels
    return [array.reshape(-1, length) for array in arrays]


def _repeated(coefficients: Array, like: Array) -> Array:
    """Return float64 coefficients (C,) for rows (R, C) that are laid side by side, in the dtype of ``like``."""
    return np.tile(coefficients.astype(like.dtype), _side_by_side(*like.shape))


def moments(x: Array, *, scratch: Array) -> tuple[Array, Array]:
    """Return the mean and the (biased) variance of each column of ``x`` (R, C), float64; ``scratch`` is not used.

    As numpy's kernel does it: each block is centred before it is squared, and M2 = sum_b M2_b + n_b (m_b - m)^2.
    """
    rows, channels = x.shape
    (wide,) = _wide(x)
    blocks, length = -(-len(wide) // BLOCK), wide.shape[1]
    means, squares, row = np.empty((blocks, length)), np.empty((blocks, length)), np.empty((3, length), x.dtype)
    _moments(wide, means, squares, row)
    counts = np.full((blocks, 1), BLOCK)
    counts[-1] = len(wide) - (blocks - 1) * BLOCK
    counts = np.repeat(counts, length // channels, axis=0)
    means = means.reshape(-1, channels)
    mean = (counts * means).sum(axis=0) / rows
    spread = (counts * np.square(means - mean)).sum(axis=0)
    return mean, (squares.reshape(-1, channels).sum(axis=0) + spread) / rows


@compiled
def _moments(x: Array, means: Array, squares: Array, row: Array) -> None:
    """Write each block's mean, and the sum of squares around it, of every column; ``row`` is scratch (3, columns).

    The block is centred by its mean as float32 has it; what that is off by is put right afterwards.
    """
    shift, total, square = row[0], row[1], row[2]
    for block in range(len(means)):
        start = block * BLOCK
        end = min(len(x), start + BLOCK)
        row[:] = 0
        for r in range(start, end):
            for c in range(x.shape[1]):
                shift[c] += x[r, c]
        for c in range(x.shape[1]):
            shift[c] /= end - start
        for r in range(start, end):
            for c in range(x.shape[1]):
                centred = x[r, c] - shift[c]
                total[c] += centred
                square[c] += centred * centred
        for c in range(x.shape[1]):
            rest = np.float64(total[c]) / (end - start)
            means[block, c] = shift[c] + rest
            squares[block, c] = square[c] - total[c] * rest


def affine(x: Array, factor: Array, offset: Array, *, out: Array) -> Array:
    """Write y = x factor + offset into ``out`` (R, C) and return it; the coefficients are (C,)."""
    wide_x, wide_out = _wide(x, out)
    _affine(wide_x, _repeated(factor, x), _repeated(offset, x), wide_out)
    return out


@compiled
def _affine(x: Array, factor: Array, offset: Array, y: Array) -> None:
    for r in range(len(x)):
        for c in range(x.shape[1]):
            y[r, c] = x[r, c] * factor[c] + offset[c]


def affine_relu(x: Array, factor: Array, offset: Array, *, out: Array) -> Array:
    """Write y = max(x factor + offset, 0) into ``out`` (R, C) and return it; the coefficients are (C,)."""
    wide_x, wide_out = _wide(x, out)
    _affine_relu(wide_x, _repeated(factor, x), _repeated(offset, x), wide_out)
    return out


@compiled
def _affine_relu(x: Array, factor: Array, offset: Array, y: Array) -> None:
    zero = x.dtype.type(0)
    for r in range(len(x)):
        for c in range(x.shape[1]):
            value = x[r, c] * factor[c] + offset[c]
            y[r, c] = zero if value < zero else value  # noqa: FURB136 - max would lose a NaN


def relu_sums(x: Array, y: Array, dy: Array, *, out: Array, positive: Array) -> tuple[Array, Array]:
    """Write g = dy [y > 0] into ``out``, which may be dy, and return sum_r g[r] and sum_r g[r] x[r], (C,) float64.

    All arrays are (R, C); ``positive`` is not used.
    """
    channels = x.shape[1]
    wide_x, wide_y, wide_dy, wide_out = _wide(x, y, dy, out)
    totals, block = np.zeros((2, wide_x.shape[1])), np.empty((3, wide_x.shape[1]), x.dtype)
    _relu_sums(wide_x, wide_y, wide_dy, wide_out, totals, block)
    plain, products = totals.reshape(2, -1, channels).sum(axis=1)
    return plain, products


@compiled
def _relu_sums(x: Array, y: Array, dy: Array, g: Array, totals: Array, block: Array) -> None:
    """Write g and add to ``totals`` (2, columns); ``block`` is scratch (3, columns).

    A row of g is made in scratch: the compiler makes vectors only of loops that do not write what they read.
    """
    plain, products, row = block[0], block[1], block[2]
    zero = x.dtype.type(0)
    for start in range(0, len(x), BLOCK):
        block[:] = 0
        for r in range(start, min(len(x), start + BLOCK)):
            for c in range(x.shape[1]):
                row[c] = dy[r, c] if y[r, c] > zero else zero
            for c in range(x.shape[1]):
                g[r, c] = row[c]
                plain[c] += row[c]
                products[c] += row[c] * x[r, c]
        for c in range(x.shape[1]):
            totals[0, c] += plain[c]
            totals[1, c] += products[c]


def sums(x: Array, dy: Array) -> tuple[Array, Array]:
    """Return sum_r dy[r] and sum_r dy[r] x[r] of arrays (R, C), each (C,) float64."""
    channels = x.shape[1]
    wide_x, wide_dy = _wide(x, dy)
    totals, block = np.zeros((2, wide_x.shape[1])), np.empty((2, wide_x.shape[1]), x.dtype)
    _sums(wide_x, wide_dy, totals, block)
    plain, products = totals.reshape(2, -1, channels).sum(axis=1)
    return plain, products


@compiled
def _sums(x: Array, dy: Array, totals: Array, block: Array) -> None:
    """Add to ``totals`` (2, columns); ``block`` is scratch in that shape."""
    plain, products = block[0], block[1]
    for start in range(0, len(x), BLOCK):
        block[:] = 0
        for r in range(start, min(len(x), start + BLOCK)):
            for c in range(x.shape[1]):
                plain[c] += dy[r, c]
                products[c] += dy[r, c] * x[r, c]
        for c in range(x.shape[1]):
            totals[0, c] += plain[c]
            totals[1, c] += products[c]


def combination(x: Array, dy: Array, of_x: Array, of_dy: Array, offset: Array, *, out: Array, scratch: Array) -> Array:
    """Write dx = of_x x + of_dy dy + offset into ``out`` (R, C) and return it; the coefficients are (C,).

    ``scratch`` is not used.
    """
    wide_x, wide_dy, wide_out = _wide(x, dy, out)
    _combination(wide_x, wide_dy, _repeated(of_x, x), _repeated(of_dy, x), _repeated(offset, x), wide_out)
    return out


@compiled
def _combination(x: Array, dy: Array, of_x: Array, of_dy: Array, offset: Array, dx: Array) -> None:
    row = np.empty_like(of_x)  # as above: dx may be dy
    for r in range(len(x)):
        for c in range(x.shape[1]):
            row[c] = of_x[c] * x[r, c] + (of_dy[c] * dy[r, c] + offset[c])
        for c in range(x.shape[1]):
            dx[r, c] = row[c]


def warm_up(dtype: np.dtype[Any]) -> None:
    """Compile the kernels for arrays of ``dtype``."""
    x, c = np.zeros((1, 1), dtype), np.zeros(1)
    moments(x, scratch=x)
    affine(x, c, c, out=x)
    affine_relu(x, c, c, out=x)
    sums(x, x)
    relu_sums(x, x, x, out=x, positive=x)
    combination(x, x, c, c, c, out=x, scratch=x)
