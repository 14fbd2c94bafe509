"""Convolution and the maxima of its outputs in one, for images of few channels, and its derivatives.

The outputs under one pooling window of p x q see (kh + p - 1) x (kw + q - 1) pixels together, a patch. Weights that
stand in p q places of a patch, with zeros around them, make of it all outputs of the window, and their maximum is one
over p q slices.

The samples of a batch are the last axis here, so every copy, sum and maximum goes along runs of N numbers or more,
however few channels there are: an image is (H, W, C, N) in the order H, C, W, N of memory, called ``planes``.

Of the patches only the columns are taken side by side. What that gives, ``bands``, has for each row of pixels the
piece of every patch that lies in it; the rows of one patch follow upon each other in memory, so the patches of a row
of maxima are a matrix there already, which overlaps with that of the next row.

Letters: N images, C channels in, F filters out, kh x kw weights, p x q pooling window, T = p q, h x w maxima, K =
(kh + p - 1) (kw + q - 1) C. The convolution has stride 1 and the padding that is in the planes, the pool its own size
as stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from asynctrain.arena import Array, Shape

BLOCK_BYTES = 2 * 1024 * 1024  # of bands and slices that are worked on at a time
WORTH = 6  # of C (patch / kernel - 1): in ``pays``

Pair = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """The shapes of one pooled convolution."""

    samples: int  # N
    channels: int  # C
    filters: int  # F
    kernel: Pair  # (kh, kw)
    pool: Pair  # (p, q)
    maxima: Pair  # (h, w)
    itemsize: int  # bytes of a number

    @cached_property
    def patch(self) -> Pair:
        """The pixels that one maximum sees, high and wide."""
        return self.kernel[0] + self.pool[0] - 1, self.kernel[1] + self.pool[1] - 1

    @cached_property
    def steps(self) -> Pair:
        """How many windows beside each other see one pixel, at most: the patch in units of the pool, rounded up."""
        return -(-self.patch[0] // self.pool[0]), -(-self.patch[1] // self.pool[1])

    @cached_property
    def planes(self) -> Shape:
        """(H, C, W, N): the padded image in the order of memory, without what no maximum sees."""
        (h, w), (p, q), (kh, kw) = self.maxima, self.pool, self.kernel
        return h * p + kh - 1, self.channels, w * q + kw - 1, self.samples

    @cached_property
    def bands(self) -> Shape:
        """(H, kw + q - 1, C, w N)."""
        return self.planes[0], self.patch[1], self.channels, self.maxima[1] * self.samples

    @cached_property
    def matrix(self) -> Shape:
        """(T F, K)."""
        return prod(self.pool) * self.filters, prod(self.patch) * self.channels

    @cached_property
    def slices(self) -> Shape:
        """(h, p, q, F, w N): the convolution's outputs, by their place in the window."""
        return self.maxima[0], *self.pool, self.filters, self.maxima[1] * self.samples

    @cached_property
    def ridges(self) -> Shape:
        """(h, p, F, w N): the maxima of the rows of each window."""
        return self.maxima[0], self.pool[0], self.filters, self.maxima[1] * self.samples

    @cached_property
    def top(self) -> Shape:
        """(h, F, w N): the maxima."""
        return self.maxima[0], self.filters, self.maxima[1] * self.samples

    @cached_property
    def padded_weight(self) -> Shape:
        """(kh + 2 (p - 1), kw + 2 (q - 1), C, F)."""
        (kh, kw), (p, q) = self.kernel, self.pool
        return kh + 2 * (p - 1), kw + 2 * (q - 1), self.channels, self.filters

    @cached_property
    def dbands(self) -> Shape:
        """(h', p, kw + q - 1, C, w N): the bands with as many more rows as make whole steps of the pool."""
        return self.maxima[0] + self.steps[0] - 1, self.pool[0], *self.bands[1:]

    def dplanes(self, height: int, width: int) -> Shape:
        """(H, C, W, N) of planes at least so large, and made of whole steps of the pool wherever a patch sees them."""
        (h, w), (p, q), (down, along) = self.maxima, self.pool, self.steps
        wide = max(w + along - 1, -(-width // q)) * q
        return max(height, (h + down - 1) * p), self.channels, wide, self.samples

    @cached_property
    def blocks(self) -> tuple[slice, ...]:
        """The rows of maxima in blocks whose bands and slices take ``BLOCK_BYTES`` or less, or of one row."""
        h, rows = self.maxima[0], self.rows_at_once
        return tuple(slice(start, min(start + rows, h)) for start in range(0, h, rows))

    @cached_property
    def rows_at_once(self) -> int:
        """How many rows of maxima are in a block, at most."""
        one = (self.pool[0] * prod(self.bands[1:]) + prod(self.slices[1:])) * self.itemsize
        return min(self.maxima[0], max(1, BLOCK_BYTES // one))

    @cached_property
    def columns(self) -> Shape:
        """(rows, kh + p - 1, kw + q - 1, C, w N): the patches of a block."""
        return self.rows_at_once, self.patch[0], *self.bands[1:]


def pays(plan: Plan) -> bool:
    """Return whether this is faster than a convolution (``conv``) and a pool (``pool``) of its outputs.

    A rule of the shapes, fitted to measurements with 8 to 64 filters and 32 and 64 samples: the zeros in the matrix
    cost products in proportion to C (patch / kernel - 1), and what is saved in copies and passes is worth ``WORTH``.
    """
    return plan.channels * (prod(plan.patch) / prod(plan.kernel) - 1) <= WORTH


def spread_weight(weight: Array, plan: Plan, *, out: Array, padded: Array) -> Array:
    """Write the weights (kh, kw, C, F) into ``out`` (T F, K), once for each place of the window, and return it.

    ``padded`` is scratch of shape ``plan.padded_weight``: what stands at a place is a window of the weights with zeros
    around them.
    """
    (kh, kw), (p, q), (high, wide) = plan.kernel, plan.pool, plan.patch
    padded.fill(0)
    padded[p - 1 : p - 1 + kh, q - 1 : q - 1 + kw] = weight
    i, j, c, f = padded.strides
    shape = (p, q, plan.filters, high, wide, plan.channels)
    corner = (p - 1) * i + (q - 1) * j
    np.copyto(out.reshape(shape), np.ndarray(shape, padded.dtype, padded, corner, (-i, -j, f, i, j, c)))
    return out


def gather_weight(matrix: Array, plan: Plan, *, out: Array) -> Array:
    """Write the transpose of ``spread_weight``, applied to the matrix transposed, (K, T F), into ``out`` and return it.

    out: (kh, kw, C, F).
    """
    (p, q), (kh, kw) = plan.pool, plan.kernel
    i, j, c, a, b, f = matrix.reshape(*plan.patch, plan.channels, p, q, plan.filters).strides
    shape = (p, q, kh, kw, plan.channels, plan.filters)
    places = np.ndarray(shape, matrix.dtype, matrix, 0, (a + i, b + j, i, j, c, f))
    return np.add.reduce(places, axis=(0, 1), out=out)


def correlate(
    planes: Array,
    matrix: Array,
    plan: Plan,
    *,
    out: Array,
    bands: Array,
    slices: Array,
    ridges: Array,
    top: Array,
    bias: Array | None,
    rectify: bool,
) -> Array:
    """Write the maxima over the pooling windows of a convolution into ``out`` and return it.

    Args:
        planes: (H, C, W, N), padded.
        matrix: (T F, K), as ``spread_weight`` makes it.
        plan: the shapes.
        out: (h, F, w, N), of any strides.
        bands: (H, kw + q - 1, C, w N), where they are left.
        slices: (h, p, q, F, w N), where the convolution's outputs are left.
        ridges: (h, p, F, w N), where the maxima of the rows of each window are left.
        top: (h, F, w N), where the maxima are left; without the bias, which comes after.
        bias: (F,), if any.
        rectify: whether max(y, 0) comes last.
    """
    pixels, taken = _columns(planes, plan), bands.reshape(*plan.bands[:3], -1, plan.samples)
    patches, outputs = _patches(bands, plan), slices.reshape(len(slices), len(matrix), -1)
    (p, _), done = plan.pool, 0
    for rows in plan.blocks:
        end = rows.stop * p + plan.kernel[0] - 1  # the first rows of a block are the last of the one before
        np.copyto(taken[done:end], pixels[done:end])
        done = end
        np.matmul(matrix, patches[rows], out=outputs[rows])
        np.maximum.reduce(slices[rows], axis=2, out=ridges[rows])
        np.maximum.reduce(ridges[rows], axis=1, out=top[rows])
    largest = top.reshape(out.shape)
    if bias is None:
        np.copyto(out, largest)
    else:
        np.add(largest, bias[:, np.newaxis, np.newaxis], out=out)
    return np.maximum(out, 0, out=out) if rectify else out


def spread_maxima(slices: Array, ridges: Array, top: Array, y: Array, dy: Array, plan: Plan, *, rectify: bool) -> Array:
    """Overwrite ``slices`` with their gradient and return them: each dy goes to its maximum.

    Of equals the first in row order takes it: first the row of the window that has the maximum, and there the place.

    Args:
        slices: (h, p, q, F, w N), as ``correlate`` left them.
        ridges: (h, p, F, w N), likewise; overwritten with their gradient.
        top: (h, F, w N), likewise.
        y: (h, F, w, N), of any strides, as ``correlate`` wrote it.
        dy: (h, F, w, N), of any strides, the gradient of y.
        plan: the shapes.
        rectify: as in ``correlate``.
    """
    for rows in plan.blocks:
        rows_of_window = ridges[rows].swapaxes(0, 1)
        places = slices[rows].transpose(2, 0, 1, 3, 4)
        _mark(places, ridges[rows])
        _mark(rows_of_window, top[rows])
        gradient = top[rows].reshape(dy[rows].shape)
        if rectify:
            np.greater(y[rows], 0, out=gradient)
            np.multiply(gradient, dy[rows], out=gradient)
        else:
            np.copyto(gradient, dy[rows])
        _deal(rows_of_window, top[rows])
        _deal(places, ridges[rows])
    return slices


def _mark(parts: Array, largest: Array) -> None:
    """Overwrite all parts but the last with 1 where they are the largest and 0 elsewhere."""
    for part in parts[:-1]:
        np.equal(part, largest, out=part)


def _deal(parts: Array, left: Array) -> None:
    """Overwrite each part, as ``_mark`` left it, with what it takes of ``left``; the last gets the rest."""
    last = parts[-1]
    for part in parts[:-1]:
        np.multiply(part, left, out=part)
        left = np.subtract(left, part, out=last)
    if left is not last:
        np.copyto(last, left)


def correlate_backward_input(
    matrix: Array, dslices: Array, plan: Plan, *, out: Array, dbands: Array, columns: Array
) -> Array:
    """Write the transpose of the convolution in ``correlate``, applied to ``dslices``, into ``out`` and return it.

    The gradient of the patches is one product, and is added to the bands they are made of, as many rows at a time as
    lie between two windows; then the bands are added to the pixels, as many columns at a time.

    Args:
        matrix: (T F, K).
        dslices: (h, p, q, F, w N), as ``spread_maxima`` left them.
        plan: the shapes.
        out: of shape ``plan.dplanes(height, width)``, the gradient of the planes.
        dbands: scratch of shape ``plan.dbands``.
        columns: scratch of shape ``plan.columns``.
    """
    (p, q), (h, w) = plan.pool, plan.maxima
    doutputs = dslices.reshape(h, len(matrix), -1)
    dbands.fill(0)
    for rows in plan.blocks:
        part = columns[: rows.stop - rows.start]
        np.matmul(matrix.T, doutputs[rows], out=part.reshape(len(part), matrix.shape[1], -1))
        for step in range(plan.steps[0]):
            share = part[:, step * p : (step + 1) * p]
            target = dbands[rows.start + step : rows.stop + step, : share.shape[1]]
            np.add(target, share, out=target)
    by_pixel = dbands.reshape(-1, plan.patch[1], plan.channels, w, plan.samples).transpose(0, 2, 3, 1, 4)
    out.fill(0)
    pixels = out[: len(by_pixel)].reshape(len(by_pixel), plan.channels, -1, q, plan.samples)
    for step in range(plan.steps[1]):
        share = by_pixel[:, :, :, step * q : (step + 1) * q]
        target = pixels[:, :, step : step + w, : share.shape[3]]
        np.add(target, share, out=target)
    return out


def correlate_backward_params(bands: Array, dslices: Array, plan: Plan, *, out: Array, partial: Array) -> Array:
    """Write the gradient of the matrix, transposed, (K, T F), into ``out`` and return it.

    Args:
        bands: (H, kw + q - 1, C, w N), as ``correlate`` left them.
        dslices: (h, p, q, F, w N), as ``spread_maxima`` left them.
        plan: the shapes.
        out: (K, T F): in this order the product is fastest.
        partial: scratch (h, K, T F), the share of each row of maxima.
    """
    doutputs = dslices.reshape(len(dslices), out.shape[1], -1)
    np.matmul(_patches(bands, plan), doutputs.swapaxes(1, 2), out=partial)
    return np.add.reduce(partial, axis=0, out=out)


def bias_backward(dtop: Array, *, out: Array) -> Array:
    """Write db[f] = sum over all maxima of their gradient, (h, F, w N), into ``out`` (F,) and return it."""
    return np.add.reduce(dtop, axis=(0, 2), out=out)


def _columns(planes: Array, plan: Plan) -> Array:
    """Return the columns of all patches as a view (H, kw + q - 1, C, w, N) of the planes; neighbours overlap."""
    high, channel, wide, sample = planes.strides
    shape = (*plan.bands[:3], plan.maxima[1], plan.samples)
    strides = (high, wide, channel, plan.pool[1] * wide, sample)
    return np.ndarray(shape, planes.dtype, planes, 0, strides)


def _patches(bands: Array, plan: Plan) -> Array:
    """Return the patches of each row of maxima as a view (h, K, w N) of the bands; neighbours overlap."""
    run = bands.strides[2]
    shape = (plan.maxima[0], plan.matrix[1], bands.shape[3])
    return np.ndarray(shape, bands.dtype, bands, 0, (plan.pool[0] * bands.strides[0], run, bands.itemsize))
