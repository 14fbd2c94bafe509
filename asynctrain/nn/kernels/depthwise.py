"""Depthwise convolution, one filter for each channel, and its two derivatives.

There is no sum over channels, hence no matrix product: all the places of a window are multiplied and added in one pass,
over rows of the image that stay in the first-level cache. Letters as in ``conv``; F = C = G. Padding is in the image
already.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.lib.stride_tricks import as_strided

from asynctrain.arena import Array
from asynctrain.nn.kernels.conv import Geometry, Pair, place


def correlate(
    x: Array, weight: Array, geometry: Geometry, *, out: Array, repeated: Array, bias: Array | None = None
) -> Array:
    """Write y[n, h, w, c] = b[c] + sum_ij x[n, h s + i d, w t + j e, c] weight[i, j, 0, c] and return it.

    Args:
        x: (N, H, W, C), padded.
        weight: (kh, kw, 1, C).
        geometry: stride (s, t) and dilation (d, e).
        out: (N, h, w, C).
        repeated: scratch (kh, kw, w, C).
        bias: (C,).
    """
    (kh, kw), (s, t), (d, e) = geometry.window, geometry.stride, geometry.dilation
    N, h, w, C = out.shape
    along_n, along_h, along_w, along_c = x.strides
    if t == 1:  # neighbouring outputs see neighbouring pixels: a row's pixels and channels are one long axis
        np.copyto(repeated, weight)
        shape, strides = (N, h, kh, kw, w * C), (along_n, along_h * s, along_h * d, along_w * e, along_c)
        windows = as_strided(x, shape, strides, writeable=False)
        np.einsum("nhijc,ijc->nhc", windows, repeated.reshape(kh, kw, -1), out=out.reshape(N, h, -1))
    else:
        np.einsum("nhwijc,ijc->nhwc", _windows(x, geometry, out), weight[:, :, 0], out=out)
    return out if bias is None else np.add(out, bias, out=out)


def correlate_backward_input(
    weight: Array, dy: Array, corner: Pair, geometry: Geometry, *, out: Array, spread: Array, repeated: Array
) -> Array:
    """Write the transpose of ``correlate``, applied to dy, into ``out`` and return it.

    It is itself a correlation: of dy, its pixels spread by the stride and padded, with the flipped weights.

    Args:
        weight: (kh, kw, 1, C).
        dy: (N, h, w, C).
        corner: how many rows and columns of padding came before the image.
        geometry: of the forward pass.
        out: (N, H, W, C), the gradient of the image without its padding.
        spread: scratch (N, H + reach - 1, W + reach - 1, C), the reach of the geometry high and wide.
        repeated: scratch (kh, kw, W, C).
    """
    high, wide = geometry.reach
    place(dy, (high - 1 - corner[0], wide - 1 - corner[1]), geometry.stride, out=spread)
    return correlate(spread, weight[::-1, ::-1], replace(geometry, stride=(1, 1)), out=out, repeated=repeated)


def correlate_backward_params(x: Array, dy: Array, geometry: Geometry, *, out: Array, partial: Array) -> Array:
    """Write dweight[i, j, 0, c] = sum_nhw x[n, h s + i d, w t + j e, c] dy[n, h, w, c] and return it.

    Args:
        x: (N, H, W, C), padded.
        dy: (N, h, w, C).
        geometry: stride (s, t) and dilation (d, e).
        out: (kh, kw, 1, C).
        partial: scratch (N, kh, kw, C), each image's share: shorter sums are more exact.
    """
    np.einsum("nhwijc,nhwc->nijc", _windows(x, geometry, dy), dy, out=partial)
    return np.sum(partial, axis=0, out=out[:, :, 0])


def _windows(x: Array, geometry: Geometry, y: Array) -> Array:
    """Return the windows as a view (N, h, w, kh, kw, C) of x."""
    (s, t), (d, e) = geometry.stride, geometry.dilation
    n, h, w, c = x.strides
    shape = (*y.shape[:3], *geometry.window, x.shape[3])
    return as_strided(x, shape, (n, h * s, w * t, h * d, w * e, c), writeable=False)
