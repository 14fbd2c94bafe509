"""Convolution as matrix products over tiles of columns (im2col), and its two derivatives.

A tile is some rows of one image's output, or some whole images; its columns, the windows that those outputs see, are
copied side by side into scratch memory that stays in the second-level cache, and one matrix product consumes them.
Which tiles, and how the columns lie, is a fixed rule of the shapes.

Letters: N images, H x W pixels, C channels in, F filters out, kh x kw window, K = kh kw C numbers in a window. Images
are (N, H, W, C), weights (kh, kw, C, F). Padding is in the image already: see ``place``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import as_strided

from asynctrain.arena import Array, Shape

TILE_BYTES = 512 * 1024
SHORT_RUN = 16  # elements: rows of a window that are shorter are better copied across windows

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the outputs of one convolution are cut; ``images`` is above 1 only where ``rows`` is the whole height."""

    images: int
    rows: int
    width: int  # of the output
    depth: int  # K
    across: bool  # columns are stored (K, outputs), one element of all windows after the other; else (outputs, K)

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
def tiling(output: Shape, window: Pair, channels: int, itemsize: int) -> Tiling:
    """Return the tiling for an ``output`` of shape (N, H, W, F), so that a tile's columns take about 512 KiB."""
    N, H, W, _ = output
    depth = window[0] * window[1] * channels
    rows = max(1, TILE_BYTES // (W * depth * itemsize))
    across = window[1] * channels < SHORT_RUN
    return Tiling(min(N, max(1, rows // H)), min(rows, H), W, depth, across)


def place(x: Array, corner: Pair, stride: Pair, *, out: Array) -> Array:
    """Write zeros into ``out`` and ``x`` over them, its pixels ``stride`` apart from ``corner`` on, and return it.

    This pads an image (stride 1), and dilates and pads an output's gradient. A negative corner, or too small an
    ``out``, crops. x: (N, h, w, C). out: (N, H, W, C).
    """
    out.fill(0)
    target, source = zip(
        *(_overlap(x.shape[axis], out.shape[axis], corner[axis - 1], stride[axis - 1]) for axis in (1, 2)), strict=True
    )
    out[:, target[0], target[1]] = x[:, source[0], source[1]]
    return out


def _overlap(length: int, room: int, corner: int, stride: int) -> tuple[slice, slice]:
    """Return which of ``room`` places are taken by which of ``length`` elements at corner, corner + stride, ..."""
    first = max(0, -(corner // stride))
    last = min(length, max(first, -(-(room - corner) // stride)))
    start = corner + first * stride
    return slice(start, start + (last - first) * stride, stride), slice(first, last)


def correlate(x: Array, weight: Array, stride: Pair, *, out: Array, columns: Array, bias: Array | None = None) -> Array:
    """Write y[n, h, w, f] = b[f] + sum_ijc x[n, h s + i, w t + j, c] weight[i, j, c, f] and return it.

    Args:
        x: (N, H, W, C), padded.
        weight: (kh, kw, C, F).
        stride: (s, t).
        out: (N, (H - kh) // s + 1, (W - kw) // t + 1, F).
        columns: scratch of ``tiling(...).scratch`` elements.
        bias: (F,).
    """
    kh, kw, C, F = weight.shape
    plan = tiling(out.shape, (kh, kw), C, x.itemsize)
    windows = _windows(x, (kh, kw), stride, out.shape)
    matrix = weight.reshape(-1, F)
    bias_row = None if bias is None else np.tile(bias, plan.width)  # long runs: F alone may be very few
    for tile in plan.cut(out.shape):
        y = out[tile].reshape(-1, F)
        np.matmul(_columns(windows[tile], columns, plan), matrix, out=y)
        if bias_row is not None:
            rows = y.reshape(-1, plan.width * F)
            np.add(rows, bias_row, out=rows)
    return out


def correlate_backward_input(
    weight: Array, dy: Array, corner: Pair, stride: Pair, *, out: Array, spread: Array, flipped: Array, columns: Array
) -> Array:
    """Write the transpose of ``correlate``, applied to dy, into ``out`` and return it.

    It is itself a correlation: of dy, dilated by the stride and padded, with the weights flipped in both axes and their
    channels exchanged.

    Args:
        weight: (kh, kw, C, F).
        dy: (N, h, w, F).
        corner: how many rows and columns of padding came before the image.
        stride: of the forward pass.
        out: (N, H, W, C), the gradient of the image without its padding.
        spread: scratch (N, H + kh - 1, W + kw - 1, F).
        flipped: scratch (kh, kw, F, C).
        columns: scratch of ``tiling(out.shape, (kh, kw), F, itemsize).scratch`` elements.
    """
    kh, kw, _, _ = weight.shape
    place(dy, (kh - 1 - corner[0], kw - 1 - corner[1]), stride, out=spread)
    np.copyto(flipped, weight[::-1, ::-1].swapaxes(2, 3))
    return correlate(spread, flipped, (1, 1), out=out, columns=columns)


def correlate_backward_params(
    x: Array,
    dy: Array,
    stride: Pair,
    *,
    out_weight: Array,
    out_bias: Array,
    columns: Array,
    partial: Array,
    ones: Array,
) -> None:
    """Write dweight[i, j, c, f] = sum_nhw x[n, h s + i, w t + j, c] dy[n, h, w, f] and dbias[f] = sum_nhw dy[...].

    Args:
        x: (N, H, W, C), padded.
        dy: (N, h, w, F).
        stride: (s, t).
        out_weight: (kh, kw, C, F).
        out_bias: (F,).
        columns: scratch of ``tiling(dy.shape, (kh, kw), C, itemsize).scratch`` elements.
        partial: scratch (K, F), one tile's share.
        ones: scratch (N h w,).
    """
    kh, kw, C, F = out_weight.shape
    plan = tiling(dy.shape, (kh, kw), C, x.itemsize)
    windows = _windows(x, (kh, kw), stride, dy.shape)
    total = out_weight.reshape(-1, F)
    for number, tile in enumerate(plan.cut(dy.shape)):
        matrix = _columns(windows[tile], columns, plan)
        np.matmul(matrix.T, dy[tile].reshape(-1, F), out=total if number == 0 else partial)
        if number > 0:
            np.add(total, partial, out=total)
    ones.fill(1)
    np.matmul(ones, dy.reshape(-1, F), out=out_bias)  # far faster than a sum along the long axis


def _windows(x: Array, window: Pair, stride: Pair, output: Shape) -> Array:
    """Return the windows as a view (N, h, w, kh, kw, C) of x."""
    n, h, w, c = x.strides
    shape = (*output[:3], *window, x.shape[3])
    return as_strided(x, shape, (n, h * stride[0], w * stride[1], h, w, c), writeable=False)


def _columns(windows: Array, scratch: Array, plan: Tiling) -> Array:
    """Copy a tile's windows (n, h, w, kh, kw, C) into ``scratch``; return them as a matrix (n h w, K)."""
    part = scratch[: windows.size]
    if plan.across:
        windows = windows.transpose(3, 4, 5, 0, 1, 2)
        np.copyto(part.reshape(windows.shape), windows)
        return part.reshape(plan.depth, -1).T
    np.copyto(part.reshape(windows.shape), windows)
    return part.reshape(-1, plan.depth)
