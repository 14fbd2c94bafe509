"""Optimizers as pairs of pure functions, composed from small ones.

    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params, step)
    params = apply_updates(params, updates)

State is ``slot -> name -> array``, such as ``state["mu"]["conv1/weight"]``: a checkpoint is simply that. Nothing else
is remembered; the step, counted from 0, is handed in. Every transform here works element by element, hence on any
subset of the names and on any part of an array; dtypes are kept.

Letters are those of the papers: g the gradient, or what earlier transforms made of it, p the parameters, t = step + 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, NamedTuple, ParamSpec

import numpy as np

from asynctrain.optim import schedules
from asynctrain.optim.schedules import Schedule
from asynctrain.types import JSON, Params

State = Mapping[str, Params]


class Transform(NamedTuple):
    """Something that turns gradients, step by step, into updates; a whole optimizer, or a part of one.

    init: params -> state, where nothing has happened yet.
    update: (updates, state, params, step) -> (updates, state), pure.
    slots: the keys of its state.
    name, arguments: the call that made it.
    """

    init: Callable[[Params], State]
    update: Callable[[Params, State, Params, int], tuple[Params, State]]
    slots: tuple[str, ...] = ()
    name: str = ""
    arguments: Mapping[str, Any] = {}  # never written

    def to_json(self) -> JSON:
        """Return the call that made it as JSON values; ``from_json`` reads them.

        Raises:
            TypeError: it, or a schedule in it, is a function of your own, which JSON cannot hold.
        """
        if not self.name:
            raise TypeError(f"optimizer must be made of the functions {', '.join(_BY_NAME)} to become JSON")
        return {"name": self.name} | {name: _to_json(value) for name, value in self.arguments.items()}

    def __repr__(self) -> str:
        given = self.arguments.items()
        return f"{self.name or 'Transform'}({', '.join(f'{name}={value!r}' for name, value in given)})"


Optimizer = Transform  # a whole one, whose updates are ready to be added

_BY_NAME: dict[str, Callable[..., Transform]] = {}

P = ParamSpec("P")


def _described(factory: Callable[P, Transform]) -> Callable[P, Transform]:
    """Let the transforms that ``factory`` returns remember by which call they were made."""
    signature = inspect.signature(factory)

    @wraps(factory)
    def describing(*args: P.args, **kwargs: P.kwargs) -> Transform:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        return factory(*args, **kwargs)._replace(name=factory.__name__, arguments=call.arguments)

    _BY_NAME[factory.__name__] = describing
    return describing


def from_json(value: JSON) -> Transform:
    """Return the optimizer that ``Transform.to_json`` described.

    Raises:
        ValueError: the name is none of the functions here.
    """
    arguments = dict(value)
    name = arguments.pop("name", None)
    if name not in _BY_NAME:
        raise ValueError(f"an optimizer's name must be one of {', '.join(_BY_NAME)}, got {name!r}")
    if name == "chain":
        return chain(*map(from_json, arguments["transforms"]))
    if "learning_rate" in arguments:
        arguments["learning_rate"] = schedules.from_json(arguments["learning_rate"])
    return _BY_NAME[name](**arguments)


def _to_json(value: Any) -> Any:
    if isinstance(value, Transform):
        return value.to_json()
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return schedules.to_json(value) if callable(value) else value


def apply_updates(params: Params, updates: Params) -> Params:
    """Return params + updates, as new arrays."""
    return {name: params[name] + update for name, update in updates.items()}


@_described
def chain(*transforms: Transform) -> Transform:
    """Return the transforms one after the other.

    Raises:
        ValueError: two of them keep state in slots of one name.
    """
    slots = tuple(slot for transform in transforms for slot in transform.slots)
    if len(set(slots)) < len(slots):
        raise ValueError(f"transforms of a chain must keep state under different names, got {', '.join(slots)}")

    def init(params: Params) -> State:
        return {slot: arrays for transform in transforms for slot, arrays in transform.init(params).items()}

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        after: dict[str, Params] = {}
        for transform in transforms:
            own = {slot: state[slot] for slot in transform.slots}
            updates, own_after = transform.update(updates, own, params, step)
            after.update(own_after)
        return updates, after

    return Transform(init, update, slots)


@_described
def sgd(
    learning_rate: float | Schedule, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
) -> Optimizer:
    """Return stochastic gradient descent, with momentum as in Sutskever et al. (ICML 2013).

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


@_described
def adam(learning_rate: float | Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """Return Adam (Kingma and Ba 2015, arXiv:1412.6980); arguments as in ``sgd`` and ``scale_by_adam``."""
    return chain(scale_by_adam(b1, b2, eps), scale_by_learning_rate(learning_rate))


@_described
def adamw(
    learning_rate: float | Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-2
) -> Optimizer:
    """Return Adam with weight decay apart from the gradient (Loshchilov and Hutter 2019, arXiv:1711.05101).

    Arguments as in ``sgd`` and ``scale_by_adam``; the decay is scaled by the learning rate, and spares biases.
    """
    return chain(scale_by_adam(b1, b2, eps), add_decayed_weights(weight_decay), scale_by_learning_rate(learning_rate))


@_described
def scale_by_learning_rate(learning_rate: float | Schedule) -> Transform:
    """Return g -> -learning_rate(step) g, the last part of every optimizer."""
    if not callable(learning_rate):
        _check(learning_rate >= 0, "learning_rate", "at least 0, or a function of the step", learning_rate)

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        scale = -float(learning_rate(step) if callable(learning_rate) else learning_rate)
        return {name: scale * g for name, g in updates.items()}, state

    return Transform(_stateless, update)


@_described
def add_decayed_weights(weight_decay: float) -> Transform:
    """Return g -> g + weight_decay p for arrays of two or more axes; biases, which have one, are let through."""
    _check(weight_decay >= 0, "weight_decay", "at least 0", weight_decay)

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        return {name: g + weight_decay * params[name] if g.ndim > 1 else g for name, g in updates.items()}, state

    return Transform(_stateless, update)


@_described
def trace(momentum: float, nesterov: bool = False) -> Transform:
    """Return g -> m, or g -> g + momentum m with ``nesterov``, where m = g + momentum m' remembers, from m' = 0 on."""
    _check(0 <= momentum < 1, "momentum", "at least 0 and below 1", momentum)

    def init(params: Params) -> State:
        return {"trace": _zeros(params)}

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        traces = {name: g + momentum * state["trace"][name] for name, g in updates.items()}
        if nesterov:
            updates = {name: g + momentum * traces[name] for name, g in updates.items()}
            return updates, {"trace": traces}
        return traces, {"trace": traces}

    return Transform(init, update, ("trace",))


@_described
def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Transform:
    """Return g -> (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t)) + eps), the direction of Adam.

    mu = b1 mu' + (1 - b1) g and nu = b2 nu' + (1 - b2) g^2 are the running means, from 0 on.

    Args:
        b1: from 0 up to, but not including, 1.
        b2: the same.
        eps: above 0.
    """
    _check(0 <= b1 < 1, "b1", "at least 0 and below 1", b1)
    _check(0 <= b2 < 1, "b2", "at least 0 and below 1", b2)
    _check(eps > 0, "eps", "above 0", eps)

    def init(params: Params) -> State:
        return {"mu": _zeros(params), "nu": _zeros(params)}

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        mu = {name: b1 * state["mu"][name] + (1 - b1) * g for name, g in updates.items()}
        nu = {name: b2 * state["nu"][name] + (1 - b2) * (g * g) for name, g in updates.items()}
        mu_part, nu_part = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1)
        updates = {name: (mu[name] / mu_part) / (np.sqrt(nu[name] / nu_part) + eps) for name in updates}
        return updates, {"mu": mu, "nu": nu}

    return Transform(init, update, ("mu", "nu"))


def _stateless(params: Params) -> State:
    return {}


def _zeros(params: Params) -> Params:
    return {name: np.zeros_like(p) for name, p in params.items()}


def _check(fits: bool, argument: str, permitted: str, value: float) -> None:
    if not fits:
        raise ValueError(f"{argument} must be {permitted}, got {value}")
