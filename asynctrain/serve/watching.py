"""The events of a run for those who watch it from afar: none left out, however slow they are."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

from grpc import StatusCode

from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve.messages import outcome_event, to_message
from asynctrain.serve.refusal import Refused
from asynctrain.serve.runs import Runs, ServedRun
from asynctrain.serve.told import Told, after, lines_of, size_of
from asynctrain.train.events import Event, Missed, RunEnd, from_json
from asynctrain.train.log import EventFile
from asynctrain.train.run import Run


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
            end = held.number if held is not None else written.told.events - written.told.has_end
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
    """The file of a run's events, read piece by piece as it grows. told: what was in it when it was read last."""

    def __init__(self, runs: Runs, file: EventFile) -> None:
        self._runs = runs
        self._path = file.path
        self._offset = 0
        self.told = Told()

    async def read(self, number: int) -> AsyncGenerator[Event, None]:
        """Yield the events from ``number`` on that are in the file now."""
        if number < self.told.events:
            self._offset, self.told = 0, Told()
        while lines := await self._runs.in_file_thread(lines_of, self._path, self._offset):
            first, self.told = self.told.events, after(self.told, lines)
            self._offset += size_of(lines)
            for event in await self._runs.in_file_thread(_parsed, lines[max(0, number - first) :]):
                yield event


def _parsed(lines: list[bytes]) -> list[Event]:
    return [from_json(json.loads(line)) for line in lines]
