"""Learning rates that change with the step: pure functions of it, which are also their own description.

Each rises linearly over its first ``warmup`` steps, then takes its course; ``steps`` counts both. Steps count from 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import cos, pi
from typing import Any

from asynctrain.types import JSON

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class constant:  # noqa: N801  # used as a function, like the optimizers beside it
    """The same ``value`` at each step, after a linear rise over the first ``warmup`` steps.

    Raises:
        ValueError: value or warmup is negative.
    """

    value: float
    warmup: int = 0

    def __post_init__(self) -> None:
        _not_negative("constant", value=self.value, warmup=self.warmup)

    def __call__(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 0."""
        return self.value * _risen(step, self.warmup)


@dataclass(frozen=True)
class linear:  # noqa: N801  # as above
    """A linear rise to ``peak`` over ``warmup`` steps, then a straight line to ``end`` at ``steps`` steps in all.

    From ``steps`` on it stays at ``end``.

        >>> schedule = linear(1.0, steps=6, warmup=2)
        >>> [schedule(step) for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]

    Raises:
        ValueError: a value is negative, or warmup is not below steps.
    """

    peak: float
    steps: int
    warmup: int = 0
    end: float = 0.0

    def __post_init__(self) -> None:
        _not_negative("linear", peak=self.peak, warmup=self.warmup, end=self.end)
        _below_steps("linear", self.warmup, self.steps)

    def __call__(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 0."""
        if step < self.warmup:
            return self.peak * _risen(step, self.warmup)
        return _between(self.peak, self.end, (step - self.warmup) / (self.steps - self.warmup))


@dataclass(frozen=True)
class cosine:  # noqa: N801  # as above
    """A linear rise to ``peak`` over ``warmup`` steps, then half a cosine down to ``end`` at ``steps`` steps in all.

    Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts. From ``steps`` on it stays at ``end``.

        >>> schedule = cosine(1.0, steps=6, warmup=2)
        >>> [round(schedule(step), 3) for step in range(7)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]

    Raises:
        ValueError: a value is negative, or warmup is not below steps.
    """

    peak: float
    steps: int
    warmup: int = 0
    end: float = 0.0

    def __post_init__(self) -> None:
        _not_negative("cosine", peak=self.peak, warmup=self.warmup, end=self.end)
        _below_steps("cosine", self.warmup, self.steps)

    def __call__(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 0."""
        if step < self.warmup:
            return self.peak * _risen(step, self.warmup)
        return _eased(self.peak, self.end, (step - self.warmup) / (self.steps - self.warmup))


@dataclass(frozen=True)
class cosine_restarts:  # noqa: N801  # as above
    """A linear rise to ``peak`` over ``warmup`` steps, then half cosines from ``peak`` to ``end``, one after the other.

    SGDR, Loshchilov and Hutter 2017, arXiv:1608.03983: the first takes ``period`` steps (T_0 there), each next one
    ``growth`` times as many (T_mult), and starts ``decay`` times as high above ``end``.

        >>> schedule = cosine_restarts(1.0, period=2, growth=2)
        >>> [round(schedule(step), 3) for step in range(7)]
        [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]

    Raises:
        ValueError: a value is negative, or period or growth below 1.
    """

    peak: float
    period: int
    growth: int = 1
    decay: float = 1.0
    warmup: int = 0
    end: float = 0.0

    def __post_init__(self) -> None:
        _not_negative("cosine_restarts", peak=self.peak, decay=self.decay, warmup=self.warmup, end=self.end)
        _at_least_1("cosine_restarts", period=self.period, growth=self.growth)

    def __call__(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 0."""
        if step < self.warmup:
            return self.peak * _risen(step, self.warmup)
        cycle, progress = self._cycle(step - self.warmup)
        return _eased(self.end + (self.peak - self.end) * self.decay**cycle, self.end, progress)

    def _cycle(self, step: int) -> tuple[int, float]:
        """Return how many half cosines are over, and which part of the present one is."""
        if self.growth == 1:
            return step // self.period, step % self.period / self.period
        cycle, length = 0, self.period
        while step >= length:
            cycle, step, length = cycle + 1, step - length, length * self.growth
        return cycle, step / length


@dataclass(frozen=True)
class one_cycle:  # noqa: N801  # as above
    """Half a cosine up from ``peak / start_divisor`` to ``peak``, then half a cosine down to ``peak / end_divisor``.

    Smith and Topin 2018, arXiv:1708.07120, with cosines for lines as in fastai. The rise is its warm-up and takes
    ``warmup`` steps, by default three tenths of ``steps``; from ``steps`` on it stays at its end.

    Raises:
        ValueError: peak is negative, warmup is not below steps, or a divisor is below 1.
    """

    peak: float
    steps: int
    warmup: int | None = None
    start_divisor: float = 25.0
    end_divisor: float = 1e4

    def __post_init__(self) -> None:
        _not_negative("one_cycle", peak=self.peak, warmup=self._rise)
        _below_steps("one_cycle", self._rise, self.steps)
        _at_least_1("one_cycle", start_divisor=self.start_divisor, end_divisor=self.end_divisor)

    def __call__(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 0."""
        if step < self._rise:
            return _eased(self.peak / self.start_divisor, self.peak, step / self._rise)
        return _eased(self.peak, self.peak / self.end_divisor, (step - self._rise) / (self.steps - self._rise))

    @property
    def _rise(self) -> int:
        return self.steps * 3 // 10 if self.warmup is None else self.warmup


@dataclass(frozen=True)
class stepwise:  # noqa: N801  # as above
    """``value``, times ``factor`` at each of the steps ``boundaries``, after a linear rise over ``warmup`` steps.

        >>> schedule = stepwise(1.0, boundaries=(2, 4), factor=0.5)
        >>> [schedule(step) for step in range(6)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]

    Args:
        value: before the first boundary.
        boundaries: steps counted from 0, rising, none below warmup.
        factor: at least 0.
        warmup: in steps.

    Raises:
        ValueError: a value is negative, or boundaries do not rise or begin before warmup.
    """

    value: float
    boundaries: tuple[int, ...]
    factor: float = 0.1
    warmup: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "boundaries", tuple(self.boundaries))  # JSON gives them back as a list
        _not_negative("stepwise", value=self.value, factor=self.factor, warmup=self.warmup)
        if list(self.boundaries) != sorted({b for b in self.boundaries if b >= self.warmup}):
            raise ValueError(
                f"stepwise: boundaries must rise and not begin before warmup ({self.warmup}), got {self.boundaries}"
            )

    def __call__(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 0."""
        passed = sum(boundary <= step for boundary in self.boundaries)
        return self.value * _risen(step, self.warmup) * float(self.factor**passed)


@dataclass(frozen=True)
class exponential:  # noqa: N801  # as above
    """A linear rise to ``value`` over ``warmup`` steps, then value x factor^(s / every) after s more, at least ``end``.

        >>> schedule = exponential(1.0, factor=0.25, every=2)
        >>> [schedule(step) for step in range(4)]
        [1.0, 0.5, 0.25, 0.125]

    Raises:
        ValueError: a value is negative, factor is above 1 or 0, or every is below 1.
    """

    value: float
    factor: float
    every: int = 1
    warmup: int = 0
    end: float = 0.0

    def __post_init__(self) -> None:
        _not_negative("exponential", value=self.value, warmup=self.warmup, end=self.end)
        _at_least_1("exponential", every=self.every)
        if not 0 < self.factor <= 1:
            raise ValueError(f"exponential: factor must be above 0 and at most 1, got {self.factor}")

    def __call__(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 0."""
        if step < self.warmup:
            return self.value * _risen(step, self.warmup)
        return max(self.end, self.value * float(self.factor ** ((step - self.warmup) / self.every)))


def _risen(step: int, warmup: int) -> float:
    """Return which part of its height the linear warm-up has reached: 1/warmup at step 0, 1 at its last step."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _between(start: float, end: float, progress: float) -> float:
    """Return the point of a straight line from ``start`` (progress 0) to ``end`` (1 and beyond)."""
    return end + (start - end) * (1 - min(1.0, progress))


def _eased(start: float, end: float, progress: float) -> float:
    """Return the point of half a cosine from ``start`` (progress 0) to ``end`` (1 and beyond)."""
    return end + (start - end) * 0.5 * (1 + cos(pi * min(1.0, progress)))


def _not_negative(schedule: str, **values: float) -> None:
    for argument, value in values.items():
        if not value >= 0:
            raise ValueError(f"{schedule}: {argument} must not be negative, got {value}")


def _at_least_1(schedule: str, **values: float) -> None:
    for argument, value in values.items():
        if not value >= 1:
            raise ValueError(f"{schedule}: {argument} must be at least 1, got {value}")


def _below_steps(schedule: str, warmup: int, steps: int) -> None:
    if warmup >= steps:
        raise ValueError(f"{schedule}: warmup must be below steps ({steps}), got {warmup}")


_TYPES = (constant, linear, cosine, cosine_restarts, one_cycle, stepwise, exponential)
_BY_NAME: dict[str, type[Any]] = {schedule.__name__: schedule for schedule in _TYPES}


def to_json(rate: float | Schedule) -> float | JSON:
    """Return a learning rate as JSON: a number, or a schedule's name and arguments.

    Raises:
        TypeError: it is a function of your own, which JSON cannot hold.
    """
    if isinstance(rate, _TYPES):
        arguments: dict[str, Any] = asdict(rate)
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
        return {"name": type(rate).__name__, **lists}
    if callable(rate):
        raise TypeError(f"learning_rate must be a number or one of {', '.join(_BY_NAME)} to become JSON, got {rate!r}")
    return rate


def from_json(value: float | JSON) -> float | Schedule:
    """Return the learning rate that ``to_json`` described.

    Raises:
        ValueError: there is no schedule of that name.
    """
    if isinstance(value, int | float):
        return value
    arguments = dict(value)
    name = arguments.pop("name", None)
    if name not in _BY_NAME:
        raise ValueError(f"a schedule's name must be one of {', '.join(_BY_NAME)}, got {name!r}")
    schedule: Schedule = _BY_NAME[name](**arguments)
    return schedule
