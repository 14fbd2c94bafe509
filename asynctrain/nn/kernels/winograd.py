"""3x3 convolution of stride 1 by Winograd's minimal filtering F(4x4, 3x3), and its two derivatives.

After Lavin and Gray 2016, arXiv:1509.09308. The output is cut into tiles of 4x4 pixels, each of which sees 6x6 pixels d
of the image. With g a 3x3 filter, and * element by element,

    y = A^T [ sum_c (G g_c G^T) * (B^T d_c B) ] A

takes 36 multiplications for 16 outputs where the definition takes 144. With both axes of a tile in one, B^T d B is one
product with a 36x36 matrix, A^T m A with a 16x36 one. The products with filters, summed over channels and for many
tiles at once, are 36 matrix products. The work goes in blocks of tiles that stay in the second-level cache.

Letters as in ``conv``; th x tw tiles cover an output, T tiles make a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from asynctrain.arena import Array, Shape
from asynctrain.nn.kernels.conv import Pair, overlap

TILE = 4  # pixels of the output along each axis of a tile
SEEN = 6  # of the input
MARGIN = SEEN - TILE
TILES = 192  # in a block, at most
FEWEST = 64  # where filters are many, and their tiles would be too large for the cache
TOGETHER = 4096  # tiles times filters: the fewer the filters, the more tiles at once


class _Matrices(NamedTuple):
    """The transforms of both axes at once, tiles and filters as columns of their pixels in row order."""

    image: Array  # B^T (x) B^T, (36, 36)
    filter: Array  # G (x) G, (36, 9)
    output: Array  # A^T (x) A^T, (16, 36)


# The interpolation points, besides infinity. As each is the negative or the inverse of the others, the error is a
# fifth of that with the usual 0, 1, -1, 2, -2, whose merit, small integers, is none in a matrix product.
POINTS = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)


@lru_cache(maxsize=4)
def matrices(dtype: np.dtype[Any]) -> _Matrices:
    """Return the transforms by the construction of Toom and Cook."""
    points = np.array(POINTS)
    A, B, G = np.zeros((SEEN, TILE)), np.zeros((SEEN, SEEN)), np.zeros((SEEN, 3))
    A[:-1], A[-1, -1] = np.vander(points, TILE, increasing=True), 1
    G[:-1], G[-1, -1] = np.vander(points, 3, increasing=True), 1
    for row in range(len(points)):
        others = np.delete(points, row)
        G[row] /= np.prod(points[row] - others)
        B[row, :-1] = np.poly(others)[::-1]
    B[-1] = np.poly(points)[::-1]
    return _Matrices(*(np.kron(matrix, matrix).astype(dtype) for matrix in (B, G, A.T)))


@dataclass(frozen=True, slots=True)
class Blocks:
    """How the tiles of one convolution are blocked; ``images`` is above 1 only where ``rows`` is the whole height."""

    images: int
    rows: int  # of tiles
    across: int  # tw
    down: int  # th

    @property
    def tiles(self) -> int:
        """T, in a whole block."""
        return self.images * self.rows * self.across

    def seen(self, images: int, channels: int) -> Shape:
        """The shape of the transformed tiles of so many images, block by block; the last may not be full."""
        return -(-images // self.images) * -(-self.down // self.rows), SEEN * SEEN, self.tiles, channels

    def scratch(self, channels: int) -> Shape:
        """The shape of the three pieces of scratch memory, ``channels`` being the larger of C and F."""
        pixels = self.images * (self.rows * TILE + MARGIN) * (self.across * TILE + MARGIN)
        return 3, max(pixels, self.tiles * SEEN * SEEN) * channels

    def count(self, images: slice, rows: slice) -> int:
        """Return how many tiles are in a block."""
        count: int = (images.stop - images.start) * (rows.stop - rows.start) * self.across
        return count

    def cut(self, images: int) -> Iterator[tuple[slice, slice]]:
        """Yield the blocks as slices of the images and of the rows of tiles."""
        for image in range(0, images, self.images):
            for row in range(0, self.down, self.rows):
                yield slice(image, min(images, image + self.images)), slice(row, min(self.down, row + self.rows))


@lru_cache(maxsize=256)
def blocks(output: Shape) -> Blocks:
    """Return the blocks for an ``output`` of shape (N, h, w, F)."""
    N, h, w, F = output
    down, across = -(-h // TILE), -(-w // TILE)
    rows = max(1, min(TILES, max(FEWEST, TOGETHER // F)) // across)
    return Blocks(min(N, max(1, rows // down)), min(rows, down), across, down)


@lru_cache(maxsize=256)
def pays(output: Shape, channels: int, transform: int = 43) -> bool:
    """Return whether this is faster than columns (``conv``) for an ``output`` (N, h, w, F) and C ``channels``.

    A rule of the shapes, fitted to measurements, that counts multiply-adds: those of the products, and as many as
    copying a pixel's window (6 for each channel in and out), transforming a tile (``transform``) and transforming the
    filters (30 tiles' worth) cost in time.
    """
    N, h, w, F = output
    tiles = N * -(-h // TILE) * -(-w // TILE)
    products, channels_in_all = channels * F, channels + F
    by_columns = N * h * w * 9 * (products + 6 * channels_in_all)
    by_tiles = SEEN * SEEN * (tiles * (products + transform * channels_in_all) + 30 * products)
    return by_tiles < by_columns


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

    x is zero outside the image.

    Args:
        x: (N, H, W, C), not padded.
        weight: (3, 3, C, F).
        corner: (top, left), how many rows and columns of padding come before the image.
        out: (N, h, w, F).
        spectrum: scratch (36, C, F).
        scratch: of shape ``blocks(out.shape).scratch(max(C, F))``.
        bias: (F,).
        seen: of shape ``blocks(out.shape).seen(N, C)``, takes B^T d B of all tiles for the weight gradient.
    """
    plan = blocks(out.shape)
    F = weight.shape[3]
    np.matmul(matrices(x.dtype).filter, weight.reshape(9, -1), out=spectrum.reshape(SEEN * SEEN, -1))
    bias_row = None if bias is None else np.tile(bias, TILE)
    to_output = matrices(x.dtype).output
    regions = _regions(out)
    key = None
    for number, (images, rows) in enumerate(plan.cut(len(out))):
        if key != (key := _key(images, rows)):  # as a rule all blocks but the last have one
            room = _room(x, corner, images, rows, plan, scratch)
            T = len(room.gathered)
            products, y = _part(scratch[0], (T, SEEN * SEEN, F)), _part(scratch[1], (T, TILE * TILE, F))
            by_place, pieces = products.swapaxes(0, 1), _pieces(regions, y, images, rows, plan)
        tiles = _transformed(x, images, room, None if seen is None else seen[number])
        np.matmul(tiles, spectrum, out=by_place)
        np.matmul(to_output, products, out=y)
        for pixels, tile in pieces:
            if bias_row is None:
                np.copyto(pixels[images], tile)
            else:
                np.add(tile, bias_row[: tile.shape[-1]], out=pixels[images])
    return out


def correlate_backward_input(
    weight: Array, dy: Array, corner: Pair, *, out: Array, flipped: Array, spectrum: Array, scratch: Array
) -> Array:
    """Write the transpose of ``correlate``, applied to dy, into ``out`` and return it.

    It is a correlation of the same kind: of dy, with the weights flipped in both axes and their channels and filters
    exchanged.

    Args:
        weight: (3, 3, C, F).
        dy: (N, h, w, F).
        corner: of the forward pass.
        out: (N, H, W, C), the gradient of the image without its padding.
        flipped: scratch (3, 3, F, C).
        spectrum: scratch (36, F, C).
        scratch: of shape ``blocks(out.shape).scratch(max(C, F))``.
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

    It is the transpose of ``correlate`` in the weights: G^T [ sum_tiles (B^T d B) * (A dy A^T) ] G.

    Args:
        x: (N, H, W, C), not padded.
        dy: (N, h, w, F).
        corner: of the forward pass.
        out: (3, 3, C, F).
        spectrum: scratch (36, C, F).
        partial: scratch (36, C, F), one block's share.
        scratch: of shape ``blocks(dy.shape).scratch(max(C, F))``.
        seen: as ``correlate`` filled it; else the tiles are transformed again, as they were.
    """
    plan = blocks(dy.shape)
    _, to_filter, to_output = matrices(x.dtype)
    regions = _regions(dy)
    F = dy.shape[3]
    key = None
    for number, (images, rows) in enumerate(plan.cut(len(dy))):
        if key != (key := _key(images, rows)):
            T = plan.count(images, rows)
            given, wanted = _part(scratch[0], (T, TILE * TILE, F)), _part(scratch[2], (T, SEEN * SEEN, F))
            by_place, pieces = wanted.swapaxes(0, 1), _pieces(regions, given, images, rows, plan)
        if seen is None:
            tiles = _transformed(x, images, _room(x, corner, images, rows, plan, scratch))
        else:
            tiles = seen[number, :, :T]
        if sum(tile.size for _, tile in pieces) < given.size:  # zeros where there are no pixels
            given.fill(0)
        for pixels, tile in pieces:
            np.copyto(tile, pixels[images])
        np.matmul(to_output.T, given, out=wanted)
        np.matmul(tiles.swapaxes(1, 2), by_place, out=spectrum if number == 0 else partial)
        if number > 0:
            np.add(spectrum, partial, out=spectrum)
    np.matmul(to_filter.T, spectrum.reshape(SEEN * SEEN, -1), out=out.reshape(9, -1))
    return out


def _key(images: slice, rows: slice) -> tuple[int, int, int]:
    """Return what blocks must have in common to use the same views of scratch memory."""
    return images.stop - images.start, rows.start, rows.stop


class _Room(NamedTuple):
    """Where a block's tiles are cut out and transformed: views of scratch memory, good for all blocks of a key."""

    pixels: tuple[slice, slice]  # of the image that the block sees
    inner: Array  # those pixels within a piece of padded image, whose margins are zero
    windows: Array  # the tiles in there, (n, th, tw, 6, 6 C), which overlap
    cut_out: Array  # copies of them
    gathered: Array  # the same as (T, 36, C)
    transformed: Array  # (36, T, C)


def _room(x: Array, corner: Pair, images: slice, rows: slice, plan: Blocks, scratch: Array) -> _Room:
    """Return the room for a block, the margins of the piece of image zero."""
    _, H, W, C = x.shape
    N, down, across = images.stop - images.start, rows.stop - rows.start, plan.across
    padded = _part(scratch[2], (N, down * TILE + MARGIN, across * TILE + MARGIN, C))
    padded.fill(0)
    high, from_rows = overlap(H, padded.shape[1], corner[0] - rows.start * TILE)
    wide, from_columns = overlap(W, padded.shape[2], corner[1])
    n, h, w, c = padded.strides
    windows = as_strided(padded, (N, down, across, SEEN, SEEN * C), (n, h * TILE, w * TILE, h, c), writeable=False)
    T = plan.count(images, rows)
    gathered = _part(scratch[0], (T, SEEN * SEEN, C))
    transformed = _part(scratch[1], (SEEN * SEEN, T, C))
    inner = padded[:, high, wide]
    return _Room((from_rows, from_columns), inner, windows, gathered.reshape(windows.shape), gathered, transformed)


def _transformed(x: Array, images: slice, room: _Room, kept: Array | None = None) -> Array:
    """Return B^T d B (36, T, C) for the tiles of a block of images, in ``kept``, if given, else in scratch.

    In this order the products, each of which takes one of the 36, read memory as it comes.
    """
    np.copyto(room.inner, x[images, *room.pixels])
    np.copyto(room.cut_out, room.windows)
    tiles = room.transformed if kept is None else kept[:, : len(room.gathered)]
    np.matmul(matrices(x.dtype).image, room.gathered, out=tiles.swapaxes(0, 1))
    return tiles


def _pieces(
    regions: Sequence[_Region], tiles: Array, images: slice, rows: slice, plan: Blocks
) -> list[tuple[Array, Array]]:
    """Return for each region its pixels in the block's rows, of all images, and their place in tiles (T, 16, F)."""
    N, down = images.stop - images.start, rows.stop - rows.start
    in_rows = tiles.reshape(N, down, plan.across, TILE, -1)
    return [(pixels, in_rows[place]) for region in regions for pixels, place in [region.part(rows)]]


def _part(scratch: Array, shape: Shape) -> Array:
    """Return the beginning of one piece of scratch memory as an array of ``shape``."""
    return scratch[: prod(shape)].reshape(shape)


class _Region(NamedTuple):
    """The pixels of images whose tiles are of one size, p x q."""

    pixels: Array  # a view (n, th, tw, p, q F) of the images
    down: slice  # which tiles these are
    across: slice

    def part(self, rows: slice) -> tuple[Array, tuple[slice, ...]]:
        """Return the pixels in a block of rows of tiles, of all images, and their place in its tiles."""
        first, last = max(rows.start, self.down.start), min(rows.stop, self.down.stop)
        last = max(first, last)
        pixels = self.pixels[:, first - self.down.start : last - self.down.start]
        _, _, _, p, run = pixels.shape
        return pixels, (slice(None), slice(first - rows.start, last - rows.start), self.across, slice(p), slice(run))


def _regions(y: Array) -> Sequence[_Region]:
    """Return the pixels of ``y`` (n, h, w, F) by the size of their tiles, as views.

    There is one region where the tiles fit, and up to four where those at the end have fewer pixels.
    """
    n, h, w, F = y.shape
    regions = []
    for (tall, th, p), (wide, tw, q) in product(_runs(h), _runs(w)):
        part = y[:, tall, wide].reshape(n, -1, p, (wide.stop - wide.start) // q, q * F)
        regions.append(_Region(part.swapaxes(2, 3), th, tw))
    return regions


def _runs(length: int) -> Iterator[tuple[slice, slice, int]]:
    """Yield the pixels, the tiles, and the pixels in each: of the whole tiles, then of the last one if it is not."""
    whole, rest = divmod(length, TILE)
    if whole:
        yield slice(0, whole * TILE), slice(0, whole), TILE
    if rest:
        yield slice(whole * TILE, length), slice(whole, whole + 1), rest
