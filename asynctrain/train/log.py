"""The log of a run: its events, on disk before anyone hears of them, for any number of listeners."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from asynctrain._aio import ended
from asynctrain.errors import CheckpointError
from asynctrain.train.events import Event, Missed, from_json, to_json

E = TypeVar("E", bound=Event)

TURN = 0.001  # seconds after which a listener that catches up lets the loop do something else


class EventLog:
    """The events of one run, numbered, for any number of listeners.

    Publishing never waits. With a file, events are appended to it, many at a time where they come fast, and delivered
    when they are there. The log keeps the last ``capacity`` delivered events (a few hundred bytes each), so a listener
    that falls further behind gets ``Missed`` in the place of those that are gone.

    Args:
        file: where events are appended as JSON lines; None for nowhere.
        earlier: the events of the run before it was started again; numbers go on after theirs.
        capacity: how many are kept.
    """

    def __init__(self, file: EventFile | None = None, earlier: Sequence[Event] = (), capacity: int = 65_536) -> None:
        self._file = file
        self._kept: deque[Event] = deque(earlier, maxlen=capacity)
        self._pending: deque[Event] = deque()  # published, and not yet in the file
        self._published = self._delivered = earlier[-1].number + 1 if earlier else 0
        self._closed = False
        self._news = asyncio.Event()  # for listeners
        self._work = asyncio.Event()  # for the writer
        self._turn = asyncio.Lock()  # of who appends
        self.error: Exception | None = None  # why the file could not be written; events are delivered all the same

    @property
    def count(self) -> int:
        """How many were published, the earlier ones included: the number that the next one will have."""
        return self._published

    def publish(self, event: E) -> E:
        """Append ``event`` and return it with its number and time."""
        numbered = replace(event, number=self._published, time=time.time())
        self._published += 1
        if self._file is None or self.error is not None:
            self._deliver([numbered])
        else:
            self._pending.append(numbered)
            self._work.set()
        return numbered

    async def write(self, threads: ThreadPoolExecutor) -> None:
        """Append what is published to the file and deliver it, until the log is closed; the body of a task."""
        while not self._closed:
            await self._work.wait()
            self._work.clear()
            await self._append(threads)

    async def _append(self, threads: ThreadPoolExecutor) -> None:
        """Append what is pending, in one go, and deliver it; when cancelled too, as the file has it then."""
        async with self._turn:
            events = list(self._pending)
            try:
                if events and self._file is not None and self.error is None:
                    await ended(asyncio.get_running_loop().run_in_executor(threads, self._file.append, events))
            except Exception as error:  # the disk's, or of an event that JSON cannot hold
                self.error = error
            finally:
                for _ in events:
                    self._pending.popleft()
                self._deliver(events)

    async def close(self, threads: ThreadPoolExecutor) -> None:
        """Append and deliver all that was published, then let the listeners end.

        It does not rely on the task that writes: where a loop ends with a run under way, that was cancelled.
        """
        while self._pending:
            await self._append(threads)
        self._closed = True
        self._work.set()
        self._wake()

    def end(self) -> None:
        """Deliver what was published, in the file or not, and let the listeners end; nothing after ``close``."""
        self._deliver(list(self._pending))
        self._pending.clear()
        self._closed = True
        self._wake()

    async def follow(self, number: int = 0) -> AsyncIterator[Event]:
        """Yield the events from ``number`` on until the log is closed; while it catches up the loop gets its turns."""
        while True:
            news, begun = self._news, time.perf_counter()
            while number < self._delivered:
                oldest = self._delivered - len(self._kept)
                if number < oldest:
                    yield Missed(number, oldest - 1, number=number)
                    number = oldest
                else:
                    number += 1
                    yield self._kept[number - 1 - oldest]
                    if time.perf_counter() - begun > TURN:
                        await asyncio.sleep(0)
                        begun = time.perf_counter()
            if self._closed and number >= self._delivered:
                return
            await news.wait()

    def _deliver(self, events: list[Event]) -> None:
        self._kept.extend(events)
        self._delivered += len(events)
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


def parsed(path: Path, number: int, line: bytes | str) -> Event:
    """Return the event on a line of the file ``path``; ``number`` counts from 1. Raises ``CheckpointError``."""
    try:
        return from_json(json.loads(line))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(path, f"line {number} is no event that asynctrain wrote: {error}") from error


class EventFile:
    """Events as lines of JSON; a last line that a crash has torn is cut off when the file is opened again."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Event]:
        """Return the events of all whole lines, and cut off what is behind them. Blocks.

        Raises:
            CheckpointError: a line is none that asynctrain wrote; the message names it.
        """
        if not self.path.exists():
            return []
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("r+b") as file:
                file.truncate(whole)
        lines = content[:whole].split(b"\n")[:-1]
        return [parsed(self.path, number, line) for number, line in enumerate(lines, 1)]

    def append(self, events: list[Event]) -> None:
        """Append events. Blocks; raises ``OSError``."""
        lines = "".join(json.dumps(to_json(event)) + "\n" for event in events)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)
