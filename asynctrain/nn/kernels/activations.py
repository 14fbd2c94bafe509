"""Element-wise non-linearities, each with its derivative below it, and the softmax of predictions."""

from __future__ import annotations

import numpy as np

from asynctrain.arena import Array


def relu(x: Array, *, out: Array) -> Array:
    """Write y = max(x, 0) into ``out`` and return it."""
    return np.maximum(x, 0, out=out)


def relu_backward(y: Array, dy: Array, *, out: Array, positive: Array) -> Array:
    """Write dx = dy [y > 0] into ``out`` and return it; at 0 the derivative is taken to be 0.

    ``positive`` is bool scratch of the same shape.
    """
    np.greater(y, 0, out=positive)
    return np.multiply(dy, positive, out=out)


def softmax(logits: Array) -> Array:
    """Return exp(z_nk) / sum_j exp(z_nj) of ``logits`` z (N, K), stably, as a new array of the same dtype."""
    exponentials: Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    exponentials /= exponentials.sum(axis=1, keepdims=True)
    return exponentials
