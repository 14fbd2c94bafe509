"""What a run tells as it goes: frozen, numbered, and JSON if wanted. Epochs and steps count from 1 here."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from asynctrain.inference.evaluate import Evaluation

Reason = Literal["finished", "stopped", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class RunStart:
    """The run begins: ``step`` steps were done before, ``steps`` are to be done when it is finished.

    What only the end of a stream will tell is None.
    """

    epochs: int
    step: int
    steps: int | None
    steps_per_epoch: int | None
    samples_per_epoch: int | None
    parameters: int


@dataclass(frozen=True, slots=True)
class StepEnd:
    """A batch was applied. loss, accuracy: of this batch, before the update. samples_per_second: since the start."""

    epoch: int
    step: int
    loss: float
    accuracy: float
    samples: int
    samples_per_second: float


@dataclass(frozen=True, slots=True)
class EpochEnd:
    """An epoch is over. loss, accuracy: over its batches, each before its update. seconds: validation included."""

    epoch: int
    step: int
    loss: float
    accuracy: float
    samples: int
    seconds: float
    validation: Evaluation | None


@dataclass(frozen=True, slots=True)
class SampleSkipped:
    """A sample was left out, as the loader was told to do with bad ones."""

    epoch: int
    position: int
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class RunEnd:
    """The last event of a run. error: one sentence where it failed."""

    reason: Reason
    step: int
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Missed:
    """The events from number ``first`` up to and with ``last`` are no longer kept; this listener was too slow."""

    first: int
    last: int


Event = RunStart | StepEnd | SampleSkipped | EpochEnd | RunEnd | Missed


def to_json(number: int, event: Event) -> dict[str, Any]:
    """Return ``{"number": ..., "event": "StepEnd", ...}``."""
    return {"number": number, "event": type(event).__name__, **asdict(event)}


class EventLog:
    """The events of one run, numbered from 0, for any number of listeners.

    Publishing never waits. The log keeps the last ``capacity`` events (a few hundred bytes each), so a listener that
    falls further behind gets ``Missed`` in the place of those that are gone.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._kept: deque[Event] = deque(maxlen=capacity)
        self._published = 0
        self._closed = False
        self._news = asyncio.Event()

    def publish(self, event: Event) -> int:
        """Append ``event`` and return its number."""
        self._kept.append(event)
        self._published += 1
        self._wake()
        return self._published - 1

    def close(self) -> None:
        """Let the listeners end once they have read everything."""
        self._closed = True
        self._wake()

    async def follow(self, number: int = 0) -> AsyncIterator[Event]:
        """Yield the events from ``number`` on until the log is closed."""
        while True:
            news = self._news
            while number < self._published:
                oldest = self._published - len(self._kept)
                if number < oldest:
                    yield Missed(number, oldest - 1)
                    number = oldest
                else:
                    number += 1
                    yield self._kept[number - 1 - oldest]
            if self._closed and number >= self._published:
                return
            await news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
