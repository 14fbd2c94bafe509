"""Learning rates that change with the step: pure functions of it, which are also their own description."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import cos, pi

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
        if self.warmup >= self.steps:
            raise ValueError(f"cosine: warmup must be below steps ({self.steps}), got {self.warmup}")

    def __call__(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 0."""
        if step < self.warmup:
            return self.peak * _risen(step, self.warmup)
        progress = min(1.0, (step - self.warmup) / (self.steps - self.warmup))
        return self.end + (self.peak - self.end) * 0.5 * (1 + cos(pi * progress))


def _risen(step: int, warmup: int) -> float:
    """Return which part of its height the linear warm-up has reached: 1/warmup at step 0, 1 at its last step."""
    return min(1.0, (step + 1) / warmup) if warmup else 1.0


def _not_negative(schedule: str, **values: float) -> None:
    for argument, value in values.items():
        if not value >= 0:
            raise ValueError(f"{schedule}: {argument} must not be negative, got {value}")


_BY_NAME: dict[str, type[constant] | type[cosine]] = {"constant": constant, "cosine": cosine}


def to_json(rate: float | Schedule) -> float | JSON:
    """Return a learning rate as JSON: a number, or a schedule's name and arguments.

    Raises:
        TypeError: it is a function of your own, which JSON cannot hold.
    """
    if isinstance(rate, constant | cosine):
        return {"name": type(rate).__name__, **asdict(rate)}
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
    return _BY_NAME[name](**arguments)
