"""Convolution and the maxima of its outputs in one, compiled; see ``kernels.pooled`` for the method and the letters.

Each function is one call for all rows of maxima. Where the samples are no multiple of ``LANES``, or windows have one
row, numpy's kernels do the work.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from asynctrain.arena import Array
from asynctrain.nn.kernels import pooled
from asynctrain.nn.kernels.compiled.jit import compiled
from asynctrain.nn.kernels.compiled.lanes import (
    LANES,
    larger,
    load,
    multiply,
    spread,
    store,
    where_equal,
    where_positive,
)
from asynctrain.nn.kernels.pooled import Pair, Plan


def _fits(plan: Plan) -> bool:
    return plan.samples % LANES == 0 and plan.pool[0] > 1


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

    The arguments are those of ``kernels.pooled.correlate``; ``ridges`` takes a copy of ``out`` instead.
    """
    if not _fits(plan):
        return pooled.correlate(
            planes,
            matrix,
            plan,
            out=out,
            bands=bands,
            slices=slices,
            ridges=ridges,
            top=top,
            bias=bias,
            rectify=rectify,
        )
    start = np.zeros(plan.filters, planes.dtype) if bias is None else bias.copy()  # which is never read-only
    y = _copies(ridges)[0]
    _correlate(planes, matrix, plan.pool, start, rectify, bands, slices, top, y)
    np.copyto(out, y.reshape(out.shape))
    return out


def _copies(ridges: Array) -> Array:
    """Return the memory of ``ridges`` as arrays (h, F, w N), at least two, one after the other."""
    h, p, *rest = ridges.shape
    return ridges.reshape(p, h, *rest)


@compiled
def _correlate(
    planes: Array,
    matrix: Array,
    pool: Pair,
    bias: Array,
    rectify: bool,
    bands: Array,
    slices: Array,
    top: Array,
    y: Array,
) -> None:
    K = matrix.shape[1]
    h, F, run = top.shape
    places = pool[0] * pool[1]
    band = bands.shape[1] * bands.shape[2] * run
    zero = spread(planes.dtype.type(0))
    done = 0
    for row in range(h):
        end = row * pool[0] + K * run // band
        _take_columns(planes, pool[1], bands, done, end)
        done = end
        first = row * places * F * run
        multiply(
            (matrix, 0, K, 1), (bands, row * pool[0] * band, run, 1), (slices, first, run, 1), places * F, run, K, False
        )
        for f in range(F):
            b = spread(bias[f])
            for n in range(f * run, (f + 1) * run, LANES):
                largest = load(slices, first + n)
                for place in range(1, places):
                    largest = larger(largest, load(slices, first + place * F * run + n))
                store(top, row * F * run + n, largest)
                value = largest + b
                store(y, row * F * run + n, larger(value, zero) if rectify else value)


@compiled
def _take_columns(planes: Array, step: int, bands: Array, first: int, end: int) -> None:
    """Copy some rows of planes (H, C, W, N), shifted by each column of a patch, to ``bands``."""
    _, C, W, N = planes.shape
    _, wide, _, run = bands.shape
    for row in range(first, end):
        for j in range(wide):
            for c in range(C):
                source, target = ((row * C + c) * W + j) * N, ((row * wide + j) * C + c) * run
                for pixel in range(run // N):
                    for n in range(0, N, LANES):
                        store(bands, target + pixel * N + n, load(planes, source + pixel * step * N + n))


def spread_maxima(slices: Array, ridges: Array, top: Array, y: Array, dy: Array, plan: Plan, *, rectify: bool) -> Array:
    """Overwrite ``slices`` with their gradient and return them: each dy goes to its maximum.

    Of equals the first in row order takes it. The arguments are those of ``kernels.pooled.spread_maxima``.
    """
    if not _fits(plan):
        return pooled.spread_maxima(slices, ridges, top, y, dy, plan, rectify=rectify)
    value, gradient = _copies(ridges)[:2]
    np.copyto(gradient.reshape(dy.shape), dy)
    _spread_maxima(slices, top, value, gradient, rectify)
    return slices


@compiled
def _spread_maxima(slices: Array, top: Array, y: Array, dy: Array, rectify: bool) -> None:
    """Overwrite the maxima with their gradient too."""
    h, F, run = top.shape
    places = slices.shape[1] * slices.shape[2]
    for row in range(h):
        for n in range(0, F * run, LANES):
            at = row * F * run + n
            largest, left = load(top, at), load(dy, at)
            if rectify:
                left = where_positive(load(y, at), left)
            store(top, at, left)
            for place in range(row * places, (row + 1) * places - 1):
                taken = where_equal(load(slices, place * F * run + n), largest, left)
                store(slices, place * F * run + n, taken)
                left = left - taken
            store(slices, ((row + 1) * places - 1) * F * run + n, left)


def correlate_backward_input(
    matrix: Array, dslices: Array, plan: Plan, *, out: Array, dbands: Array, columns: Array
) -> Array:
    """Write the transpose of the convolution in ``correlate``, applied to ``dslices``, into ``out`` and return it.

    The arguments are those of ``kernels.pooled.correlate_backward_input``; ``dbands`` is not used.
    """
    if not _fits(plan):
        return pooled.correlate_backward_input(matrix, dslices, plan, out=out, dbands=dbands, columns=columns)
    _correlate_backward_input(matrix, dslices, plan.pool, plan.patch, columns, out)
    return out


@compiled
def _correlate_backward_input(
    matrix: Array, dslices: Array, pool: Pair, patch: Pair, columns: Array, dplanes: Array
) -> None:
    """Add the gradients of all patches; ``columns`` is scratch for those of one row."""
    outputs, K = matrix.shape
    h, run = dslices.shape[0], dslices.shape[-1]
    _, C, W, N = dplanes.shape
    dplanes[:] = 0
    for row in range(h):
        gradients = dslices, row * outputs * run, run, 1
        multiply((matrix, 0, 1, K), gradients, (columns, 0, run, 1), K, run, outputs, False)
        for i in range(patch[0]):
            for j in range(patch[1]):
                for c in range(C):
                    source = ((i * patch[1] + j) * C + c) * run
                    target = (((row * pool[0] + i) * C + c) * W + j) * N
                    for pixel in range(run // N):
                        for n in range(0, N, LANES):
                            at = target + pixel * pool[1] * N + n
                            store(dplanes, at, load(dplanes, at) + load(columns, source + pixel * N + n))


def warm_up(dtype: np.dtype[Any]) -> None:
    """Compile the kernels for arrays of ``dtype``."""
    plan = Plan(LANES, 1, 1, (1, 1), (2, 1), (1, 1), dtype.itemsize)
    planes, matrix, top = (np.zeros(shape, dtype) for shape in (plan.planes, plan.matrix, plan.top))
    bands, slices, ridges = (np.zeros(shape, dtype) for shape in (plan.bands, plan.slices, plan.ridges))
    y = np.zeros((1, 1, 1, LANES), dtype)
    correlate(planes, matrix, plan, out=y, bands=bands, slices=slices, ridges=ridges, top=top, bias=None, rectify=False)
    spread_maxima(slices, ridges, top, y, y, plan, rectify=False)
    columns = np.zeros(plan.columns, dtype)
    correlate_backward_input(matrix, slices, plan, out=planes, dbands=planes, columns=columns)
