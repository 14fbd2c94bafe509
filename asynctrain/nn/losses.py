"""Losses: value and gradient together, as sums over the samples. The step divides once, by the sum of the weights."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

from asynctrain.arena import Array


class Loss(NamedTuple):
    """What a loss function tells about one microbatch.

    value: the sum over samples, weighted. weight: the sum of the sample weights (both accumulated in float64).
    gradient: of ``value`` with respect to the model's outputs, in their shape and dtype. correct: how many samples
    have their largest output at their label.
    """

    value: float
    weight: float
    gradient: Array
    correct: int


class LossFunction(Protocol):
    """The signature of every loss."""

    def __call__(self, logits: Array, labels: Array, weights: Array | None = None, out: Array | None = None) -> Loss:
        """Return the loss of ``logits``, its gradient written into ``out`` where that is given."""
        ...


def softmax_cross_entropy(logits: Array, labels: Array, weights: Array | None = None, out: Array | None = None) -> Loss:
    """Return sum_n w_n (log sum_k exp(z_nk) - z_n,label(n)), computed stably by subtracting each row's maximum.

    The gradient is w_n (softmax(z)_nk - [k = label(n)]). Logits that are not finite give a value that is not finite.

    Args:
        logits: (N, K) z, N and K at least 1, float32 or float64.
        labels: (N,) int64, each 0 to K - 1.
        weights: (N,) w, of each sample; by default 1.
        out: (N, K) of the logits' dtype, where the gradient is written.

    Raises:
        ValueError: a label is out of range, or the shapes do not fit.
    """
    _check_labels(logits, labels)
    rows = np.arange(len(labels))
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = np.subtract(logits, logits.max(axis=1, keepdims=True), out=out)
        at_label = shifted[rows, labels]
        gradient = np.exp(shifted, out=shifted)
        total = gradient.sum(axis=1, keepdims=True)
        losses = np.log(total[:, 0]) - at_label
        gradient /= total
        gradient[rows, labels] -= 1
    correct = int(np.count_nonzero(logits.argmax(axis=1) == labels))
    if weights is None:
        return Loss(float(losses.sum(dtype=np.float64)), float(len(labels)), gradient, correct)
    gradient *= weights.astype(gradient.dtype)[:, np.newaxis]
    value = np.multiply(losses, weights, dtype=np.float64).sum()
    return Loss(float(value), float(weights.sum(dtype=np.float64)), gradient, correct)


def _check_labels(logits: Array, labels: Array) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must have shape (N,) for logits of shape (N, classes), "
            f"got labels of shape {labels.shape} for logits of shape {logits.shape}"
        )
    classes = logits.shape[1]
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise ValueError(
            f"labels must be between 0 and {classes - 1} for a model of {classes} classes, got {labels[wrong][0]}"
        )


_BY_NAME: dict[str, LossFunction] = {"softmax_cross_entropy": softmax_cross_entropy}


def get(name: str) -> LossFunction:
    """Return the loss called ``name``.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _BY_NAME:
        raise ValueError(f"loss must be one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]
