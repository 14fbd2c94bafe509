"""Convolution as matrix products over tiles of columns (im2col), and its two derivatives.

A tile is some rows of one image's output, or some whole images; its columns, the windows that those outputs see, are
copied side by side into scratch memory that stays in the second-level cache, and one matrix product consumes them.
Which tiles, and how the columns lie, is a fixed rule of the shapes.

Letters: N images, H x W pixels, C channels in, F filters out, G groups, kh x kw window, K = kh kw C / G numbers that
one output sees. Images are (N, H, W, C), weights (kh, kw, C / G, F). Padding is in the image already: see ``place``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np
from numpy.lib.stride_tricks import as_strided

from asynctrain.arena import Array, Shape

TILE_BYTES = 512 * 1024
SMALL_PRODUCT = 1_000_000  # multiply-adds: up to here OpenBLAS skips a packing that products with few filters feel
FEWEST_OUTPUTS = 256  # in a tile that is made smaller for that
SHORT_RUN = 16  # elements: rows of a window that are shorter are better copied across windows

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the windows of a convolution look like: their size, how far apart they and their pixels lie, and groups."""

    window: Pair  # (kh, kw)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    groups: int = 1  # G: the filters f of group g = f // (F / G) see the channels of that group alone

    @property
    def reach(self) -> Pair:
        """The pixels from the first to the last of a window, high and wide, both included."""
        (kh, kw), (high, wide) = self.window, self.dilation
        return (kh - 1) * high + 1, (kw - 1) * wide + 1


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the outputs of one convolution are cut; ``images`` is above 1 only where ``rows`` is the whole height."""

    images: int
    rows: int
    width: int  # of the output
    depth: int  # G K
    across: bool  # columns are stored (G, K, outputs), one element of all windows after the other; else (G, outputs, K)

    @property
    def scratch(self) -> int:
        """The elements of scratch memory that one tile's columns take."""
        return self.images * self.rows * self.width * self.depth

    def cut(self, shape: Shape) -> Iterator[tuple[slice, slice]]:
        """Yield the tiles of an output (N, H, W, F) as slices of its first two axes."""
        for image in range(0, shape[0], self.images):
            for row in range(0, shape[1], self.rows):
                yield slice(image, image + self.images), slice(row, row + self.rows)


@lru_cache(maxsize=256)
def tiling(output: Shape, geometry: Geometry, channels: int, itemsize: int) -> Tiling:
    """Return the tiling for an ``output`` of shape (N, H, W, F), so that a tile's columns take 512 KiB or less."""
    N, H, W, F = output
    kh, kw = geometry.window
    depth = kh * kw * channels
    outputs = TILE_BYTES // (depth * itemsize)
    small = SMALL_PRODUCT * geometry.groups**2 // (depth * F)
    if small >= FEWEST_OUTPUTS:
        outputs = min(outputs, small)
    rows = max(1, outputs // W)
    across = kw * channels // geometry.groups < SHORT_RUN
    return Tiling(min(N, max(1, rows // H)), min(rows, H), W, depth, across)


def place(x: Array, corner: Pair, stride: Pair, *, out: Array) -> Array:
    """Write zeros into ``out`` and ``x`` over them, its pixels ``stride`` apart from ``corner`` on, and return it.

    This pads an image (stride 1), and spreads and pads an output's gradient. A negative corner, or too small an
    ``out``, crops. x: (N, h, w, C). out: (N, H, W, C).
    """
    rows, from_rows = overlap(x.shape[1], out.shape[1], corner[0], stride[0])
    columns, from_columns = overlap(x.shape[2], out.shape[2], corner[1], stride[1])
    if stride == (1, 1):  # the margins alone: the rest is overwritten
        out[:, : rows.start] = 0
        out[:, rows.stop :] = 0
        out[:, rows, : columns.start] = 0
        out[:, rows, columns.stop :] = 0
    else:
        out.fill(0)
    out[:, rows, columns] = x[:, from_rows, from_columns]
    return out


def overlap(length: int, room: int, corner: int, stride: int = 1) -> tuple[slice, slice]:
    """Return which of ``room`` places are taken by which of ``length`` elements at corner, corner + stride, ..."""
    first = max(0, -(corner // stride))
    last = max(first, min(length, -(-(room - corner) // stride)))
    start = corner + first * stride
    return slice(start, start + (last - first) * stride, stride), slice(first, last)


def correlate(
    x: Array, weight: Array, geometry: Geometry, *, out: Array, columns: Array, bias: Array | None = None
) -> Array:
    """Write y[n, h, w, f] = b[f] + sum_ijc x[n, h s + i d, w t + j e, c] weight[i, j, c, f] and return it.

    With groups, c counts the channels of the group of f.

    Args:
        x: (N, H, W, C), padded.
        weight: (kh, kw, C / G, F).
        geometry: stride (s, t) and dilation (d, e).
        out: (N, (H - (kh - 1) d - 1) // s + 1, (W - (kw - 1) e - 1) // t + 1, F).
        columns: scratch of ``tiling(...).scratch`` elements.
        bias: (F,).
    """
    plan = tiling(out.shape, geometry, x.shape[3], x.itemsize)
    windows = _windows(x, geometry, out.shape)
    matrices = _by_group(weight, geometry.groups)
    bias_row = None if bias is None else np.tile(bias, plan.width)  # long runs: F alone may be very few
    for tile in plan.cut(out.shape):
        y = out[tile]
        np.matmul(_columns(windows[tile], columns, plan), matrices, out=_by_group(y, geometry.groups))
        if bias_row is not None:
            rows = y.reshape(-1, len(bias_row))
            np.add(rows, bias_row, out=rows)
    return out


def correlate_backward_input(
    weight: Array,
    dy: Array,
    corner: Pair,
    geometry: Geometry,
    *,
    out: Array,
    padded: Array,
    flipped: Array,
    columns: Array,
) -> Array:
    """Write the transpose of ``correlate``, applied to dy, into ``out`` and return it, where the stride is 1.

    It is itself a correlation: of dy, padded, with the weights flipped in both axes and, within each group, their
    channels and filters exchanged.

    Args:
        weight: (kh, kw, C / G, F).
        dy: (N, h, w, F).
        corner: how many rows and columns of padding came before the image.
        geometry: of the forward pass.
        out: (N, H, W, C), the gradient of the image without its padding.
        padded: scratch (N, H + reach - 1, W + reach - 1, F), the reach of the geometry high and wide.
        flipped: scratch (kh, kw, F / G, C).
        columns: scratch of ``tiling(out.shape, geometry, F, itemsize).scratch`` elements.
    """
    high, wide = geometry.reach
    place(dy, (high - 1 - corner[0], wide - 1 - corner[1]), (1, 1), out=padded)
    kh, kw, _, F = weight.shape
    G = geometry.groups
    exchanged = weight.reshape(kh, kw, -1, G, F // G)[::-1, ::-1].transpose(0, 1, 4, 3, 2)
    np.copyto(flipped.reshape(exchanged.shape), exchanged)
    return correlate(padded, flipped, geometry, out=out, columns=columns)


def scatter(
    weight: Array, dy: Array, corner: Pair, geometry: Geometry, *, out: Array, padded: Array, columns: Array
) -> Array:
    """Write the transpose of ``correlate``, applied to dy, into ``out`` and return it, for any stride.

    The gradients of a tile's columns are one matrix product, and are added to the pixels that the columns came from.

    Args:
        weight: (kh, kw, C / G, F).
        dy: (N, h, w, F).
        corner: how many rows and columns of padding came before the image.
        geometry: of the forward pass.
        out: (N, H, W, C), the gradient of the image without its padding.
        padded: scratch (N, ., ., C), the size of the image with its padding.
        columns: scratch of ``tiling(dy.shape, geometry, C, itemsize).scratch`` elements.
    """
    plan = tiling(dy.shape, geometry, out.shape[3], dy.itemsize)
    padded.fill(0)
    windows = _windows(padded, geometry, dy.shape, writeable=True)
    transposed = _by_group(weight, geometry.groups).swapaxes(1, 2)
    for tile in plan.cut(dy.shape):
        pixels = windows[tile]
        matrices, places = _room(pixels.shape, columns, plan)
        np.matmul(_by_group(dy[tile], geometry.groups), transposed, out=matrices)
        for i, j in product(*map(range, geometry.window)):  # within one place of the window no two pixels are the same
            target = pixels[:, :, :, i, j]
            np.add(target, places[:, :, :, i, j], out=target)
    (top, left), (H, W) = corner, out.shape[1:3]
    np.copyto(out, padded[:, top : top + H, left : left + W])
    return out


def correlate_backward_params(
    x: Array,
    dy: Array,
    geometry: Geometry,
    *,
    out: Array,
    columns: Array,
    partial: Array,
) -> Array:
    """Write dweight[i, j, c, f] = sum_nhw x[n, h s + i d, w t + j e, c] dy[n, h, w, f] and return it.

    Args:
        x: (N, H, W, C), padded.
        dy: (N, h, w, F).
        geometry: stride (s, t) and dilation (d, e).
        out: (kh, kw, C / G, F).
        columns: scratch of ``tiling(dy.shape, geometry, C, itemsize).scratch`` elements.
        partial: scratch in the shape of ``out``, one tile's share.
    """
    plan = tiling(dy.shape, geometry, x.shape[3], x.itemsize)
    windows = _windows(x, geometry, dy.shape)
    for number, tile in enumerate(plan.cut(dy.shape)):
        share = out if number == 0 else partial
        matrices = _columns(windows[tile], columns, plan).swapaxes(1, 2)
        np.matmul(matrices, _by_group(dy[tile], geometry.groups), out=_by_group(share, geometry.groups))
        if number > 0:
            np.add(out, partial, out=out)
    return out


def bias_backward(dy: Array, *, out: Array, ones: Array) -> Array:
    """Write db[f] = sum_nhw dy[n, h, w, f] into ``out`` (F,) and return it; ``ones`` is scratch (N h w,)."""
    ones.fill(1)
    return np.matmul(ones, dy.reshape(len(ones), -1), out=out)  # far faster than a sum along the long axis


def _by_group(array: Array, groups: int) -> Array:
    """Return an array (..., F) as a view of matrices (G, ..., F / G), all but the last axis in one."""
    filters = array.shape[-1]
    return array.reshape(-1, groups, filters // groups).swapaxes(0, 1)


def _windows(x: Array, geometry: Geometry, output: Shape, *, writeable: bool = False) -> Array:
    """Return the windows as a view (N, h, w, kh, kw, G, C / G) of x; those of neighbours overlap."""
    n, h, w, c = x.strides
    (s, t), (d, e), G = geometry.stride, geometry.dilation, geometry.groups
    group = x.shape[3] // G
    shape = (*output[:3], *geometry.window, G, group)
    return as_strided(x, shape, (n, h * s, w * t, h * d, w * e, c * group, c), writeable=writeable)


def _columns(windows: Array, scratch: Array, plan: Tiling) -> Array:
    """Return a tile's windows (n, h, w, kh, kw, G, C / G) as matrices (G, n h w, K), copied into ``scratch``."""
    if windows.flags.c_contiguous:
        return _by_group(windows.reshape(-1, plan.depth), windows.shape[5])  # 1x1: the image itself
    matrices, places = _room(windows.shape, scratch, plan)
    np.copyto(places, windows)
    return matrices


def _room(shape: Shape, scratch: Array, plan: Tiling) -> tuple[Array, Array]:
    """Return the columns of a tile in ``scratch`` twice: as matrices (G, n h w, K), and in the ``shape`` of windows."""
    n, h, w, kh, kw, groups, channels = shape
    part = scratch[: prod(shape)]
    if plan.across:
        matrices = part.reshape(groups, kh * kw * channels, n * h * w).swapaxes(1, 2)
        return matrices, part.reshape(groups, kh, kw, channels, n, h, w).transpose(4, 5, 6, 1, 2, 0, 3)
    matrices = part.reshape(groups, n * h * w, kh * kw * channels)
    return matrices, part.reshape(groups, n, h, w, kh, kw, channels).transpose(1, 2, 3, 4, 5, 0, 6)
