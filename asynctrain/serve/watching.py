"""The events of a run for those who watch it from afar: none left out, however slow they are."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from grpc import StatusCode

from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve.messages import outcome_event, to_message
from asynctrain.serve.refusal import Refused
from asynctrain.serve.runs import Runs, ServedRun
from asynctrain.train.events import Event, Missed, RunEnd, from_json
from asynctrain.train.log import EventFile
from asynctrain.train.run import Run

PIECE = 256 * 2**10  # bytes of the file of events that are read in one go


async def watch(runs: Runs, run: ServedRun, number: int) -> AsyncGenerator[pb.TrainEvent, None]:
    """Yield the events of ``run`` from ``number`` on, until it has ended.

    They come from memory while the run is live; what is no longer there, and what was before, comes from the disk. The
    last one tells how the run has ended. The end of an attempt that another one followed is a notice.

    Raises:
        Refused: the server is shutting down, and the next one will have the rest.
    """
    written = _Written(runs, run.folder.events)
    held: RunEnd | None = None  # the end of an attempt, of which the record will tell whether it is the run's
    while True:
        news, live, outcome = run.news, run.live, run.outcome
        async with aclosing(written.read(number) if live is None else _live(live, written, number)) as events:
            async for event in events:
                if held is not None:
                    yield to_message(held)
                held = event if isinstance(event, RunEnd) else None
                number = event.number + 1
                if held is None:
                    yield to_message(event)
        if outcome is not None:
            end = held.number if held is not None else written.count - written.is_at_end
            if held is not None or end >= number:
                yield outcome_event(outcome, end)
            return
        if runs.is_draining and run.live is None:
            raise Refused(StatusCode.UNAVAILABLE, "the server is shutting down")
        await news.wait()


async def _live(live: Run, written: _Written, number: int) -> AsyncGenerator[Event, None]:
    """Yield the events of a run under way until its end; of its error the record will tell."""
    events = live.events(number)
    while True:
        try:
            event = await anext(events, None)
        except Exception:
            return
        if event is None:
            return
        if isinstance(event, Missed):
            async for missed in written.read(event.first):
                if missed.number > event.last:
                    break
                yield missed
        else:
            yield event


class _Written:
    """The file of a run's events, read piece by piece as it grows.

    Attributes:
        count: of the events in the file, when it was read last.
        is_at_end: whether the last of them then was the end of an attempt.
    """

    def __init__(self, runs: Runs, file: EventFile) -> None:
        self._runs = runs
        self._path = file.path
        self._offset = 0
        self.count = 0
        self.is_at_end = False

    async def read(self, number: int) -> AsyncGenerator[Event, None]:
        """Yield the events from ``number`` on that are in the file now."""
        if number < self.count:
            self._offset = self.count = 0
        while lines := await self._runs.in_file_thread(_lines, self._path, self._offset):
            first, self.count = self.count, self.count + len(lines)
            self._offset += sum(map(len, lines)) + len(lines)
            self.is_at_end = json.loads(lines[-1])["event"] == RunEnd.__name__
            for event in await self._runs.in_file_thread(_parsed, lines[max(0, number - first) :]):
                yield event


def _lines(path: Path, offset: int) -> list[bytes]:
    """Return some whole lines of the file from ``offset`` on, without their ends; none where there are no more."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(PIECE)
            if b"\n" not in content:
                content += file.readline()
    except FileNotFoundError:
        return []
    return content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]


def _parsed(lines: list[bytes]) -> list[Event]:
    return [from_json(json.loads(line)) for line in lines]
