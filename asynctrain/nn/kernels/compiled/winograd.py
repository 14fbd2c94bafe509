"""Winograd's minimal filtering F(4x4, 3x3), its transforms compiled; see ``kernels.winograd`` for the method.

numpy transforms both axes of a tile at once by a matrix product of 36x36 numbers; here one axis comes after the other,
and each by a third of the operations, as the interpolation points are 0, p, -p, q, -q with p q = 1 and infinity: with
even and odd parts apart, rows for a point and for its negative share their terms. ``LANES`` channels of one
tile are transformed at a time, in scratch that stays in the first-level cache; they are a constant, so that the
compiler knows where everything in there is. Where C or
F is no multiple of them, numpy's kernels do the work.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn.kernels import winograd
from asynctrain.nn.kernels.compiled.jit import compiled, inlined
from asynctrain.nn.kernels.conv import Pair
from asynctrain.nn.kernels.winograd import POINTS, SEEN, TILE, Blocks, blocks, matrices

LANES = 16  # channels at a time
P, Q = POINTS[1], POINTS[3]
PLACES = SEEN * SEEN
TRANSFORM = 25  # multiply-adds of the products that transforming a number costs in time


def _fits(channels: int, filters: int) -> bool:
    return channels % LANES == 0 and filters % LANES == 0


@lru_cache(maxsize=256)
def pays(output: Shape, channels: int) -> bool:
    """Return whether this is faster than columns, by the rule of ``kernels.winograd.pays`` with figures of its own."""
    return winograd.pays(output, channels, TRANSFORM) if _fits(channels, output[3]) else winograd.pays(output, channels)


def correlate(
    x: Array,
    weight: Array,
    corner: Pair,
    *,
    out: Array,
    spectrum: Array,
    scratch: Array,
    bias: Array | None = None,
    seen: Array | None = None,
) -> Array:
    """Write y[n, h, w, f] = b[f] + sum_ijc x[n, h + i - top, w + j - left, c] weight[i, j, c, f] and return it.

    The arguments are those of ``kernels.winograd.correlate``.
    """
    C, F = weight.shape[2:]
    if not _fits(C, F):
        return winograd.correlate(x, weight, corner, out=out, spectrum=spectrum, scratch=scratch, bias=bias, seen=seen)
    plan = blocks(out.shape)
    np.matmul(matrices(x.dtype).filter, weight.reshape(9, -1), out=spectrum.reshape(PLACES, -1))
    start = np.zeros(F, x.dtype) if bias is None else np.array(bias)
    for number, (images, rows) in enumerate(plan.cut(len(out))):
        tiles = _tiles(x, corner, images, rows, plan, scratch[1] if seen is None else seen[number].reshape(-1))
        products = _part(scratch[0], (len(tiles), PLACES, F))
        np.matmul(tiles.swapaxes(0, 1), spectrum, out=products.swapaxes(0, 1))
        _put(products, start, rows.start, rows.stop - rows.start, plan.across, out[images])
    return out


def correlate_backward_input(
    weight: Array, dy: Array, corner: Pair, *, out: Array, flipped: Array, spectrum: Array, scratch: Array
) -> Array:
    """Write the transpose of ``correlate``, applied to dy, into ``out`` and return it.

    The arguments are those of ``kernels.winograd.correlate_backward_input``.
    """
    np.copyto(flipped, weight[::-1, ::-1].swapaxes(2, 3))
    return correlate(dy, flipped, (2 - corner[0], 2 - corner[1]), out=out, spectrum=spectrum, scratch=scratch)


def correlate_backward_params(
    x: Array,
    dy: Array,
    corner: Pair,
    *,
    out: Array,
    spectrum: Array,
    partial: Array,
    scratch: Array,
    seen: Array | None = None,
) -> Array:
    """Write dweight[i, j, c, f] = sum_nhw x[n, h + i - top, w + j - left, c] dy[n, h, w, f] and return it.

    The arguments are those of ``kernels.winograd.correlate_backward_params``.
    """
    if not _fits(*out.shape[2:]):
        return winograd.correlate_backward_params(
            x, dy, corner, out=out, spectrum=spectrum, partial=partial, scratch=scratch, seen=seen
        )
    plan = blocks(dy.shape)
    for number, (images, rows) in enumerate(plan.cut(len(dy))):
        if seen is None:
            tiles = _tiles(x, corner, images, rows, plan, scratch[1])
        else:
            tiles = _part(seen[number].reshape(-1), (plan.count(images, rows), PLACES, x.shape[3]))
        wanted = _part(scratch[0], (len(tiles), PLACES, dy.shape[3]))
        _take_gradient(dy[images], rows.start, rows.stop - rows.start, plan.across, wanted)
        share = spectrum if number == 0 else partial
        np.matmul(tiles.transpose(1, 2, 0), wanted.swapaxes(0, 1), out=share)
        if number > 0:
            np.add(spectrum, partial, out=spectrum)
    np.matmul(matrices(x.dtype).filter.T, spectrum.reshape(PLACES, -1), out=out.reshape(9, -1))
    return out


def _tiles(x: Array, corner: Pair, images: slice, rows: slice, plan: Blocks, memory: Array) -> Array:
    """Return B^T d B (T, 36, C) for the tiles of a block, at the beginning of ``memory``."""
    tiles = _part(memory, (plan.count(images, rows), PLACES, x.shape[3]))
    _take_image(x[images], corner[0] - rows.start * TILE, corner[1], rows.stop - rows.start, plan.across, tiles)
    return tiles


def _part(scratch: Array, shape: Shape) -> Array:
    """Return the beginning of one piece of scratch memory as an array of ``shape``."""
    return scratch[: prod(shape)].reshape(shape)


@compiled
def _take_image(x: Array, top: int, left: int, down: int, across: int, seen: Array) -> None:  # noqa: C901 - loops within loops
    """Write B^T d B of all tiles d of ``x`` (n, H, W, C), zero outside the image, to ``seen`` (T, 36, C)."""
    images, H, W, C = x.shape
    r = np.empty((2 * PLACES, LANES), x.dtype)
    for n in range(images):
        for h in range(down):
            for w in range(across):
                tile = (n * down + h) * across + w
                for start in range(0, C, LANES):
                    for i in range(SEEN):
                        for j in range(SEEN):
                            u, v = h * TILE + i - top, w * TILE + j - left
                            if 0 <= u < H and 0 <= v < W:
                                for c in range(LANES):
                                    r[i * SEEN + j, c] = x[n, u, v, start + c]
                            else:
                                for c in range(LANES):
                                    r[i * SEEN + j, c] = 0
                    for j in range(SEEN):
                        _see(r, j, SEEN, PLACES + j, SEEN)
                    for i in range(SEEN):
                        _see(r, PLACES + i * SEEN, 1, i * SEEN, 1)
                    _store(r, seen, tile, start)


@inlined
def _store(r: Array, tiles: Array, tile: int, start: int) -> None:
    """Copy all places of ``r`` to the channels of a tile (36, C) from ``start`` on."""
    for place in range(PLACES):
        for c in range(LANES):
            tiles[tile, place, start + c] = r[place, c]


@inlined
def _see(r: Array, source: int, apart: int, target: int, apart_there: int) -> None:
    """B^T d of six numbers d for each lane: the polynomials of which all points but one are roots."""
    p, q, two = r.dtype.type(P), r.dtype.type(Q), r.dtype.type(P * P + Q * Q)
    pp, qq = r.dtype.type(P * P), r.dtype.type(Q * Q)
    for c in range(LANES):
        d0, d1, d2 = r[source, c], r[source + apart, c], r[source + 2 * apart, c]
        d3, d4, d5 = r[source + 3 * apart, c], r[source + 4 * apart, c], r[source + 5 * apart, c]
        even_p, odd_p = d4 - qq * d2, p * (d3 - qq * d1)
        even_q, odd_q = d4 - pp * d2, q * (d3 - pp * d1)
        r[target, c] = d0 - two * d2 + d4
        r[target + apart_there, c] = even_p + odd_p
        r[target + 2 * apart_there, c] = even_p - odd_p
        r[target + 3 * apart_there, c] = even_q + odd_q
        r[target + 4 * apart_there, c] = even_q - odd_q
        r[target + 5 * apart_there, c] = d1 - two * d3 + d5


@compiled
def _put(products: Array, bias: Array, first: int, down: int, across: int, y: Array) -> None:  # noqa: C901 - loops within loops
    """Write A^T m A + bias of all tiles m in ``products`` (T, 36, F) to their rows of ``y`` (n, h, w, F)."""
    images, H, W, F = y.shape
    r = np.empty((2 * PLACES, LANES), y.dtype)
    for n in range(images):
        for h in range(first, first + down):
            for w in range(across):
                tile = (n * down + h - first) * across + w
                for start in range(0, F, LANES):
                    for place in range(PLACES):
                        for f in range(LANES):
                            r[place, f] = products[tile, place, start + f]
                    for j in range(SEEN):
                        _give(r, j, SEEN, PLACES + j, SEEN)
                    for i in range(TILE):
                        _give(r, PLACES + i * SEEN, 1, i * TILE, 1)
                    for i in range(min(TILE, H - h * TILE)):
                        for j in range(min(TILE, W - w * TILE)):
                            for f in range(LANES):
                                y[n, h * TILE + i, w * TILE + j, start + f] = r[i * TILE + j, f] + bias[start + f]


@inlined
def _give(r: Array, source: int, apart: int, target: int, apart_there: int) -> None:
    """A^T m of six numbers m for each lane: m_k is the value at point k, y_i the coefficient of the i-th power."""
    p, q = r.dtype.type(P), r.dtype.type(Q)
    pp, qq, ppp, qqq = r.dtype.type(P**2), r.dtype.type(Q**2), r.dtype.type(P**3), r.dtype.type(Q**3)
    for f in range(LANES):
        m0, m1, m2 = r[source, f], r[source + apart, f], r[source + 2 * apart, f]
        m3, m4, m5 = r[source + 3 * apart, f], r[source + 4 * apart, f], r[source + 5 * apart, f]
        even_p, odd_p, even_q, odd_q = m1 + m2, m1 - m2, m3 + m4, m3 - m4
        r[target, f] = m0 + even_p + even_q
        r[target + apart_there, f] = p * odd_p + q * odd_q
        r[target + 2 * apart_there, f] = pp * even_p + qq * even_q
        r[target + 3 * apart_there, f] = ppp * odd_p + qqq * odd_q + m5


@compiled
def _take_gradient(dy: Array, first: int, down: int, across: int, wanted: Array) -> None:  # noqa: C901 - loops within loops
    """Write A y A^T of all tiles y of rows of ``dy`` (n, h, w, F), zero outside the image, to ``wanted`` (T, 36, F)."""
    images, H, W, F = dy.shape
    r = np.empty((2 * PLACES, LANES), dy.dtype)
    for n in range(images):
        for h in range(first, first + down):
            for w in range(across):
                tile = (n * down + h - first) * across + w
                for start in range(0, F, LANES):
                    for i in range(TILE):
                        for j in range(TILE):
                            u, v = h * TILE + i, w * TILE + j
                            if u < H and v < W:
                                for f in range(LANES):
                                    r[i * TILE + j, f] = dy[n, u, v, start + f]
                            else:
                                for f in range(LANES):
                                    r[i * TILE + j, f] = 0
                    for j in range(TILE):
                        _want(r, j, TILE, PLACES + j, TILE)
                    for i in range(SEEN):
                        _want(r, PLACES + i * TILE, 1, i * SEEN, 1)
                    _store(r, wanted, tile, start)


@inlined
def _want(r: Array, source: int, apart: int, target: int, apart_there: int) -> None:
    """A y of four numbers y for each lane, the transpose of ``_give``."""
    p, q = r.dtype.type(P), r.dtype.type(Q)
    pp, qq, ppp, qqq = r.dtype.type(P**2), r.dtype.type(Q**2), r.dtype.type(P**3), r.dtype.type(Q**3)
    for f in range(LANES):
        y0, y1, y2, y3 = r[source, f], r[source + apart, f], r[source + 2 * apart, f], r[source + 3 * apart, f]
        even_p, odd_p = y0 + pp * y2, p * y1 + ppp * y3
        even_q, odd_q = y0 + qq * y2, q * y1 + qqq * y3
        r[target, f] = y0
        r[target + apart_there, f] = even_p + odd_p
        r[target + 2 * apart_there, f] = even_p - odd_p
        r[target + 3 * apart_there, f] = even_q + odd_q
        r[target + 4 * apart_there, f] = even_q - odd_q
        r[target + 5 * apart_there, f] = y3


def warm_up(dtype: np.dtype[Any]) -> None:
    """Compile the kernels for arrays of ``dtype``."""
    image, tiles = np.zeros((1, TILE, TILE, LANES), dtype), np.zeros((1, PLACES, LANES), dtype)
    _take_image(image, 1, 1, 1, 1, tiles)
    _put(tiles, np.zeros(LANES, dtype), 0, 1, 1, image)
    _take_gradient(image, 0, 1, 1, tiles)
