"""Convolution and the maxima of its outputs in one, for images of few channels, and its derivatives.

The outputs under one pooling window of p x q see (kh + p - 1) x (kw + q - 1) pixels together. Those are one column of
a matrix, taken once, where im2col takes kh x kw pixels p q times over; weights that stand in p q places, with zeros
around them, make of it all outputs of the window, and their maximum is one over p q slices.

The samples of a batch are the last axis here, so every copy, sum and maximum goes along runs of N numbers or more,
however few channels there are: an image is (H, W, C, N), called ``planes``.

Letters: N images, C channels in, F filters out, kh x kw weights, p x q pooling window, T = p q, h x w maxima, K =
(kh + p - 1) (kw + q - 1) C. The convolution has stride 1 and the padding that is in the planes, the pool its own size
as stride.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from asynctrain.arena import Array, Shape

TILE_BYTES = 768 * 1024
WORTH = 6  # of C (patch / kernel - 1): in ``pays``

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Plan:
    """The shapes of one pooled convolution."""

    samples: int  # N
    channels: int  # C
    filters: int  # F
    kernel: Pair  # (kh, kw)
    pool: Pair  # (p, q)
    maxima: Pair  # (h, w)

    @property
    def patch(self) -> Pair:
        """The pixels that one maximum sees, high and wide."""
        return self.kernel[0] + self.pool[0] - 1, self.kernel[1] + self.pool[1] - 1

    @property
    def planes(self) -> Shape:
        """(H, W, C, N): the padded image, without what no maximum sees."""
        (h, w), (p, q), (kh, kw) = self.maxima, self.pool, self.kernel
        return h * p + kh - 1, w * q + kw - 1, self.channels, self.samples

    @property
    def matrix(self) -> Shape:
        """(T F, K)."""
        high, wide = self.patch
        return self.pool[0] * self.pool[1] * self.filters, high * wide * self.channels

    @property
    def slices(self) -> Shape:
        """(T, F, h w N): the convolution's outputs, by their place in the window."""
        return self.pool[0] * self.pool[1], *self.top

    @property
    def top(self) -> Shape:
        """(F, h w N): the maxima."""
        return self.filters, prod(self.maxima) * self.samples

    def cut(self, itemsize: int) -> Iterator[Tile]:
        """Yield tiles whose columns take ``TILE_BYTES`` or less, but at least one row of maxima."""
        h, w = self.maxima
        rows = self._rows(itemsize)
        for start in range(0, h, rows):
            stop = min(start + rows, h)
            yield Tile(slice(start, stop), slice(start * w * self.samples, stop * w * self.samples))

    def columns(self, itemsize: int) -> int:
        """Return the elements of scratch for the largest tile's columns, or for its maxima where those are more."""
        return self._rows(itemsize) * self.maxima[1] * self.samples * max(self.matrix[1], self.filters)

    def _rows(self, itemsize: int) -> int:
        """Return how many rows of maxima are in a tile."""
        h, w = self.maxima
        return max(1, min(h, TILE_BYTES // (self.matrix[1] * w * self.samples * itemsize)))


class Tile(NamedTuple):
    """Some rows of maxima: among all rows, and among the h w N of one filter.

    What belongs to a tile lies in one piece, in the memory of an array (..., h w N) that is never seen whole.
    """

    rows: slice
    outputs: slice

    def of(self, array: Array) -> Array:
        """Return the tile's part (..., outputs) of an array (..., h w N)."""
        *leading, _ = array.shape
        wide = prod(leading)
        return array.reshape(-1)[wide * self.outputs.start : wide * self.outputs.stop].reshape(*leading, -1)


def pays(plan: Plan) -> bool:
    """Return whether this is faster than a convolution (``conv``) and a pool (``pool``) of its outputs.

    A rule of the shapes, fitted to measurements with 8 to 64 filters and 32 and 64 samples: the zeros in the matrix
    cost products in proportion to C (patch / kernel - 1), and what is saved in copies and passes is worth ``WORTH``.
    """
    return plan.channels * (prod(plan.patch) / prod(plan.kernel) - 1) <= WORTH


def spread_weight(weight: Array, plan: Plan, *, out: Array) -> Array:
    """Write the weights (kh, kw, C, F) into ``out`` (T F, K), once for each place of the window, and return it."""
    out.fill(0)
    for target in _placed(out, plan):
        np.copyto(target, weight)
    return out


def gather_weight(matrix: Array, plan: Plan, *, out: Array) -> Array:
    """Write the transpose of ``spread_weight``, applied to ``matrix``, into ``out`` (kh, kw, C, F) and return it."""
    out.fill(0)
    for share in _placed(matrix, plan):
        np.add(out, share, out=out)
    return out


def _placed(matrix: Array, plan: Plan) -> Iterator[Array]:
    """Yield where in a matrix (T F, K) the weights of each place of the window stand, as views (kh, kw, C, F)."""
    kh, kw = plan.kernel
    places = matrix.reshape(*plan.pool, plan.filters, *plan.patch, plan.channels)
    for a, b in product(*map(range, plan.pool)):
        yield places[a, b, :, a : a + kh, b : b + kw].transpose(1, 2, 3, 0)


def correlate(
    planes: Array,
    matrix: Array,
    plan: Plan,
    *,
    out: Array,
    slices: Array,
    top: Array,
    columns: Array,
    bias: Array | None,
) -> Array:
    """Write the maxima over the pooling windows of a convolution into ``out`` and return it.

    Args:
        planes: (H, W, C, N), padded.
        matrix: (T F, K), as ``spread_weight`` makes it.
        plan: the shapes.
        out: (N, h, w, F).
        slices: (T, F, h w N), where the convolution's outputs are left, tile by tile.
        top: (F, h w N), where their maxima are left, tile by tile; without the bias, which comes after.
        columns: scratch of ``plan.columns(itemsize)`` elements.
        bias: (F,), if any.
    """
    windows = _windows(planes, plan)
    for tile in plan.cut(planes.itemsize):
        found, largest = tile.of(slices), tile.of(top)
        np.matmul(matrix, _columns(windows[:, :, :, tile.rows], columns), out=found.reshape(len(matrix), -1))
        np.max(found, axis=0, out=largest)
        if bias is not None:
            largest = np.add(largest, bias[:, np.newaxis], out=columns[: largest.size].reshape(largest.shape))
        np.copyto(_by_filter(out, tile), largest.reshape(_by_filter(out, tile).shape))
    return out


def spread_maxima(slices: Array, top: Array, dy: Array, plan: Plan, *, rest: Array, hit: Array) -> Array:
    """Overwrite ``slices`` with their gradient and return them: each dy goes to its maximum.

    Of equals the first in row order takes it. What is left goes from place to place, as in ``pool``.

    Args:
        slices: (T, F, h w N), as ``correlate`` left them.
        top: (F, h w N), likewise.
        dy: (N, h, w, F), the gradient of the maxima.
        plan: the shapes.
        rest: scratch (F, h w N).
        hit: bool scratch (F, h w N).
    """
    for tile in plan.cut(slices.itemsize):
        places, largest, left, struck = tile.of(slices), tile.of(top), tile.of(rest), tile.of(hit)
        np.copyto(left.reshape(_by_filter(dy, tile).shape), _by_filter(dy, tile))
        for taken in places[:-1]:
            np.copyto(taken, np.equal(taken, largest, out=struck))
            np.multiply(taken, left, out=taken)
            np.subtract(left, taken, out=left)
        np.copyto(places[-1], left)
    return slices


def correlate_backward_input(matrix: Array, dslices: Array, plan: Plan, *, out: Array, columns: Array) -> Array:
    """Write the transpose of the convolution in ``correlate``, applied to ``dslices``, into ``out`` and return it.

    Args:
        matrix: (T F, K).
        dslices: (T, F, h w N), as ``spread_maxima`` left them.
        plan: the shapes.
        out: (H, W, C, N), the gradient of the planes.
        columns: scratch of ``plan.columns(itemsize)`` elements.
    """
    out.fill(0)
    windows = _windows(out, plan, writeable=True)
    for tile in plan.cut(out.itemsize):
        pixels = windows[:, :, :, tile.rows]
        part = columns[: pixels.size]
        np.matmul(matrix.T, tile.of(dslices).reshape(len(matrix), -1), out=part.reshape(matrix.shape[1], -1))
        shares = part.reshape(pixels.shape)
        for place in np.ndindex(plan.patch):  # within one place of the patch no two pixels are the same
            np.add(pixels[place], shares[place], out=pixels[place])
    return out


def correlate_backward_params(
    planes: Array, dslices: Array, plan: Plan, *, out: Array, partial: Array, columns: Array
) -> Array:
    """Write the gradient of the matrix, transposed, (K, T F), into ``out`` and return it.

    Args:
        planes: (H, W, C, N), padded.
        dslices: (T, F, h w N), as ``spread_maxima`` left them.
        plan: the shapes.
        out: (K, T F): in this order the product is fastest.
        partial: scratch in the shape of ``out``, one tile's share.
        columns: scratch of ``plan.columns(itemsize)`` elements.
    """
    windows = _windows(planes, plan)
    for tile in plan.cut(planes.itemsize):
        share = out if tile.rows.start == 0 else partial
        doutputs = tile.of(dslices).reshape(out.shape[1], -1)
        np.matmul(_columns(windows[:, :, :, tile.rows], columns), doutputs.T, out=share)
        if share is partial:
            np.add(out, partial, out=out)
    return out


def _by_filter(y: Array, tile: Tile) -> Array:
    """Return a tile's rows of an array (N, h, w, F) as a view (F, rows, w, N)."""
    return y[:, tile.rows].transpose(3, 1, 2, 0)


def _windows(planes: Array, plan: Plan, *, writeable: bool = False) -> Array:
    """Return the patches as a view (kh + p - 1, kw + q - 1, C, h, w, N) of the planes; those of neighbours overlap."""
    (h, w), (p, q) = plan.maxima, plan.pool
    high, wide, channel, sample = planes.strides
    shape = (*plan.patch, plan.channels, h, w, plan.samples)
    return as_strided(planes, shape, (high, wide, channel, p * high, q * wide, sample), writeable=writeable)


def _columns(windows: Array, scratch: Array) -> Array:
    """Return the patches of a tile as a matrix (K, rows w N), copied into ``scratch``."""
    part = scratch[: windows.size]
    np.copyto(part.reshape(windows.shape), windows)
    return part.reshape(prod(windows.shape[:3]), -1)
