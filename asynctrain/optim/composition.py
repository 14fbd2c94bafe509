"""Optimizers made of optimizers: by name of the parameter, frozen, delayed, accumulated over steps, averaged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from itertools import islice

import numpy as np

from asynctrain.arena import Array
from asynctrain.optim.transforms import Optimizer, Reduction, State, Transform, check, described, own_state, zeros
from asynctrain.types import Params


@described
def groups(optimizers: Mapping[str, Optimizer]) -> Optimizer:
    """Return an optimizer for each group of parameters, found by name.

        >>> optimizer = groups({"head/*": sgd(0.1), "*/bias": sgd(0.02), "*": adamw(1e-3)})

    Args:
        optimizers: patterns (``*`` any characters, ``?`` one, ``[ab]`` one of them) and what treats the parameters
            with names that fit. A parameter belongs to the first pattern that fits its name.

    Raises:
        ValueError: there is no pattern; and from ``init``: a parameter fits none, or a pattern fits no parameter.
    """
    return _Groups(dict(optimizers)).transform()


class _Groups:
    """The transforms of ``groups`` at work."""

    def __init__(self, optimizers: Mapping[str, Optimizer]) -> None:
        if not optimizers:
            raise ValueError("groups: optimizers must have at least one pattern, got none")
        self._optimizers = optimizers
        self._slots = tuple(dict.fromkeys(slot for part in optimizers.values() for slot in part.slots))
        self._pattern = cache(self._find_pattern)

    def transform(self) -> Optimizer:
        count = sum(part.reduction.count for part in self._optimizers.values() if part.reduction)
        reduction = Reduction(count, self._measure, self._given) if count else None
        return Transform(self._init, self._update, self._slots, reduction=reduction)

    def _find_pattern(self, name: str) -> str:
        """Return the first pattern that fits; called once for each name."""
        for pattern in self._optimizers:
            if fnmatchcase(name, pattern):
                return pattern
        raise ValueError(f"groups: one of the patterns {', '.join(self._optimizers)} must fit each name, got {name}")

    def _divided(self, updates: Params) -> dict[str, dict[str, Array]]:
        """Return the arrays of each pattern that has any."""
        own: dict[str, dict[str, Array]] = {}
        for name, array in updates.items():
            own.setdefault(self._pattern(name), {})[name] = array
        return own

    def _init(self, params: Params) -> State:
        _check_patterns(self._optimizers, params)
        arrays: dict[str, dict[str, Array]] = {slot: {} for slot in self._slots}
        for pattern, own in self._divided(params).items():
            for slot, of_slot in self._optimizers[pattern].init(own).items():
                arrays[slot].update(of_slot)
        return {slot: {name: of_slot[name] for name in params if name in of_slot} for slot, of_slot in arrays.items()}

    def _update(self, updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        changed: dict[str, Array] = {}
        after: dict[str, dict[str, Array]] = {slot: {} for slot in self._slots}
        for pattern, own in self._divided(updates).items():
            part = self._optimizers[pattern]
            own_updates, own_after = part.update(own, own_state(part, state), params, step)
            changed.update(own_updates)
            for slot, arrays in own_after.items():
                after[slot].update({name: arrays[name] for name in own if name in arrays})
        return {name: changed[name] for name in updates}, after

    def _measure(self, updates: Params, state: State, params: Params, step: int) -> Sequence[float]:
        own = self._divided(updates)
        return [
            total
            for pattern, part in self._optimizers.items()
            if part.reduction
            for total in part.reduction.measure(own.get(pattern, {}), own_state(part, state), params, step)
        ]

    def _given(self, totals: Sequence[float]) -> Transform:
        rest = iter(totals)
        return _Groups({pattern: _given(part, rest) for pattern, part in self._optimizers.items()}).transform()


def _given(part: Transform, totals: Iterator[float]) -> Transform:
    """Return the transform with as many of the totals as it asks for."""
    if part.reduction is None:
        return part
    return part.reduction.given(list(islice(totals, part.reduction.count)))


def _check_patterns(patterns: Iterable[str], params: Params) -> None:
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in params)]
    if idle:
        raise ValueError(f"each pattern must fit one of the names {', '.join(params)}, got {', '.join(idle)}")


@described
def frozen() -> Optimizer:
    """Return the optimizer that changes nothing and keeps no state."""

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        return _nothing(updates), state

    return Transform(lambda params: {}, update)


def _nothing(updates: Params) -> Params:
    """Return updates of -0, which leave every number as it is to the bit (0 would turn -0 into 0)."""
    return {name: np.full_like(g, -0.0) for name, g in updates.items()}


@described
def freeze(optimizer: Optimizer, *patterns: str) -> Optimizer:
    """Return ``optimizer`` for all parameters but those with names that fit a pattern, which do not move a bit.

        >>> optimizer = freeze(adamw(1e-3), "conv1/*", "conv2/*")

    Frozen parameters have no state, do not decay, and do not count in a global norm. The running statistics of frozen
    normalisation layers go on, as these are no parameters.

    Raises:
        ValueError: there is no pattern; and from ``init``: a pattern fits no parameter.
    """
    if not patterns:
        raise ValueError("freeze: patterns must be one or more, such as 'conv1/*', got none")
    parts = dict.fromkeys(patterns, frozen())
    parts.setdefault("*", optimizer)
    return _Groups(parts).transform()


@described
def delayed(optimizer: Optimizer, steps: int) -> Optimizer:
    """Return ``optimizer`` for parameters that do not move a bit for ``steps`` steps, and from there on as from step 0.

    In ``groups`` it unfreezes a part of a model, at an epoch where ``steps`` is a multiple of the batches of one:

        >>> optimizer = groups({"conv*": delayed(adamw(1e-4), 500), "*": adamw(1e-3)})

    Until then the gradients leave no trace in the optimizer's state, and its schedules and corrections for the first
    steps begin afterwards.

    Args:
        optimizer: what is applied then.
        steps: at least 1.
    """
    check(steps >= 1, "steps", "at least 1", steps)
    return _delayed(optimizer, steps)


def _delayed(optimizer: Optimizer, steps: int) -> Optimizer:
    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        if step < steps:
            return _nothing(updates), state
        return optimizer.update(updates, state, params, step - steps)

    reduction = optimizer.reduction
    if reduction is None:
        return Transform(optimizer.init, update, optimizer.slots)

    def measure(updates: Params, state: State, params: Params, step: int) -> Sequence[float]:
        if step < steps:
            return [0.0] * reduction.count
        return reduction.measure(updates, state, params, step - steps)

    def given(totals: Sequence[float]) -> Transform:
        return _delayed(reduction.given(totals), steps)

    return Transform(optimizer.init, update, optimizer.slots, reduction=Reduction(reduction.count, measure, given))


@described
def accumulate(optimizer: Optimizer, steps: int) -> Optimizer:
    """Return ``optimizer`` applied at every ``steps``-th step, to the mean of the gradients of the steps since.

    Each step counts the same, whatever its batch weighs. The optimizer's own steps, and with them its schedules, count
    its applications. The sums so far are part of the state, so a run resumed between two applications goes on exactly.

    A norm that is clipped inside is that of the mean.

    Args:
        optimizer: what is applied.
        steps: at least 1.
    """
    check(steps >= 1, "steps", "at least 1", steps)
    return _accumulate(optimizer, steps)


def _accumulate(optimizer: Optimizer, steps: int) -> Optimizer:
    def init(params: Params) -> State:
        return {**optimizer.init(params), "accumulated": zeros(params)}

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        own = own_state(optimizer, state)
        sums = _sums(updates, state)
        if (step + 1) % steps:
            return _nothing(updates), {**own, "accumulated": sums}
        updates, after = optimizer.update(_mean(sums), own, params, step // steps)
        return updates, {**after, "accumulated": zeros(sums)}

    def _sums(updates: Params, state: State) -> Params:
        return {name: state["accumulated"][name] + g for name, g in updates.items()}

    def _mean(sums: Params) -> Params:
        return {name: total / steps for name, total in sums.items()}

    slots = (*optimizer.slots, "accumulated")
    reduction = optimizer.reduction
    if reduction is None:
        return Transform(init, update, slots)

    def measure(updates: Params, state: State, params: Params, step: int) -> Sequence[float]:
        if (step + 1) % steps:
            return [0.0] * reduction.count
        own = own_state(optimizer, state)
        return reduction.measure(_mean(_sums(updates, state)), own, params, step // steps)

    def given(totals: Sequence[float]) -> Transform:
        return _accumulate(reduction.given(totals), steps)

    return Transform(init, update, slots, reduction=Reduction(reduction.count, measure, given))


@described
def average_weights(optimizer: Optimizer, decay: float = 0.999) -> Optimizer:
    """Return ``optimizer`` with a running mean of the parameters it makes, in the slot ``average``.

    a = d a' + (1 - d) p with d = min(decay, t / (9 + t)), from the initial parameters on, so that the first steps are
    soon forgotten (Polyak and Juditsky 1992; d as in Tensorflow). The mean does not change training:
    ``TrainState.averaged()`` is the state with these for its parameters, to be evaluated or made a Classifier.

    Args:
        optimizer: a whole one, with its learning rate; ``average_weights`` must see what is added to the parameters.
        decay: from 0 up to, but not including, 1.
    """
    check(0 <= decay < 1, "decay", "at least 0 and below 1", decay)
    return _average_weights(optimizer, decay)


def _average_weights(optimizer: Optimizer, decay: float) -> Optimizer:
    def init(params: Params) -> State:
        return {**optimizer.init(params), "average": {name: p.copy() for name, p in params.items()}}

    def update(updates: Params, state: State, params: Params, step: int) -> tuple[Params, State]:
        updates, after = optimizer.update(updates, own_state(optimizer, state), params, step)
        rest = 1 - min(decay, (step + 1) / (step + 10))
        average = {
            name: before + rest * (params[name] + updates[name] - before)
            for name, before in ((name, state["average"][name]) for name in updates)
        }
        return updates, {**after, "average": average}

    reduction = optimizer.reduction
    if reduction is not None:
        inner = reduction
        reduction = Reduction(
            inner.count,
            lambda updates, state, params, step: inner.measure(updates, own_state(optimizer, state), params, step),
            lambda totals: _average_weights(inner.given(totals), decay),
        )
    return Transform(init, update, (*optimizer.slots, "average"), reduction=reduction)
