"""Convolution of few weights without columns, compiled, and its two derivatives; see ``kernels.conv``.

The pixels that one output sees in one row of the image lie side by side, so the outputs of a row are a matrix product
of the image itself for each row of the window, in which the image's rows overlap. Weights are read again for each few
outputs: they must be few enough to stay in cache. The rest, and all with groups or dilation, is left to numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from asynctrain.arena import Array
from asynctrain.nn.kernels import conv
from asynctrain.nn.kernels.compiled.jit import compiled
from asynctrain.nn.kernels.compiled.lanes import LANES, load, multiply, store
from asynctrain.nn.kernels.conv import Geometry, Pair

WEIGHT_BYTES = 128 * 1024


def _fits(weight: Array, geometry: Geometry, columns: int) -> bool:
    """Return whether these kernels make a product of so many ``columns``; where it is one of x itself, BLAS does."""
    several = geometry.groups == 1 and geometry.dilation == (1, 1) and geometry != Geometry((1, 1))
    return several and columns % LANES == 0 and weight.nbytes <= WEIGHT_BYTES


def correlate(
    x: Array, weight: Array, geometry: Geometry, *, out: Array, columns: Array, bias: Array | None = None
) -> Array:
    """Write y[n, h, w, f] = b[f] + sum_ijc x[n, h s + i, w t + j, c] weight[i, j, c, f] and return it.

    The arguments are those of ``kernels.conv.correlate``.
    """
    if not _fits(weight, geometry, out.shape[3]):
        return conv.correlate(x, weight, geometry, out=out, columns=columns, bias=bias)
    start = np.zeros(out.shape[3], x.dtype) if bias is None else bias.copy()  # which, unlike a bias, is never read-only
    _correlate(x, weight, geometry.stride, start, out)
    return out


@compiled
def _correlate(x: Array, weight: Array, stride: Pair, bias: Array, y: Array) -> None:
    _, H, W, C = x.shape
    kh, kw, _, F = weight.shape
    N, h, w, _ = y.shape
    for n in range(N):
        for row in range(h):
            target = (n * h + row) * w * F
            for place in range(target, target + w * F, F):
                for f in range(0, F, LANES):
                    store(y, place + f, load(bias, f))
            for i in range(kh):
                pixels = x, ((n * H + row * stride[0] + i) * W) * C, stride[1] * C, 1
                multiply(pixels, (weight, i * kw * C * F, F, 1), (y, target, F, 1), w, F, kw * C, True)


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

    The arguments are those of ``kernels.conv.correlate_backward_input``.
    """
    if not _fits(weight, geometry, out.shape[3]):
        return conv.correlate_backward_input(
            weight, dy, corner, geometry, out=out, padded=padded, flipped=flipped, columns=columns
        )
    high, wide = geometry.reach
    conv.place(dy, (high - 1 - corner[0], wide - 1 - corner[1]), (1, 1), out=padded)
    np.copyto(flipped, weight[::-1, ::-1].swapaxes(2, 3))
    return correlate(padded, flipped, geometry, out=out, columns=columns)


def scatter(
    weight: Array, dy: Array, corner: Pair, geometry: Geometry, *, out: Array, padded: Array, columns: Array
) -> Array:
    """Write the transpose of ``correlate``, applied to dy, into ``out`` and return it, for any stride.

    The arguments are those of ``kernels.conv.scatter``.
    """
    if not _fits(weight, geometry, out.shape[3]):
        return conv.scatter(weight, dy, corner, geometry, out=out, padded=padded, columns=columns)
    _scatter(np.ascontiguousarray(weight.swapaxes(2, 3)), dy, geometry.stride, padded)
    (top, left), (H, W) = corner, out.shape[1:3]
    np.copyto(out, padded[:, top : top + H, left : left + W])
    return out


@compiled
def _scatter(exchanged: Array, dy: Array, stride: Pair, dx: Array) -> None:
    """Add to the zeros that dx is begun with, place by place of the window: within one, no two pixels are the same."""
    kh, kw, F, C = exchanged.shape
    N, h, w, _ = dy.shape
    _, H, W, _ = dx.shape
    dx[:] = 0
    for n in range(N):
        for row in range(h):
            gradient = dy, (n * h + row) * w * F, F, 1
            for i in range(kh):
                for j in range(kw):
                    pixels = dx, ((n * H + row * stride[0] + i) * W + j) * C, stride[1] * C, 1
                    multiply(gradient, (exchanged, (i * kw + j) * F * C, C, 1), pixels, w, C, F, True)


def correlate_backward_params(
    x: Array, dy: Array, geometry: Geometry, *, out: Array, columns: Array, partial: Array
) -> Array:
    """Write dweight[i, j, c, f] = sum_nhw x[n, h s + i, w t + j, c] dy[n, h, w, f] and return it.

    The arguments are those of ``kernels.conv.correlate_backward_params``.
    """
    if not _fits(out, geometry, out.shape[3]):
        return conv.correlate_backward_params(x, dy, geometry, out=out, columns=columns, partial=partial)
    _correlate_backward_params(x, dy, geometry.stride, out, partial)
    return out


@compiled
def _correlate_backward_params(x: Array, dy: Array, stride: Pair, dweight: Array, partial: Array) -> None:
    """Each image's share is summed by itself: shorter sums are more exact."""
    _, H, W, C = x.shape
    kh, kw, _, F = dweight.shape
    N, h, w, _ = dy.shape
    dweight[:] = 0
    for n in range(N):
        for i in range(kh):
            share = partial, i * kw * C * F, F, 1
            for row in range(h):
                pixels = x, ((n * H + row * stride[0] + i) * W) * C, 1, stride[1] * C
                multiply(pixels, (dy, (n * h + row) * w * F, F, 1), share, kw * C, F, w, row > 0)
        for place in range(0, dweight.size, LANES):
            store(dweight, place, load(dweight, place) + load(partial, place))


def warm_up(dtype: np.dtype[Any]) -> None:
    """Compile the kernels for arrays of ``dtype``, weights being read-only or not."""
    image, weight = np.zeros((1, 1, 1, LANES), dtype), np.zeros((1, 1, LANES, LANES), dtype)
    apart = Geometry((1, 1), stride=(2, 2))
    read_only = weight.view()
    read_only.flags.writeable = False
    for weights in (weight, read_only):
        correlate(image, weights, apart, out=image.copy(), columns=image)
    scatter(weight, image, (0, 0), apart, out=image.copy(), padded=image.copy(), columns=image)
    correlate_backward_params(image, image, apart, out=weight, columns=image, partial=weight.copy())
