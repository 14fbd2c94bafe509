"""Normalisation over rows or along them: moments, the affine map, and its derivative.

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
WIDE = 1024  # elements


@lru_cache(maxsize=256)
def _side_by_side(rows: int, channels: int) -> int:
    """Return how many rows are laid side by side: the largest divisor of ``rows`` that gives at most ``WIDE``."""
    return next(width for width in range(max(1, WIDE // channels), 0, -1) if rows % width == 0)


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


def _repeated(coefficients: Array, like: Array) -> Array:
    """Return float64 coefficients (C,) for rows (R, C) that are laid side by side, in the dtype of ``like``."""
    return np.tile(coefficients.astype(like.dtype), _side_by_side(*like.shape))


def block_size(x: Array) -> int:
    """Return how many elements of scratch ``moments`` and ``combination`` want at most for x (R, C)."""
    length = _side_by_side(*x.shape) * x.shape[1]
    elements: int = min(x.size, _rows_at_once(length, 2) * length)
    return elements


def _sum_of_rows(block: Array, channels: int) -> Array:
    """Return the sum over the rows that are in ``block``, (C,) float64."""
    total = np.ones(len(block), block.dtype) @ block  # far faster than a sum along the long axis
    summed: Array = total.reshape(-1, channels).sum(axis=0, dtype=np.float64)
    return summed


def _sum_of_products(a: Array, b: Array, channels: int) -> Array:
    """Return the sum over the rows of a b, (C,) float64."""
    total: Array = np.einsum("rc,rc->c", a, b)
    summed: Array = total.reshape(-1, channels).sum(axis=0, dtype=np.float64)
    return summed


def moments(x: Array, *, scratch: Array) -> tuple[Array, Array]:
    """Return the mean and the (biased) variance of each column of ``x`` (R, C), float64.

    Each block is centred before it is squared, so that a mean far from zero costs no digits; the blocks are then put
    together as Chan, Golub and LeVeque do (The American Statistician 37, 1983): M2 = sum_b M2_b + n_b (m_b - m)^2.

    ``scratch`` is of ``block_size(x)`` elements.
    """
    rows, channels = x.shape
    counts, means, squares = [], [], []
    for (block,) in _blocks(x, scratch=1):
        count = block.size // channels
        mean = _sum_of_rows(block, channels) / count
        shift = np.tile(mean.astype(x.dtype), block.shape[1] // channels)
        centred = np.subtract(block, shift, out=scratch[: block.size].reshape(block.shape))
        counts.append(count)
        means.append(mean)
        squares.append(_sum_of_products(centred, centred, channels))
    weights, block_means = np.array(counts)[:, None], np.array(means)
    mean = (weights * block_means).sum(axis=0) / rows
    spread = (weights * np.square(block_means - mean)).sum(axis=0)
    return mean, (np.sum(squares, axis=0) + spread) / rows


def affine(x: Array, factor: Array, offset: Array, *, out: Array) -> Array:
    """Write y = x factor + offset into ``out`` (R, C) and return it; the coefficients are (C,)."""
    wide_factor, wide_offset = _repeated(factor, x), _repeated(offset, x)
    for source, target in _blocks(x, out):
        np.multiply(source, wide_factor, out=target)
        np.add(target, wide_offset, out=target)
    return out


def scaled(x: Array, factor: Array, *, out: Array) -> Array:
    """Write y = x factor into ``out`` (R, C) and return it; ``factor`` is (C,)."""
    wide_factor = _repeated(factor, x)
    for source, target in _blocks(x, out):
        np.multiply(source, wide_factor, out=target)
    return out


def sums(x: Array, dy: Array) -> tuple[Array, Array]:
    """Return sum_r dy[r] and sum_r dy[r] x[r] of arrays (R, C), each (C,) float64."""
    channels = x.shape[1]
    plain, products = np.zeros(channels), np.zeros(channels)
    for source, gradient in _blocks(x, dy):
        plain += _sum_of_rows(gradient, channels)
        products += _sum_of_products(source, gradient, channels)
    return plain, products


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

    ``scratch`` is of ``block_size(x)`` elements.
    """
    wide_x, wide_dy, wide_offset = (_repeated(coefficients, x) for coefficients in (of_x, of_dy, offset))
    for source, gradient, target in _blocks(x, dy, out, scratch=1):
        np.multiply(gradient, wide_dy, out=target)
        product = np.multiply(source, wide_x, out=scratch[: source.size].reshape(source.shape))
        np.add(target, product, out=target)
        np.add(target, wide_offset, out=target)
    return out
