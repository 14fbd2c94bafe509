"""Optimizers as pairs of pure functions, composed from small ones.

    state = optimizer.init(params)
    updates, state = optimizer.update(grads, state, params, step)
    params = apply_updates(params, updates)

State is ``slot -> name -> array``, such as ``state["mu"]["conv1/weight"]``: a checkpoint is simply that. A slot holds
the names that need it, which may be fewer than there are parameters. Nothing else is remembered; the step, counted
from 0, is handed in. Every transform works element by element, hence on any subset of the names and on any part of an
array, except those with a ``Reduction``; dtypes are kept.

Letters are those of the papers: g the gradient, or what earlier transforms made of it, p the parameters, t = step + 1.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from math import fsum, sqrt
from typing import Any, NamedTuple, ParamSpec

import numpy as np

from asynctrain.arena import Array
from asynctrain.optim import schedules
from asynctrain.optim.schedules import Schedule
from asynctrain.types import JSON, Params

State = Mapping[str, Params]


@dataclass(frozen=True)
class Reduction:
    """What a transform must know about all gradients at once: sums over all elements, such as the sum of squares.

    Whoever runs the transform part by part first takes the measure of each part, adds them up and goes on with the
    element-wise transform that ``given`` makes of the totals.

    count: how many sums.
    measure: (updates, state, params, step) -> the sums over these updates alone.
    given: totals -> the same transform without a reduction.
    """

    count: int
    measure: Callable[[Params, State, Params, int], Sequence[float]]
    given: Callable[[Sequence[float]], Transform]


class Transform(NamedTuple):
    """Something that turns gradients, step by step, into updates; a whole optimizer, or a part of one.

    init: params -> state, where nothing has happened yet.
    update: (updates, state, params, step) -> (updates, state), pure.
    slots: the keys of its state.
    name, arguments: the call that made it.
    reduction: what it must know about all gradients at once; without one it works element by element. ``update`` takes
    what it is given for all.
    uniform: whether it treats each element alike, whatever the name and the shape of its array.
    """

    init: Callable[[Params], State]
    update: Callable[[Params, State, Params, int], tuple[Params, State]]
    slots: tuple[str, ...] = ()
    name: str = ""
    arguments: Mapping[str, Any] = {}  # never written
    reduction: Reduction | None = None
    uniform: bool = False

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


FADING = 64  # steps between two looks for running means that have faded away

Optimizer = Transform  # a whole one, whose updates are ready to be added

_BY_NAME: dict[str, Callable[..., Transform]] = {}

P = ParamSpec("P")


def described(factory: Callable[P, Transform]) -> Callable[P, Transform]:
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
        ValueError: the name is none of the functions here, or an argument is unknown or out of range.
    """
    arguments = dict(value)
    name = arguments.pop("name", None)
    if name not in _BY_NAME:
        raise ValueError(f"an optimizer's name must be one of {', '.join(_BY_NAME)}, got {name!r}")
    permitted = inspect.signature(_BY_NAME[name]).parameters
    if unknown := arguments.keys() - permitted.keys():
        told = ", ".join(permitted) or "none"
        raise ValueError(f"{name}: arguments must be {told}, got {', '.join(sorted(unknown))}")
    return _called(name, {key: _from_json(key, argument) for key, argument in arguments.items()})


def rescaled(optimizer: Transform, factor: float) -> Transform:
    """Return the optimizer with each of its learning rates times ``factor``; its state is the same.

    Raises:
        TypeError: it was not made of the functions here, so nobody knows its learning rates.
    """
    if not optimizer.name:
        raise TypeError(f"optimizer must be made of the functions {', '.join(_BY_NAME)} to be rescaled")
    return _called(optimizer.name, {key: _rescaled(key, value, factor) for key, value in optimizer.arguments.items()})


def _rescaled(argument: str, value: Any, factor: float) -> Any:
    if argument == "learning_rate":
        return (lambda step: factor * value(step)) if callable(value) else factor * value
    if isinstance(value, Transform):
        return rescaled(value, factor) if value.name else value
    if isinstance(value, Mapping):
        return {key: _rescaled(argument, item, factor) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_rescaled(argument, item, factor) for item in value)
    return value


def _called(name: str, arguments: Mapping[str, Any]) -> Transform:
    """Return what the function ``name`` makes of the arguments."""
    call = inspect.BoundArguments(inspect.signature(_BY_NAME[name]), OrderedDict(arguments))
    return _BY_NAME[name](*call.args, **call.kwargs)


def _from_json(argument: str, value: Any) -> Any:
    if argument == "learning_rate":
        return schedules.from_json(value)
    if argument == "optimizers":
        return {pattern: from_json(optimizer) for pattern, optimizer in value}
    if isinstance(value, list | tuple):
        return tuple(_from_json(argument, item) for item in value)
    return from_json(value) if isinstance(value, Mapping) else value


def _to_json(value: Any) -> Any:
    if isinstance(value, Transform):
        return value.to_json()
    if isinstance(value, Mapping):  # pairs, as their order means something
        value = tuple(value.items())
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return schedules.to_json(value) if callable(value) else value


def apply_updates(params: Params, updates: Params) -> Params:
    """Return params + updates, as new arrays."""
    return {name: params[name] + update for name, update in updates.items()}


@described
def chain(*transforms: Transform) -> Transform:
    """Return the transforms one after the other.

    Raises:
        ValueError: two of them keep state in slots of one name, or look at all gradients at once.
    """
    return _chain(transforms)


def _chain(transforms: Sequence[Transform]) -> Transform:
    slots = tuple(slot for transform in transforms for slot in transform.slots)
    if len(set(slots)) < len(slots):
        raise ValueError(f"transforms of a chain must keep state under different names, got {', '.join(slots)}")

    def init(params: Params) -> State:
        return {slot: arrays for transform in transforms for slot, arrays in transform.init(params).items()}

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        after: dict[str, Params] = {}
        for transform in transforms:
            updates, own_after = transform.update(updates, own_state(transform, state), params, step)
            after.update(own_after)
        return updates, after

    uniform = all(transform.uniform for transform in transforms)
    return Transform(init, update, slots, reduction=_reduction_of_chain(transforms), uniform=uniform)


def _reduction_of_chain(transforms: Sequence[Transform]) -> Reduction | None:
    """Return the reduction of the one transform that has one: over the updates that reach it."""
    places = [(place, t.reduction) for place, t in enumerate(transforms) if t.reduction]
    if not places:
        return None
    if len(places) > 1:
        names = ", ".join(transforms[place].name or "Transform" for place, _ in places)
        raise ValueError(f"one transform of a chain may look at all gradients at once, got {names}")
    [(place, reduction)] = places
    before = _chain(transforms[:place])

    def measure(updates: Params, state: State, params: Params, step: int) -> Sequence[float]:
        updates, _ = before.update(updates, own_state(before, state), params, step)
        return reduction.measure(updates, state, params, step)

    def given(totals: Sequence[float]) -> Transform:
        return _chain((*transforms[:place], reduction.given(totals), *transforms[place + 1 :]))

    return Reduction(reduction.count, measure, given)


def own_state(transform: Transform, state: State) -> State:
    """Return the part of ``state`` that is in the transform's slots."""
    return {slot: state[slot] for slot in transform.slots if slot in state}


@described
def clip_by_value(limit: float) -> Transform:
    """Return g -> max(-limit, min(g, limit)), each element on its own; limit is above 0."""
    check(limit > 0, "limit", "above 0", limit)

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        return {name: np.clip(g, -limit, limit) for name, g in updates.items()}, state

    return Transform(stateless, update, uniform=True)


@described
def clip_by_global_norm(max_norm: float) -> Transform:
    """Return g -> g min(1, max_norm / |g|), |g| the Euclidean norm of all gradients together (Pascanu et al. 2013).

    arXiv:1211.5063. In a chain |g| is that of the updates which reach it; in ``groups`` and ``freeze``, of the
    parameters that are the group's own. Squares are added in the gradients' dtype within 32,768 elements or a part of
    an array, and exactly beyond; so the norm does not depend on who adds up what.

    Args:
        max_norm: above 0.
    """
    check(max_norm > 0, "max_norm", "above 0", max_norm)

    def measure(updates: Params, state: State, params: Params, step: int) -> Sequence[float]:
        return (fsum(sum_of_squares(g) for g in updates.values()),)

    def given(totals: Sequence[float]) -> Transform:
        norm = sqrt(totals[0])
        factor = max_norm / norm if norm > max_norm else 1.0

        def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
            return {name: g * factor for name, g in updates.items()} if factor < 1 else updates, state

        return Transform(stateless, update, uniform=True)

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        return given(measure(updates, state, params, step)).update(updates, state, params, step)

    return Transform(stateless, update, reduction=Reduction(1, measure, given))


def sum_of_squares(array: Array) -> float:
    """Return the sum of the squares of the elements, without an array of squares."""
    flat = array.reshape(-1)
    return float(np.dot(flat, flat))


@described
def scale_by_learning_rate(learning_rate: float | Schedule) -> Transform:
    """Return g -> -learning_rate(step) g, the last part of every optimizer."""
    if not callable(learning_rate):
        check(learning_rate >= 0, "learning_rate", "at least 0, or a function of the step", learning_rate)

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        scale = -float(learning_rate(step) if callable(learning_rate) else learning_rate)
        return {name: scale * g for name, g in updates.items()}, state

    return Transform(stateless, update, uniform=True)


@described
def add_decayed_weights(weight_decay: float, vectors: bool = False) -> Transform:
    """Return g -> g + weight_decay p for weights.

    Arrays of one axis, which are the biases and the scales of normalisation, are let through, unless ``vectors``.
    """
    check(weight_decay >= 0, "weight_decay", "at least 0", weight_decay)
    least_axes = 0 if vectors else 2

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        decayed = {name: g + weight_decay * params[name] if g.ndim >= least_axes else g for name, g in updates.items()}
        return decayed, state

    return Transform(stateless, update)


@described
def trace(momentum: float, nesterov: bool = False) -> Transform:
    """Return g -> m, or g -> g + momentum m with ``nesterov``, where m = g + momentum m' remembers, from m' = 0 on."""
    check(0 <= momentum < 1, "momentum", "at least 0 and below 1", momentum)

    def init(params: Params) -> State:
        return {"trace": zeros(params)}

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        traces = {name: _mean(_plus(momentum * state["trace"][name], g), step) for name, g in updates.items()}
        if nesterov:
            updates = {name: g + momentum * traces[name] for name, g in updates.items()}
            return updates, {"trace": traces}
        return traces, {"trace": traces}

    return Transform(init, update, ("trace",), uniform=True)


@described
def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, nesterov: bool = False) -> Transform:
    """Return g -> mu^ / (sqrt(nu^) + eps), the direction of Adam (Kingma and Ba 2015, arXiv:1412.6980).

    mu = b1 mu' + (1 - b1) g and nu = b2 nu' + (1 - b2) g^2 are the running means, from 0 on; mu^ = mu / (1 - b1^t) and
    nu^ = nu / (1 - b2^t) are freed of their beginning at 0. With ``nesterov``, that of NAdam (Dozat 2016),
    mu^ = b1 mu / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t): the next step's momentum counts already.

    Args:
        b1: from 0 up to, but not including, 1.
        b2: the same.
        eps: above 0. It is added to sqrt(nu^), as in the paper and in PyTorch; ONNX's Adam adds it to sqrt(nu).
        nesterov: see above.
    """
    check(0 <= b1 < 1, "b1", "at least 0 and below 1", b1)
    check(0 <= b2 < 1, "b2", "at least 0 and below 1", b2)
    check(eps > 0, "eps", "above 0", eps)

    def init(params: Params) -> State:
        return {"mu": zeros(params), "nu": zeros(params)}

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        mu = {name: _mean(_plus(b1 * state["mu"][name], (1 - b1) * g), step) for name, g in updates.items()}
        nu = {name: _mean(_plus(b2 * state["nu"][name], _times(g * g, 1 - b2)), step) for name, g in updates.items()}
        mu_part, nu_part, next_mu_part = 1 - b1 ** (step + 1), 1 - b2 ** (step + 1), 1 - b1 ** (step + 2)
        directions = {}
        for name, g in updates.items():
            mean = mu[name] * (b1 / next_mu_part) + g * ((1 - b1) / mu_part) if nesterov else mu[name] / mu_part
            directions[name] = mean / _plus(np.sqrt(nu[name] / nu_part), eps)
        return directions, {"mu": mu, "nu": nu}

    return Transform(init, update, ("mu", "nu"), uniform=True)


@described
def scale_by_rms(decay: float = 0.9, eps: float = 1e-8, centered: bool = False) -> Transform:
    """Return g -> g / (sqrt(nu) + eps), nu = decay nu' + (1 - decay) g^2 the running mean of squares, from 0 on.

    RMSprop (Tieleman and Hinton 2012, lecture 6.5). With ``centered`` it is divided by the running standard deviation
    (Graves 2013, arXiv:1308.0850): nu - mu^2, at least 0, for nu, where mu = decay mu' + (1 - decay) g.

    Args:
        decay: from 0 up to, but not including, 1.
        eps: above 0; beside the root, as in PyTorch, where Graves has it under the root.
        centered: see above.
    """
    check(0 <= decay < 1, "decay", "at least 0 and below 1", decay)
    check(eps > 0, "eps", "above 0", eps)
    slots = ("nu", "mu") if centered else ("nu",)

    def init(params: Params) -> State:
        return {slot: zeros(params) for slot in slots}

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        squares = {name: _plus(decay * state["nu"][name], _times(g * g, 1 - decay)) for name, g in updates.items()}
        nu = {name: _mean(square, step) for name, square in squares.items()}
        if not centered:
            return {name: g / _plus(np.sqrt(nu[name]), eps) for name, g in updates.items()}, {"nu": nu}
        mu = {name: _mean(_plus(decay * state["mu"][name], (1 - decay) * g), step) for name, g in updates.items()}
        variance = {name: np.maximum(nu[name] - mu[name] * mu[name], 0) for name in updates}
        return {name: g / _plus(np.sqrt(variance[name]), eps) for name, g in updates.items()}, {"nu": nu, "mu": mu}

    return Transform(init, update, slots, uniform=True)


@described
def scale_by_adagrad(initial: float = 0.0, eps: float = 1e-10) -> Transform:
    """Return g -> g / (sqrt(s) + eps), s = s' + g^2 the sum of all squares so far, the direction of Adagrad.

    Duchi, Hazan and Singer 2011, JMLR 12.

    Args:
        initial: s before the first step, at least 0.
        eps: above 0; beside the root, as in PyTorch and ONNX.
    """
    check(initial >= 0, "initial", "at least 0", initial)
    check(eps > 0, "eps", "above 0", eps)

    def init(params: Params) -> State:
        return {"sum_of_squares": {name: np.full_like(p, initial) for name, p in params.items()}}

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        sums = {name: state["sum_of_squares"][name] + g * g for name, g in updates.items()}
        return {name: g / _plus(np.sqrt(sums[name]), eps) for name, g in updates.items()}, {"sum_of_squares": sums}

    return Transform(init, update, ("sum_of_squares",), uniform=True)


# Two steps of arithmetic in the memory of a temporary, which each formula is full of: fresh memory costs as much as
# the arithmetic. The first argument must be such a temporary.


def _mean(values: Array, step: int) -> Array:
    """Return running means, those that have all but faded away as 0.

    Where a gradient stays 0, that of a dead unit say, its mean would fade into the subnormal numbers and, rounded up
    again and again, stay there. CPUs compute with these many times more slowly, and numpy cannot ask them to take such
    for 0. What is below the smallest normal number over the machine epsilon (1e-31 in float32) is no part of any
    parameter; to look for it each 64th step costs next to nothing, and depends on the step alone.
    """
    if step % FADING != FADING - 1:
        return values
    limits = np.finfo(values.dtype)
    lasting: Array = np.abs(values) >= limits.tiny / limits.eps
    return np.multiply(values, lasting)


def _plus(temporary: Array, addend: Array | float) -> Array:
    temporary += addend
    return temporary


def _times(temporary: Array, factor: float) -> Array:
    temporary *= factor
    return temporary


def stateless(params: Params) -> State:
    """Return no state."""
    return {}


def zeros(params: Params) -> Params:
    """Return a 0 for each parameter."""
    return {name: np.zeros_like(p) for name, p in params.items()}


def check(fits: bool, argument: str, permitted: str, value: float) -> None:
    """Raise ``ValueError`` unless the argument fits."""
    if not fits:
        raise ValueError(f"{argument} must be {permitted}, got {value}")
