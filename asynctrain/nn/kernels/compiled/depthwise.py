"""Depthwise convolution, compiled, ``LANES`` channels at a time, and its two derivatives; see ``kernels.depthwise``.

Where the channels are no multiple of them, numpy's kernels do the work.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from asynctrain.arena import Array
from asynctrain.nn.kernels import depthwise
from asynctrain.nn.kernels.compiled.jit import compiled
from asynctrain.nn.kernels.compiled.lanes import LANES, load, store
from asynctrain.nn.kernels.conv import Geometry, Pair, place


def correlate(
    x: Array, weight: Array, geometry: Geometry, *, out: Array, repeated: Array, bias: Array | None = None
) -> Array:
    """Write y[n, h, w, c] = b[c] + sum_ij x[n, h s + i d, w t + j e, c] weight[i, j, 0, c] and return it.

    The arguments are those of ``kernels.depthwise.correlate``; ``repeated`` is scratch of kh kw C elements or more.
    """
    kh, kw, _, C = weight.shape
    if C % LANES:
        return depthwise.correlate(x, weight, geometry, out=out, repeated=repeated, bias=bias)
    weights = repeated.reshape(-1)[: weight.size].reshape(kh, kw, C)
    np.copyto(weights, weight[:, :, 0])  # they may be flipped, or read-only
    _correlate(
        x, weights, geometry.stride, geometry.dilation, np.zeros(C, x.dtype) if bias is None else bias.copy(), out
    )
    return out


@compiled
def _correlate(x: Array, weight: Array, stride: Pair, dilation: Pair, bias: Array, y: Array) -> None:
    _, H, W, C = x.shape
    kh, kw, _ = weight.shape
    N, h, w, _ = y.shape
    for n in range(N):
        for u in range(h):
            for v in range(w):
                target = ((n * h + u) * w + v) * C
                for c in range(0, C, LANES):
                    total = load(bias, c)
                    for i in range(kh):
                        row = ((n * H + u * stride[0] + i * dilation[0]) * W + v * stride[1]) * C + c
                        for j in range(kw):
                            pixel = load(x, row + j * dilation[1] * C)
                            total = total + pixel * load(weight, (i * kw + j) * C + c)
                    store(y, target + c, total)


def correlate_backward_input(
    weight: Array, dy: Array, corner: Pair, geometry: Geometry, *, out: Array, spread: Array, repeated: Array
) -> Array:
    """Write the transpose of ``correlate``, applied to dy, into ``out`` and return it.

    The arguments are those of ``kernels.depthwise.correlate_backward_input``.
    """
    high, wide = geometry.reach
    place(dy, (high - 1 - corner[0], wide - 1 - corner[1]), geometry.stride, out=spread)
    return correlate(spread, weight[::-1, ::-1], replace(geometry, stride=(1, 1)), out=out, repeated=repeated)


def correlate_backward_params(x: Array, dy: Array, geometry: Geometry, *, out: Array, partial: Array) -> Array:
    """Write dweight[i, j, 0, c] = sum_nhw x[n, h s + i d, w t + j e, c] dy[n, h, w, c] and return it.

    The arguments are those of ``kernels.depthwise.correlate_backward_params``.
    """
    if dy.shape[3] % LANES:
        return depthwise.correlate_backward_params(x, dy, geometry, out=out, partial=partial)
    _correlate_backward_params(x, dy, geometry.stride, geometry.dilation, partial)
    return np.sum(partial, axis=0, out=out[:, :, 0])


@compiled
def _correlate_backward_params(x: Array, dy: Array, stride: Pair, dilation: Pair, partial: Array) -> None:
    _, H, W, C = x.shape
    N, kh, kw, _ = partial.shape
    _, h, w, _ = dy.shape
    partial[:] = 0
    for n in range(N):
        for u in range(h):  # row by row, which then stay in the first-level cache
            for c in range(0, C, LANES):
                target = (n * h + u) * w * C + c
                for i in range(kh):
                    row = (n * H + u * stride[0] + i * dilation[0]) * W * C + c
                    for j in range(kw):
                        share = ((n * kh + i) * kw + j) * C + c
                        total = load(partial, share)
                        for v in range(w):
                            pixel = load(x, row + (v * stride[1] + j * dilation[1]) * C)
                            total = total + pixel * load(dy, target + v * C)
                        store(partial, share, total)


def warm_up(dtype: np.dtype[Any]) -> None:
    """Compile the kernels for arrays of ``dtype``."""
    image, weight = np.zeros((1, 1, 1, LANES), dtype), np.zeros((1, 1, 1, LANES), dtype)
    correlate(image, weight, Geometry((1, 1)), out=image.copy(), repeated=weight.copy())
    correlate_backward_params(image, image, Geometry((1, 1)), out=weight, partial=weight.copy())
