"""How far a run is, at a glance."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter

from asynctrain.train.events import finite
from asynctrain.types import JSON

BEAT = 0.05  # seconds between two looks at how late the loop is
MEMORY = 0.05  # share of each look in the running maximum's decay


@dataclass(frozen=True, slots=True)
class Progress:
    """A moment of a run.

    Attributes:
        epoch: from 1.
        step: how many were applied.
        steps: how many there are to be in all; None where only the end will tell.
        loss: of the last batch; NaN before the first.
        metrics: of the last batch, and what the last evaluation found under ``validation.loss`` and so on.
        samples_per_second: since the start, pauses not counted.
        eta: seconds that are left; None where ``steps`` is.
        loop_lag: how late the event loop came lately, in seconds: a slowly forgotten maximum.
        paused: whether the run waits for ``resume()``.
        bottleneck: the stage of the loader that the training waits for; None where it keeps up, or does not tell.
    """

    epoch: int
    step: int
    steps: int | None
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    samples_per_second: float = 0.0
    eta: float | None = None
    loop_lag: float = 0.0
    paused: bool = False
    bottleneck: str | None = None

    def to_json(self) -> JSON:
        """Return its fields as JSON values; what is not finite is null."""
        told: JSON = finite({name: getattr(self, name) for name in self.__slots__})
        return told


class Heartbeat:
    """Notices how late the event loop comes."""

    def __init__(self) -> None:
        self.lag = 0.0

    async def beat(self) -> None:
        """Look every 50 ms, for ever; the body of a task."""
        while True:
            start = perf_counter()
            await asyncio.sleep(BEAT)
            late = max(0.0, perf_counter() - start - BEAT)
            self.lag = max(late, self.lag * (1 - MEMORY))


class Clock:
    """The seconds of one attempt since this was made."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self._held: float | None = None  # since when
        self._away = 0.0
        self._end: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds in all, pauses included."""
        return (perf_counter() if self._end is None else self._end) - self._start

    @property
    def active(self) -> float:
        """Seconds without pauses."""
        return (self.elapsed if self._held is None else self._held) - self._away

    @property
    def is_held(self) -> bool:
        """Whether there is a pause now."""
        return self._held is not None

    def hold(self) -> None:
        """Begin a pause."""
        self._held = self.elapsed

    def go_on(self) -> None:
        """End it."""
        if self._held is not None:
            self._away += self.elapsed - self._held
            self._held = None

    def stop(self) -> None:
        """Stand still from now on."""
        if self._end is None:
            self._end = perf_counter()
