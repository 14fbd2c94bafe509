"""Maxima over windows and their derivative, window by window."""

from __future__ import annotations

from typing import Any

import numpy as np

from asynctrain.arena import Array
from asynctrain.nn.kernels.compiled.jit import compiled, inlined
from asynctrain.nn.kernels.pool import Span, Window

Numbers = tuple[int, int, int, int]


def _numbers(span: Span) -> Numbers:
    return span.size, span.stride, span.dilation, span.before


@inlined
def _places(index: int, span: Numbers, length: int) -> tuple[int, int]:
    """Return the first place of window ``index`` that is in the image, and the one after the last."""
    size, stride, dilation, before = span
    first = index * stride - before
    return max(0, -(first // dilation)), min(size, (length - 1 - first) // dilation + 1)


def max_pool(x: Array, window: Window, *, out: Array) -> Array:
    """Write y[n, h, w, c] = max_ij x[n, h s + i d - top, w t + j e - left, c], within the image, and return it.

    x: (N, H, W, C). out: (N, h, w, C), as many as there are windows. A NaN is the maximum of its window.
    """
    high, wide = window
    _max_pool(x, _numbers(high), _numbers(wide), out)
    return out


@compiled
def _max_pool(x: Array, high: Numbers, wide: Numbers, y: Array) -> None:
    N, H, W, C = x.shape
    for n in range(N):
        for h in range(y.shape[1]):
            top, bottom = _places(h, high, H)
            for w in range(y.shape[2]):
                left, right = _places(w, wide, W)
                for c in range(C):
                    y[n, h, w, c] = -np.inf
                for i in range(top, bottom):
                    for j in range(left, right):
                        u, v = h * high[1] + i * high[2] - high[3], w * wide[1] + j * wide[2] - wide[3]
                        for c in range(C):
                            value, largest = x[n, u, v, c], y[n, h, w, c]
                            y[n, h, w, c] = largest if largest >= value or np.isnan(largest) else value


def max_pool_backward(x: Array, y: Array, dy: Array, window: Window, *, out: Array, rest: Array, hit: Array) -> Array:
    """Write dx into ``out`` and return it: each window's dy goes to its maximum, on ties to the first in row order.

    x: (N, H, W, C). y: (N, h, w, C), as ``max_pool`` made it. dy: in the shape of y. out: in the shape of x. ``rest``
    is scratch of C elements or more; ``hit`` is not used.
    """
    high, wide = window
    left = rest.reshape(-1)[: y.shape[3]]
    if high.tiles and wide.tiles:
        _max_pool_backward_of_tiles(x, y, dy, high.size, wide.size, out, left)
    else:
        out.fill(0)
        _max_pool_backward(x, y, dy, _numbers(high), _numbers(wide), out, left)
    return out


@compiled
def _max_pool_backward(x: Array, y: Array, dy: Array, high: Numbers, wide: Numbers, dx: Array, rest: Array) -> None:
    """What is left of a window's dy goes from place to place."""
    N, H, W, C = x.shape
    zero = dy.dtype.type(0)
    for n in range(N):
        for h in range(y.shape[1]):
            top, bottom = _places(h, high, H)
            for w in range(y.shape[2]):
                left, right = _places(w, wide, W)
                for c in range(C):
                    rest[c] = dy[n, h, w, c]
                for i in range(top, bottom):
                    for j in range(left, right):
                        u, v = h * high[1] + i * high[2] - high[3], w * wide[1] + j * wide[2] - wide[3]
                        for c in range(C):
                            taken = rest[c] if x[n, u, v, c] == y[n, h, w, c] else zero
                            dx[n, u, v, c] += taken
                            rest[c] -= taken


@compiled
def _max_pool_backward_of_tiles(x: Array, y: Array, dy: Array, high: int, wide: int, dx: Array, rest: Array) -> None:
    """As above, where each pixel is in exactly one window of high x wide."""
    zero = dy.dtype.type(0)
    for n in range(y.shape[0]):
        for h in range(y.shape[1]):
            for w in range(y.shape[2]):
                for c in range(y.shape[3]):
                    rest[c] = dy[n, h, w, c]
                for u in range(h * high, (h + 1) * high):
                    for v in range(w * wide, (w + 1) * wide):
                        for c in range(y.shape[3]):
                            taken = rest[c] if x[n, u, v, c] == y[n, h, w, c] else zero
                            dx[n, u, v, c] = taken
                            rest[c] -= taken


def warm_up(dtype: np.dtype[Any]) -> None:
    """Compile the kernels for arrays of ``dtype``."""
    x = np.zeros((1, 1, 1, 1), dtype)
    for span in (Span(1, 1, 1, 0, 0, 1), Span(2, 2, 1, 1, 0, 1)):  # which tiles the image, and which does not
        max_pool(x, (span, span), out=x)
        max_pool_backward(x, x, x, (span, span), out=x, rest=x, hit=x)
