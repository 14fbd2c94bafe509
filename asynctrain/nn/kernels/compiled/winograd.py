"""Winograd's minimal filtering F(4x4, 3x3), compiled; see ``kernels.winograd`` for the method.

numpy transforms both axes of a tile at once by a matrix product of 36x36 numbers; here one axis comes after the other,
and each by a third of the operations, as the interpolation points are 0, p, -p, q, -q with p q = 1 and infinity: with
even and odd parts apart, rows for a point and for its negative share their terms. ``LANES`` channels of one tile are
transformed at a time, in registers; where C or F is no multiple of them, numpy's kernels do the work.

A convolution is one call: for each block of tiles, the transforms and the 36 products.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn.kernels import winograd
from asynctrain.nn.kernels.compiled.jit import compiled, inlined
from asynctrain.nn.kernels.compiled.lanes import LANES, load, load_inside, multiply, spread, store
from asynctrain.nn.kernels.conv import Pair
from asynctrain.nn.kernels.winograd import POINTS, SEEN, TILE, blocks, matrices

P, Q = POINTS[1], POINTS[3]
PLACES = SEEN * SEEN
TRANSFORM = 12  # multiply-adds of the products that transforming a number costs in time
BLOCK_BYTES = 512 * 1024  # of the transformed tiles of a block, of both kinds, so that they stay in cache
FEWEST, MOST = 24, 96  # tiles in a block


def _fits(channels: int, filters: int) -> bool:
    return channels % LANES == 0 and filters % LANES == 0


@lru_cache(maxsize=256)
def pays(output: Shape, channels: int) -> bool:
    """Return whether this is faster than columns, by the rule of ``kernels.winograd.pays`` with figures of its own."""
    return winograd.pays(output, channels, TRANSFORM) if _fits(channels, output[3]) else winograd.pays(output, channels)


@lru_cache(maxsize=256)
def _tiles_at_once(output: Shape, channels: int, itemsize: int) -> int:
    """Return how many tiles of an ``output`` (N, h, w, F) make a block."""
    wanted = BLOCK_BYTES // (PLACES * (channels + output[3]) * itemsize)
    return min(blocks(output).tiles, max(FEWEST, min(MOST, wanted)))


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

    The arguments are those of ``kernels.winograd.correlate``; ``seen`` is not used.
    """
    C, F = weight.shape[2:]
    if not _fits(C, F):
        return winograd.correlate(x, weight, corner, out=out, spectrum=spectrum, scratch=scratch, bias=bias, seen=seen)
    at_once = _tiles_at_once(out.shape, C, x.itemsize)
    start = np.zeros(F, x.dtype) if bias is None else bias.copy()  # which, unlike a bias, is never read-only
    _transform_weight(weight, matrices(x.dtype).filter, spectrum)
    _correlate(x, corner, spectrum, start, out, scratch[0], scratch[1], at_once)
    return out


def correlate_backward_input(
    weight: Array, dy: Array, corner: Pair, *, out: Array, flipped: Array, spectrum: Array, scratch: Array
) -> Array:
    """Write the transpose of ``correlate``, applied to dy, into ``out`` and return it.

    The arguments are those of ``kernels.winograd.correlate_backward_input``.
    """
    corner = 2 - corner[0], 2 - corner[1]
    if not _fits(*weight.shape[2:]):
        np.copyto(flipped, weight[::-1, ::-1].swapaxes(2, 3))
        return winograd.correlate(dy, flipped, corner, out=out, spectrum=spectrum, scratch=scratch)
    _flip(weight, flipped)
    return correlate(dy, flipped, corner, out=out, spectrum=spectrum, scratch=scratch)


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

    The arguments are those of ``kernels.winograd.correlate_backward_params``; ``seen`` and ``partial`` are not used.
    """
    C, F = out.shape[2:]
    if not _fits(C, F):
        return winograd.correlate_backward_params(
            x, dy, corner, out=out, spectrum=spectrum, partial=partial, scratch=scratch, seen=seen
        )
    at_once = _tiles_at_once(dy.shape, C, x.itemsize)
    _correlate_backward_params(x, corner, dy, matrices(x.dtype).filter, spectrum, out, scratch[0], scratch[1], at_once)
    return out


@compiled
def _correlate(
    x: Array,
    corner: Pair,
    spectrum: Array,
    bias: Array,
    y: Array,
    tiles: Array,
    products: Array,
    at_once: int,
) -> None:
    """``tiles`` and ``products`` are scratch of (``at_once``, 36, C) and (``at_once``, 36, F) elements."""
    C, F = spectrum.shape[1:]
    N, h, w, _ = y.shape
    count = N * -(-h // TILE) * -(-w // TILE)
    r = np.empty(PLACES * LANES, x.dtype)
    for first in range(0, count, at_once):
        here = min(at_once, count - first)
        for tile in range(here):
            _take_image(x, corner, y.shape, first + tile, tiles, tile * PLACES * C, r)
        for place in range(PLACES):
            a, b = (tiles, place * C, PLACES * C, 1), (spectrum, place * C * F, F, 1)
            multiply(a, b, (products, place * F, PLACES * F, 1), here, F, C, False)
        for tile in range(here):
            _put(products, tile * PLACES * F, bias, y, first + tile, r)


@compiled
def _correlate_backward_params(
    x: Array,
    corner: Pair,
    dy: Array,
    to_spectrum: Array,
    spectrum: Array,
    dweight: Array,
    tiles: Array,
    wanted: Array,
    at_once: int,
) -> None:
    """``tiles`` and ``wanted`` are scratch of (``at_once``, 36, C) and (``at_once``, 36, F) elements."""
    C, F = dweight.shape[2:]
    N, h, w, _ = dy.shape
    count = N * -(-h // TILE) * -(-w // TILE)
    r = np.empty(PLACES * LANES, x.dtype)
    for first in range(0, count, at_once):
        here = min(at_once, count - first)
        for tile in range(here):
            _take_image(x, corner, dy.shape, first + tile, tiles, tile * PLACES * C, r)
            _take_gradient(dy, first + tile, wanted, tile * PLACES * F, r)
        for place in range(PLACES):
            a, b = (tiles, place * C, 1, PLACES * C), (wanted, place * F, PLACES * F, 1)
            multiply(a, b, (spectrum, place * C * F, F, 1), C, F, here, first > 0)
    multiply((to_spectrum, 0, 1, 9), (spectrum, 0, C * F, 1), (dweight, 0, C * F, 1), 9, C * F, PLACES, False)


@compiled
def _transform_weight(weight: Array, matrix: Array, spectrum: Array) -> None:
    """Write G g G^T of all filters g; the ``matrix`` does both axes at once."""
    columns = weight.shape[2] * weight.shape[3]
    multiply((matrix, 0, 9, 1), (weight, 0, columns, 1), (spectrum, 0, columns, 1), PLACES, columns, 9, False)


@compiled
def _flip(weight: Array, flipped: Array) -> None:
    """Write the weights flipped in both axes, channels and filters exchanged."""
    _, _, C, F = weight.shape
    for i in range(3):
        for j in range(3):
            for f in range(F):
                for c in range(C):
                    flipped[2 - i, 2 - j, f, c] = weight[i, j, c, f]


@inlined
def _where(tile: int, output: Any) -> tuple[int, int, int]:
    """Return the image and the first row and column of a tile of an output (N, h, w, F)."""
    down, across = -(-output[1] // TILE), -(-output[2] // TILE)
    return tile // (down * across), tile // across % down * TILE, tile % across * TILE


@inlined
def _take_image(x: Array, corner: Pair, output: Any, tile: int, tiles: Array, at: int, r: Array) -> None:
    """Write B^T d B of a tile d of ``x`` (N, H, W, C), zero outside the image, to 36 x C elements of ``tiles``."""
    _, H, W, C = x.shape
    n, top, left = _where(tile, output)
    top, left = top - corner[0], left - corner[1]
    origin = ((n * H + top) * W + left) * C
    for start in range(0, C, LANES):
        for j in range(SEEN):
            place = origin + j * C + start
            inside = 0 <= left + j < W
            d = (
                load_inside(x, place, inside & (top >= 0) & (top < H)),
                load_inside(x, place + W * C, inside & (top >= -1) & (top + 1 < H)),
                load_inside(x, place + 2 * W * C, inside & (top >= -2) & (top + 2 < H)),
                load_inside(x, place + 3 * W * C, inside & (top >= -3) & (top + 3 < H)),
                load_inside(x, place + 4 * W * C, inside & (top >= -4) & (top + 4 < H)),
                load_inside(x, place + 5 * W * C, inside & (top >= -5) & (top + 5 < H)),
            )
            _store_six(r, j * LANES, SEEN * LANES, _see(d, x.dtype.type))
        for i in range(SEEN):
            row = i * SEEN * LANES
            _store_six(tiles, at + start + i * SEEN * C, C, _see(_load_six(r, row, LANES), x.dtype.type))


@inlined
def _load_six(r: Array, at: int, apart: int) -> Any:
    return (
        load(r, at),
        load(r, at + apart),
        load(r, at + 2 * apart),
        load(r, at + 3 * apart),
        load(r, at + 4 * apart),
        load(r, at + 5 * apart),
    )


@inlined
def _store_six(r: Array, at: int, apart: int, values: Any) -> None:
    store(r, at, values[0])
    store(r, at + apart, values[1])
    store(r, at + 2 * apart, values[2])
    store(r, at + 3 * apart, values[3])
    store(r, at + 4 * apart, values[4])
    store(r, at + 5 * apart, values[5])


@inlined
def _see(d: Any, scalar: Any) -> Any:
    """B^T d of six numbers d for each lane: the polynomials of which all points but one are roots."""
    d0, d1, d2, d3, d4, d5 = d
    p, q, two = spread(scalar(P)), spread(scalar(Q)), spread(scalar(P * P + Q * Q))
    pp, qq = spread(scalar(P * P)), spread(scalar(Q * Q))
    even_p, odd_p = d4 - qq * d2, p * (d3 - qq * d1)
    even_q, odd_q = d4 - pp * d2, q * (d3 - pp * d1)
    return (
        d0 - two * d2 + d4,
        even_p + odd_p,
        even_p - odd_p,
        even_q + odd_q,
        even_q - odd_q,
        d1 - two * d3 + d5,
    )


@inlined
def _put(products: Array, at: int, bias: Array, y: Array, tile: int, r: Array) -> None:
    """Write A^T m A + bias of a tile m, 36 x F elements of ``products``, to its place in ``y`` (N, h, w, F)."""
    _, H, W, F = y.shape
    n, top, left = _where(tile, y.shape)
    for start in range(0, F, LANES):
        for j in range(SEEN):
            m = _give(_load_six(products, at + start + j * F, SEEN * F), y.dtype.type)
            store(r, j * LANES, m[0])
            store(r, (SEEN + j) * LANES, m[1])
            store(r, (2 * SEEN + j) * LANES, m[2])
            store(r, (3 * SEEN + j) * LANES, m[3])
        b = load(bias, start)
        for i in range(min(TILE, H - top)):
            m = _give(_load_six(r, i * SEEN * LANES, LANES), y.dtype.type)
            place = ((n * H + top + i) * W + left) * F + start
            store(y, place, m[0] + b)
            if left + 1 < W:
                store(y, place + F, m[1] + b)
            if left + 2 < W:
                store(y, place + 2 * F, m[2] + b)
            if left + 3 < W:
                store(y, place + 3 * F, m[3] + b)


@inlined
def _give(m: Any, scalar: Any) -> Any:
    """A^T m of six numbers m for each lane: m_k is the value at point k, y_i the coefficient of the i-th power."""
    m0, m1, m2, m3, m4, m5 = m
    p, q, pp, qq = spread(scalar(P)), spread(scalar(Q)), spread(scalar(P**2)), spread(scalar(Q**2))
    ppp, qqq = spread(scalar(P**3)), spread(scalar(Q**3))
    even_p, odd_p, even_q, odd_q = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    return (
        m0 + even_p + even_q,
        p * odd_p + q * odd_q,
        pp * even_p + qq * even_q,
        ppp * odd_p + qqq * odd_q + m5,
    )


@inlined
def _take_gradient(dy: Array, tile: int, wanted: Array, at: int, r: Array) -> None:
    """Write A y A^T of a tile y of ``dy`` (N, h, w, F), zero outside the image, to 36 x F elements of ``wanted``."""
    _, H, W, F = dy.shape
    n, top, left = _where(tile, dy.shape)
    for start in range(0, F, LANES):
        for j in range(TILE):
            place = ((n * H + top) * W + left + j) * F + start
            inside = left + j < W
            y = (
                load_inside(dy, place, inside),
                load_inside(dy, place + W * F, inside & (top + 1 < H)),
                load_inside(dy, place + 2 * W * F, inside & (top + 2 < H)),
                load_inside(dy, place + 3 * W * F, inside & (top + 3 < H)),
            )
            _store_six(r, j * LANES, TILE * LANES, _want(y, dy.dtype.type))
        for i in range(SEEN):
            row = i * TILE * LANES
            y = load(r, row), load(r, row + LANES), load(r, row + 2 * LANES), load(r, row + 3 * LANES)
            _store_six(wanted, at + start + i * SEEN * F, F, _want(y, dy.dtype.type))


@inlined
def _want(y: Any, scalar: Any) -> Any:
    """A y of four numbers y for each lane, the transpose of ``_give``."""
    y0, y1, y2, y3 = y
    p, q, pp, qq = spread(scalar(P)), spread(scalar(Q)), spread(scalar(P**2)), spread(scalar(Q**2))
    ppp, qqq = spread(scalar(P**3)), spread(scalar(Q**3))
    even_p, odd_p = y0 + pp * y2, p * y1 + ppp * y3
    even_q, odd_q = y0 + qq * y2, q * y1 + qqq * y3
    return (y0, even_p + odd_p, even_p - odd_p, even_q + odd_q, even_q - odd_q, y3)


def warm_up(dtype: np.dtype[Any]) -> None:
    """Compile the kernels for arrays of ``dtype``, weights being read-only or not."""
    image = np.zeros((1, 1, 1, LANES), dtype)
    weight, spectrum = np.zeros((3, 3, LANES, LANES), dtype), np.zeros((PLACES, LANES, LANES), dtype)
    scratch = np.zeros(blocks(image.shape).scratch(LANES), dtype)
    correlate_backward_params(image, image, (1, 1), out=weight, spectrum=spectrum, partial=spectrum, scratch=scratch)
    read_only = weight.view()
    read_only.flags.writeable = False
    for weights in (weight, read_only):
        correlate(image, weights, (1, 1), out=image.copy(), spectrum=spectrum, scratch=scratch)
        correlate_backward_input(
            weights, image, (1, 1), out=image.copy(), flipped=weight.copy(), spectrum=spectrum, scratch=scratch
        )
