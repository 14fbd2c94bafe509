"""Losses and optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from asynctrain import nn, optim
from asynctrain.arena import Array
from asynctrain.nn import losses
from tests.onnx.nodes import Node, Outputs, Run, UnsupportedError, along

# Losses


def softmax_cross_entropy(node: Node) -> Run:
    """``SoftmaxCrossEntropyLoss``; its second output are the log-probabilities."""
    value = reduced(node, losses.softmax_cross_entropy)
    return lambda scores, *rest: (value(scores, *rest), along(nn.LogSoftmax(), scores, 1))[: node.outputs]


def negative_log_likelihood(node: Node) -> Run:
    """``NegativeLogLikelihoodLoss``."""
    value = reduced(node, losses.negative_log_likelihood)
    return lambda scores, *rest: (value(scores, *rest),)


def reduced(node: Node, loss: Callable[..., losses.LossFunction]) -> Callable[..., Array]:
    """Return what gives a loss's mean, its sum, or what it is for each label by itself; scores (N, C, d1, d2, ...)."""
    reduction = node.get("reduction", "mean")

    def value(scores: Array, labels: Array, weights: Array | None = None) -> Array:
        outputs = np.ascontiguousarray(np.moveaxis(scores, 1, -1).reshape(-1, scores.shape[1]))
        wanted = labels.reshape(-1).astype(np.int64)
        measure = loss(
            class_weights=None if weights is None else tuple(weights.tolist()), ignore_index=node.get("ignore_index")
        )
        if reduction == "none":
            each = [measure(outputs[n : n + 1], wanted[n : n + 1]).value for n in range(len(wanted))]
            return np.array(each, scores.dtype).reshape(labels.shape)
        total = measure(outputs, wanted)
        return np.array(total.value / total.weight if reduction == "mean" else total.value, scores.dtype)

    return value


# Optimizers

Made = tuple[optim.Optimizer, int]  # an optimizer, and the step at which it is asked


def optimizer(make: Callable[[Node, float, int], Made], *slots: str) -> Callable[[Node], Run]:
    """Return the translation of a node whose inputs are R, T, all X, all G, and all of each slot of the state.

    ``make`` gives the optimizer for a node, the learning rate R and the update count T.
    """

    def translate(node: Node) -> Run:
        def run(rate: Array, count: Array, *arrays: Array) -> Outputs:
            tensors = len(arrays) // (2 + len(slots))
            params, grads, *kept = (
                weights(arrays[start : start + tensors]) for start in range(0, len(arrays), tensors)
            )
            transform, step = make(node, float(rate), int(count))
            updates, state = transform.update(grads, dict(zip(slots, kept, strict=True)), params, step)
            after = [optim.apply_updates(params, updates), *(state[slot] for slot in slots)]
            return tuple(array[0] for arrays in after for array in arrays.values())

        return run

    return translate


def weights(vectors: Sequence[Array]) -> dict[str, Array]:
    """Return vectors by name as matrices of one row: of one axis they would not decay."""
    return {f"layer{index}/weight": vector[np.newaxis] for index, vector in enumerate(vectors)}


def adam(node: Node, rate: float, count: int) -> Made:
    """``Adam``. At T = 0 the bias is not corrected, and at our step of a million there is none left to correct."""
    if count:
        raise UnsupportedError("an eps that is added before the bias is corrected")
    direction = optim.scale_by_adam(node.get("alpha", 0.9), node.get("beta", 0.999), node.get("epsilon", 1e-6))
    return regularized(node, direction, rate), 10**6


def momentum(node: Node, rate: float, count: int) -> Made:
    """``Momentum``. At T = 0 the gradient counts in full, as at each of our steps."""
    if count:
        raise UnsupportedError("a gradient that counts in part")
    return regularized(node, optim.trace(node.get("alpha"), nesterov=node.get("mode") == "nesterov"), rate), count


def adagrad(node: Node, rate: float, count: int) -> Made:
    """``Adagrad``; its learning rate falls with T."""
    direction = optim.scale_by_adagrad(eps=node.get("epsilon", 1e-6))
    return regularized(node, direction, rate / (1 + count * node.get("decay_factor", 0.0))), count


def regularized(node: Node, direction: optim.Transform, rate: float) -> optim.Optimizer:
    """Return the optimizer that goes by ``rate`` into a direction, the penalty's gradient added first."""
    penalty = optim.add_decayed_weights(node.get("norm_coefficient", 0.0))
    return optim.chain(penalty, direction, optim.scale_by_learning_rate(rate))
