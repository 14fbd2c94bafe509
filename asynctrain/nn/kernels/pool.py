"""Maxima and means over windows, and their derivatives.

A window is looked at tap by tap: for the place (i, j) of a window, a view of the image that has this place's pixel of
every window, and a view of the output that has the windows for which it lies inside the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from itertools import product
from typing import NamedTuple

import numpy as np

from asynctrain.arena import Array

BLOCK = 2**16  # elements of y that are worked on at a time, so that they stay in cache from one tap to the next


class Span(NamedTuple):
    """How windows lie along one axis: place i of window h is pixel h stride + i dilation - before."""

    size: int
    stride: int
    dilation: int
    before: int  # padding, in pixels
    after: int
    length: int  # of the image, in pixels

    @property
    def reach(self) -> int:
        """The pixels from a window's first place to its last, both included."""
        return (self.size - 1) * self.dilation + 1

    @property
    def windows(self) -> int:
        """The number of windows, 0 where there is no room for one."""
        return max(0, (self.before + self.length + self.after - self.reach) // self.stride + 1)

    @property
    def tiles(self) -> bool:
        """Whether each pixel is in exactly one window, and no window has padding."""
        return self.size == self.stride and self.dilation == 1 and self.windows * self.size == self.length

    @property
    def overlaps(self) -> bool:
        """Whether a pixel may be in several windows."""
        return self.stride < self.reach and self.size > 1

    def places(self, *, padded: bool = False) -> Array:
        """Return for each window how many of its places lie in the image, or in the padded image."""
        pixels = np.arange(self.windows)[:, None] * self.stride + np.arange(self.size) * self.dilation - self.before
        first, end = (-self.before, self.length + self.after) if padded else (0, self.length)
        counted: Array = ((pixels >= first) & (pixels < end)).sum(axis=1)
        return counted


Window = tuple[Span, Span]  # high, wide


class _Tap(NamedTuple):
    """Where one place of a window is: the pixels, and the windows that it belongs to."""

    pixels: tuple[slice, slice, slice]
    windows: tuple[slice, slice, slice]


@lru_cache(maxsize=256)
def _taps(window: Window) -> tuple[_Tap, ...]:
    """Return the taps in row order, without those that are padding for every window."""
    high, wide = ([_reached(span, i * span.dilation - span.before) for i in range(span.size)] for span in window)
    everything = slice(None)
    return tuple(
        _Tap((everything, rows[0], columns[0]), (everything, rows[1], columns[1]))
        for rows, columns in product(high, wide)
        if rows and columns
    )


def _reached(span: Span, offset: int) -> tuple[slice, slice] | None:
    """Return the pixels h stride + offset that are in the image, and their windows h, or None if there are none."""
    first = max(0, -(offset // span.stride))
    last = min(span.windows - 1, (span.length - 1 - offset) // span.stride)
    if last < first:
        return None
    pixels = slice(first * span.stride + offset, last * span.stride + offset + 1, span.stride)
    return pixels, slice(first, last + 1)


def max_pool(x: Array, window: Window, *, out: Array) -> Array:
    """Write y[n, h, w, c] = max_ij x[n, h s + i d - top, w t + j e - left, c], within the image, and return it.

    x: (N, H, W, C). out: (N, h, w, C), as many as there are windows.
    """
    if _is_padded(window):
        out.fill(-np.inf)
        for pixels, windows in _taps(window):
            np.maximum(out[windows], x[pixels], out=out[windows])
        return out
    top = reduce(partial(np.maximum, out=out), (x[pixels] for pixels, _ in _taps(window)))
    if top is not out:  # a window of one pixel
        np.copyto(out, top)
    return out


def max_pool_backward(x: Array, y: Array, dy: Array, window: Window, *, out: Array, rest: Array, hit: Array) -> Array:
    """Write dx into ``out`` and return it: each window's dy goes to its maximum, on ties to the first in row order.

    What is left of dy goes from tap to tap: dx = left [x = y], left -= dx.

    Args:
        x: (N, H, W, C).
        y: (N, h, w, C), as ``max_pool`` made it.
        dy: in the shape of y.
        window: as it was in ``max_pool``.
        out: in the shape of x.
        rest: scratch (2, samples, h, w, C) of dy's dtype, ``samples`` being ``samples_at_once(y)``.
        hit: bool scratch (samples, h, w, C).
    """
    if not all(span.tiles for span in window):
        out.fill(0)
    put = _add if any(span.overlaps for span in window) else np.copyto
    spread = _spread_padded if _is_padded(window) else _spread
    for start in range(0, len(x), len(hit)):
        part = slice(start, start + len(hit))
        samples = len(y[part])
        left, taken = rest[:, :samples]
        spread(x[part], y[part], dy[part], _taps(window), put, out[part], left, taken, hit[:samples])
    return out


def _is_padded(window: Window) -> bool:
    return any(span.before or span.after for span in window)


def _add(total: Array, addend: Array) -> None:
    np.add(total, addend, out=total)


Put = Callable[[Array, Array], None]


def _spread(
    x: Array, y: Array, dy: Array, taps: Sequence[_Tap], put: Put, dx: Array, rest: Array, taken: Array, hit: Array
) -> None:
    """Without padding, each tap has all windows, and the last gets what the others left."""
    left = dy
    for pixels, _ in taps[:-1]:
        _take(x[pixels], y, left, taken, hit)
        put(dx[pixels], taken)
        left = np.subtract(left, taken, out=rest)
    put(dx[taps[-1].pixels], left)


def _spread_padded(
    x: Array, y: Array, dy: Array, taps: Sequence[_Tap], put: Put, dx: Array, rest: Array, taken: Array, hit: Array
) -> None:
    np.copyto(rest, dy)
    for pixels, windows in taps:
        left, share = rest[windows], taken[windows]
        _take(x[pixels], y[windows], left, share, hit[windows])
        put(dx[pixels], share)
        np.subtract(left, share, out=left)


def _take(x: Array, y: Array, left: Array, taken: Array, hit: Array) -> None:
    """Write left [x = y] into ``taken``; to multiply by booleans would take longer, they are converted in pieces."""
    np.copyto(taken, np.equal(x, y, out=hit))
    np.multiply(taken, left, out=taken)


def samples_at_once(y: Array) -> int:
    """Return how many samples of y (N, h, w, C) are worked on at a time, at least 1."""
    return int(min(len(y), max(1, BLOCK // y[0].size)))


@lru_cache(maxsize=256)
def _shares(window: Window, count_padding: bool, dtype: np.dtype[np.generic]) -> Array:
    """Return 1 / the number of places that count in each window, (h, w, 1)."""
    high, wide = (span.places(padded=count_padding) for span in window)
    return (1 / np.outer(high, wide)).astype(dtype)[:, :, np.newaxis]


def average_pool(x: Array, window: Window, count_padding: bool, *, out: Array) -> Array:
    """Write the mean of each window, padding counted as zeros or not at all, into ``out`` and return it.

    x: (N, H, W, C). out: (N, h, w, C), as many as there are windows.
    """
    out.fill(0)
    for pixels, windows in _taps(window):
        np.add(out[windows], x[pixels], out=out[windows])
    return np.multiply(out, _shares(window, count_padding, out.dtype), out=out)


def average_pool_backward(dy: Array, window: Window, count_padding: bool, *, out: Array, share: Array) -> Array:
    """Write dx into ``out`` (N, H, W, C) and return it: each window's dy goes to its pixels in equal shares.

    ``share`` is scratch in the shape of dy.
    """
    np.multiply(dy, _shares(window, count_padding, dy.dtype), out=share)
    out.fill(0)
    for pixels, windows in _taps(window):
        np.add(out[pixels], share[windows], out=out[pixels])
    return out
