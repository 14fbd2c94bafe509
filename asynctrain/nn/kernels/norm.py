"""Normalisation over rows or along them: moments, the affine map, and its derivative, alone and with a rectifier.

A pass over a large array is bound by memory, and a broadcast of few channels by the overhead of each short row. So the
kernels look at x (R, C) in blocks, which stay in cache from one operation to the next, and within a block lay rows side
by side, about ``WIDE`` elements long; the channels' coefficients are repeated accordingly.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from asynctrain.arena import Array

TOGETHER = 2**18  # elements in the blocks of all arrays that a kernel works on: 1 MiB of float32
WIDE = 2**14  # elements; shorter ones than numpy's buffer of 2^13 are copied into it to be broadcast: twice the time
SUMMED = 2**10  # elements in the rows that are added up, so that there are many to a block


@lru_cache(maxsize=256)
def _side_by_side(rows: int, channels: int) -> int:
    """Return how many rows are laid side by side: the largest divisor of ``rows`` that gives at most ``WIDE``.

    Nor do they make more than an eighth of the array, as coefficients are repeated once for each.
    """
    most = min(WIDE, rows * channels // 8) // channels
    return next(width for width in range(max(1, most), 0, -1) if rows % width == 0)


@lru_cache(maxsize=256)
def _summed(rows: int, channels: int) -> int:
    """Return how many elements the rows have that are added up: part of those that are side by side."""
    width = _side_by_side(rows, channels)
    return channels * next(part for part in range(max(1, min(width, SUMMED // channels)), 0, -1) if width % part == 0)


def _rows_at_once(length: int, arrays: int) -> int:
    """Return how many rows of ``length`` elements are a block, where so many arrays share the cache."""
    rows: int = max(1, TOGETHER // arrays // length)
    return rows


def _blocks(*arrays: Array, scratch: int = 0) -> Iterator[tuple[Array, ...]]:
    """Yield the arrays, all (R, C), block by block, as views (r, w C); ``scratch`` blocks are to be in cache too."""
    rows, channels = arrays[0].shape
    length = _side_by_side(rows, channels) * channels
    wide = [array.reshape(-1, length) for array in arrays]
    step = _rows_at_once(length, len(arrays) + scratch)
    for start in range(0, len(wide[0]), step):
        yield tuple(array[start : start + step] for array in wide)


def _repeated(like: Array, *coefficients: Array | float) -> Array:
    """Return coefficients (C,), each for rows of ``like`` (R, C) that are laid side by side, in its dtype."""
    channels = like.shape[1]
    wide = np.empty((len(coefficients), _side_by_side(*like.shape), channels), like.dtype)
    for row, values in zip(wide, coefficients, strict=True):
        row[...] = values
    return wide.reshape(len(coefficients), -1)


def block_size(x: Array) -> int:
    """Return how many elements of scratch the kernels want at most for x (R, C)."""
    length = _side_by_side(*x.shape) * x.shape[1]
    elements: int = min(x.size, _rows_at_once(length, 2) * length)
    return elements


class _Sums:
    """Sums over the rows of arrays (R, C), block by block: in their dtype within a block, in float64 from there on."""

    def __init__(self, like: Array) -> None:
        self._channels = like.shape[1]
        self._length = _summed(*like.shape)
        self._ones = np.ones(block_size(like) // self._length, like.dtype)
        self._totals = np.zeros((2, self._length))

    def add(self, a: Array, b: Array) -> None:
        """Take the sums of a block of a, and of a b."""
        a, b = a.reshape(-1, self._length), b.reshape(-1, self._length)
        self._totals[0] += self._ones[: len(a)] @ a  # far faster than a sum along the long axis
        self._totals[1] += np.einsum("rc,rc->c", a, b)

    def total(self) -> tuple[Array, Array]:
        """Return the sum of a and that of a b, each (C,) float64."""
        plain, products = self._totals.reshape(2, -1, self._channels).sum(axis=1)
        return plain, products


def moments(x: Array, *, scratch: Array) -> tuple[Array, Array]:
    """Return the mean and the (biased) variance of each column of ``x`` (R, C), float64.

    All is centred, by the mean of the first block, before it is squared, so that a mean far from zero costs no digits.

    ``scratch`` is of ``block_size(x)`` elements.
    """
    rows, channels = x.shape
    first = x[: min(rows, block_size(x) // channels)]
    shift = (first.sum(axis=0, dtype=np.float64) / len(first)).astype(x.dtype)
    (wide_shift,) = _repeated(x, shift)
    sums = _Sums(x)
    for (block,) in _blocks(x, scratch=1):
        centred = np.subtract(block, wide_shift, out=scratch[: block.size].reshape(block.shape))
        sums.add(centred, centred)
    total, squares = sums.total()
    offset = total / rows
    return shift + offset, np.maximum(squares / rows - np.square(offset), 0)  # rounding may go below


def affine(x: Array, factor: Array, offset: Array, *, out: Array) -> Array:
    """Write y = x factor + offset into ``out`` (R, C) and return it; the coefficients are (C,)."""
    wide_factor, wide_offset = _repeated(x, factor, offset)
    for source, target in _blocks(x, out):
        np.multiply(source, wide_factor, out=target)
        np.add(target, wide_offset, out=target)
    return out


def affine_relu(x: Array, factor: Array, offset: Array, *, out: Array) -> Array:
    """Write y = max(x factor + offset, 0) into ``out`` (R, C) and return it; the coefficients are (C,)."""
    wide_factor, wide_offset, zeros = _repeated(x, factor, offset, 0)
    for source, target in _blocks(x, out):
        np.multiply(source, wide_factor, out=target)
        np.add(target, wide_offset, out=target)
        np.maximum(target, zeros, out=target)
    return out


def scaled(x: Array, factor: Array, *, out: Array) -> Array:
    """Write y = x factor into ``out`` (R, C) and return it; ``factor`` is (C,)."""
    (wide_factor,) = _repeated(x, factor)
    for source, target in _blocks(x, out):
        np.multiply(source, wide_factor, out=target)
    return out


def sums(x: Array, dy: Array) -> tuple[Array, Array]:
    """Return sum_r dy[r] and sum_r dy[r] x[r] of arrays (R, C), each (C,) float64."""
    sums = _Sums(x)
    for source, gradient in _blocks(x, dy):
        sums.add(gradient, source)
    return sums.total()


def relu_sums(x: Array, y: Array, dy: Array, *, out: Array, positive: Array) -> tuple[Array, Array]:
    """Write g = dy [y > 0] into ``out``, which may be dy, and return sum_r g[r] and sum_r g[r] x[r], (C,) float64.

    All arrays are (R, C); ``positive`` is bool scratch of ``block_size(x)`` elements.
    """
    sums = _Sums(x)
    for source, value, gradient, target in _blocks(x, y, dy, out):
        np.multiply(gradient, np.greater(value, 0, out=positive[: value.size].reshape(value.shape)), out=target)
        sums.add(target, source)
    return sums.total()


def row_norm(x: Array, eps: float, *, out: Array, mean: Array, inverse: Array) -> Array:
    """Write n = (x - mean) / sqrt(variance + eps), both of each row of x (R, C), into ``out`` and return it.

    ``mean`` and ``inverse`` (R,) take the mean and 1 / sqrt(variance + eps). Each row is centred before it is squared.
    """
    channels = x.shape[1]
    share = np.full(channels, 1 / channels, x.dtype)
    for rows in _few_rows(x):
        centred = out[rows]
        np.matmul(x[rows], share, out=mean[rows])
        np.subtract(x[rows], mean[rows, None], out=centred)
        np.einsum("rc,rc->r", centred, centred, out=inverse[rows])
        np.divide(inverse[rows], channels, out=inverse[rows])
        np.add(inverse[rows], eps, out=inverse[rows])
        np.sqrt(inverse[rows], out=inverse[rows])
        np.divide(1, inverse[rows], out=inverse[rows])
        np.multiply(centred, inverse[rows, None], out=centred)
    return out


def row_norm_backward(n: Array, dn: Array, inverse: Array, *, out: Array, scratch: Array) -> Array:
    """Write dx = inverse (dn - mean(dn) - n mean(n dn)), means over each row, into ``out`` (R, C) and return it.

    ``n`` and ``inverse`` as ``row_norm`` made them; ``out`` may be ``dn``; ``scratch`` in the shape of ``few_rows(n)``.
    """
    channels = n.shape[1]
    share = np.full(channels, 1 / channels, n.dtype)
    for rows in _few_rows(n):
        plain = dn[rows] @ share
        product = np.einsum("rc,rc->r", n[rows], dn[rows]) / channels
        along = np.multiply(n[rows], product[:, None], out=scratch[: len(plain)])
        np.subtract(dn[rows], along, out=out[rows])
        np.subtract(out[rows], plain[:, None], out=out[rows])
        np.multiply(out[rows], inverse[rows, None], out=out[rows])
    return out


def few_rows(x: Array) -> tuple[int, int]:
    """Return the shape of about one block of rows of x (R, C)."""
    return min(len(x), _rows_at_once(x.shape[1], 4)), x.shape[1]


def _few_rows(x: Array) -> Iterator[slice]:
    step, _ = few_rows(x)
    return (slice(start, start + step) for start in range(0, len(x), step))


def combination(x: Array, dy: Array, of_x: Array, of_dy: Array, offset: Array, *, out: Array, scratch: Array) -> Array:
    """Write dx = of_x x + of_dy dy + offset into ``out`` (R, C) and return it; the coefficients are (C,).

    ``out`` may be dy. ``scratch`` is of ``block_size(x)`` elements.
    """
    wide_x, wide_dy, wide_offset = _repeated(x, of_x, of_dy, offset)
    for source, gradient, target in _blocks(x, dy, out, scratch=1):
        np.multiply(gradient, wide_dy, out=target)
        product = np.multiply(source, wide_x, out=scratch[: source.size].reshape(source.shape))
        np.add(target, product, out=target)
        np.add(target, wide_offset, out=target)
    return out
