"""The optimizers by their names: chains of transforms.

What they have in common: a ``learning_rate`` is a number of at least 0 or a function of the step, and scales the whole
update, momentum and decay included; weight decay spares biases and the scales of normalisation
(``add_decayed_weights``). For decay in the ones without that argument, put ``add_decayed_weights`` before them in a
``chain``.
"""

from __future__ import annotations

from asynctrain.optim.schedules import Schedule
from asynctrain.optim.transforms import (
    Optimizer,
    add_decayed_weights,
    chain,
    described,
    scale_by_adagrad,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_rms,
    trace,
)


@described
def sgd(
    learning_rate: float | Schedule, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """Return stochastic gradient descent, with momentum as in Sutskever et al. (ICML 2013).

    m = momentum m' + g, p = p - learning_rate m: the learning rate is outside of m, as in PyTorch and in ONNX's
    Momentum with beta = 1.

    Args:
        learning_rate: a number of at least 0, or a function of the step.
        momentum: from 0 up to, but not including, 1.
        nesterov: whether the gradient counts as if momentum had been applied already; needs momentum.
        weight_decay: added to the gradient, times the weights; see ``add_decayed_weights``.
    """
    if nesterov and not momentum:
        raise ValueError("sgd: momentum must be above 0 with nesterov, got 0")
    parts = [add_decayed_weights(weight_decay)] if weight_decay else []
    parts += [trace(momentum, nesterov)] if momentum else []
    return chain(*parts, scale_by_learning_rate(learning_rate))


@described
def adam(learning_rate: float | Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """Return Adam (Kingma and Ba 2015, arXiv:1412.6980); arguments as in ``sgd`` and ``scale_by_adam``."""
    return chain(scale_by_adam(b1, b2, eps), scale_by_learning_rate(learning_rate))


@described
def adamw(
    learning_rate: float | Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-2
) -> Optimizer:
    """Return Adam with weight decay apart from the gradient (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Arguments as in ``sgd`` and ``scale_by_adam``; the decay is scaled by the learning rate, and spares biases.
    """
    return chain(scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay), scale_by_learning_rate(learning_rate))


@described
def nadam(learning_rate: float | Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """Return Adam with Nesterov momentum (Dozat 2016); arguments as in ``sgd`` and ``scale_by_adam``.

    b1 stays as it is, as in optax; in PyTorch and Keras it rises slowly, from about b1 / 2 on.
    """
    return chain(scale_by_adam(b1, b2, eps, nesterov=True), scale_by_learning_rate(learning_rate))


@described
def rmsprop(
    learning_rate: float | Schedule,
    decay: float = 0.9,
    eps: float = 1e-8,
    centered: bool = False,
    momentum: float = 0.0,
) -> Optimizer:
    """Return RMSprop (Tieleman and Hinton 2012, lecture 6.5); arguments as in ``scale_by_rms`` and ``sgd``.

    Momentum gathers the scaled gradients; the learning rate is outside of it, as in PyTorch.
    """
    parts = [trace(momentum)] if momentum else []
    return chain(scale_by_rms(decay, eps, centered), *parts, scale_by_learning_rate(learning_rate))


@described
def adagrad(learning_rate: float | Schedule, initial: float = 0.0, eps: float = 1e-10) -> Optimizer:
    """Return Adagrad (Duchi et al. 2011, JMLR 12); arguments as in ``sgd`` and ``scale_by_adagrad``."""
    return chain(scale_by_adagrad(initial, eps), scale_by_learning_rate(learning_rate))
