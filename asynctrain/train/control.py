"""What others ask of a run, and the moments between two steps at which it listens."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import NoReturn, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """When a run ends, whichever comes first; None is no limit.

    Attributes:
        epochs: passes over the data, in all.
        steps: in all, those before a resume included.
        samples: in all; the step that reaches it is the last.
        seconds: of this attempt; the step in which it passes is the last.
    """

    epochs: int | None = None
    steps: int | None = None
    samples: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "samples", "seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if self.epochs is None and self.steps is None and self.samples is None and self.seconds is None:
            raise ValueError("a run must have a limit: epochs, steps, samples or seconds")

    def reached(self, step: int, samples: int, deadline: float | None) -> str:
        """Return which limit but that of epochs is reached, in words, or nothing."""
        if self.steps is not None and step >= self.steps:
            return f"{self.steps} steps are done"
        if self.samples is not None and samples >= self.samples:
            return f"{self.samples} samples are done"
        if deadline is not None and monotonic() >= deadline:
            return f"{self.seconds:g} seconds are over"
        return ""


def lasting_repr(value: object) -> str:
    """Return what ``value`` says of itself, without an address, which means something to one process alone."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


class Requests:
    """What was asked of a run and not yet done. Asking never waits; the run answers between two steps.

    Attributes:
        stop: whether the run is to end.
        pause: whether it is to wait.
        news: set whenever something is asked.
    """

    def __init__(self) -> None:
        self.stop = False
        self.pause = False
        self.news = asyncio.Event()
        self._paused = asyncio.Event()  # a pause has begun, or there will be none
        self._checkpoints: list[asyncio.Future[Path]] = []

    def holds(self) -> bool:
        """Return whether the run is to wait now."""
        return self.pause and not self.stop

    def ask_to_stop(self) -> None:
        """Let the run end after its step."""
        self.stop = True
        self.news.set()

    def ask_to_pause(self) -> asyncio.Event:
        """Let the run wait after its step; the event is set when it does, or when there will be no pause."""
        if not self.pause:
            self.pause = True
            self._paused = asyncio.Event()
            self.news.set()
        return self._paused

    def ask_to_resume(self) -> None:
        """Let a paused run go on."""
        self.pause = False
        self._paused.set()
        self.news.set()

    def ask_for_checkpoint(self) -> asyncio.Future[Path]:
        """Return a future of the path of a checkpoint that is begun from now on."""
        future: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
        self._checkpoints.append(future)
        self.news.set()
        return future

    def take_checkpoints(self) -> list[asyncio.Future[Path]]:
        """Return who waits for a checkpoint, and forget them."""
        waiting, self._checkpoints = self._checkpoints, []
        return [future for future in waiting if not future.done()]

    def tell_paused(self) -> None:
        """Tell those who asked for a pause that it has begun, or that there will be none."""
        self._paused.set()


class Gap:
    """The time between two steps in which the next batch has yet to come: from a slow source, it may be hours.

    What is asked then is done then, by a task that serves the run; a request to stop, and the deadline, end the wait.

    Args:
        requests: what is asked.
        listen: does it, and returns when a pause is over.
        latest: when a wait ends, by the loop's clock; None: never.

    Attributes:
        was_cut: whether a wait has been ended before its batch came.
    """

    def __init__(self, requests: Requests, listen: Callable[[], Awaitable[None]], latest: float | None) -> None:
        self._requests = requests
        self._listen = listen
        self._latest = latest
        self._listening = asyncio.Lock()
        self.was_cut = False
        self._wait: asyncio.Timeout | None = None  # that is under way
        self._error: Exception | None = None  # of listening

    async def next(self, batches: AsyncIterator[T]) -> T | None:
        """Return the next batch; None where there is none, or the wait has been ended. Raises what listening raises."""
        try:
            async with asyncio.timeout_at(self._latest) as self._wait:
                batch = await anext(batches, None)
        except TimeoutError:
            if self._wait is None or not self._wait.expired():
                raise
            self.was_cut, batch = True, None
        finally:
            self._wait = None
        async with self._listening:  # a pause goes on though the batch is there
            if self._error is not None:
                raise self._error
        if self._requests.stop:
            self.was_cut, batch = True, None
        return batch

    async def attend(self) -> NoReturn:
        """Do what is asked while a batch is waited for; at other times the run itself listens."""
        while True:
            await self._requests.news.wait()
            self._requests.news.clear()
            if (wait := self._wait) is None:
                continue
            async with self._listening:
                try:
                    await self._listen()
                except Exception as error:
                    self._error = error
            if (self._requests.stop or self._error is not None) and self._wait is wait and not wait.expired():
                wait.reschedule(asyncio.get_running_loop().time())
