"""Ready callbacks: logs, a progress bar, the best model as a file.

A callback is a function, or a coroutine function, of an event. It is called in the task that trains, before the
training goes on, so it should be quick; those here write files in threads. An error in it is the run's, unless
``optional`` is around it. Callbacks observe; what decides about a run is a controller.

The logs may be given to a resumed run again: they go on in the files that are there.
"""

from __future__ import annotations

import csv
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from asynctrain._aio import in_thread
from asynctrain._files import write_whole
from asynctrain.data.images import ImageSettings
from asynctrain.inference.classifier import Classifier
from asynctrain.nn.model import Model
from asynctrain.train.events import (
    Callback,
    EpochEnd,
    Evaluation,
    Event,
    RunEnd,
    RunStart,
    SampleSkipped,
    StepEnd,
    to_json,
)
from asynctrain.train.figures import csv_of, row_of, scalars
from asynctrain.train.state import TrainState

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

__all__ = ["CSVLog", "JSONLines", "ProgressBar", "SaveBest", "TensorBoard", "optional"]

AT_MOST = 1.0  # seconds for which events of steps wait to be written


def optional(callback: Callback) -> Callback:
    """Return ``callback`` such that an error in it is logged, as ``asynctrain``'s, and the run goes on.

    For what a run can do without:

        >>> await trainer.fit(loader, epochs=10, callbacks=[optional(tell_the_others)])
    """

    async def guarded(event: Event) -> None:
        try:
            waiting = callback(event)
            if inspect.isawaitable(waiting):
                await waiting
        except Exception:
            logging.getLogger("asynctrain").exception("the callback %r failed at %s", callback, type(event).__name__)

    return guarded


class CSVLog:
    """Writes a line for each epoch: epoch, step, samples, seconds, loss, accuracy, validation.loss, ...

    A new run begins the file anew. A resumed one keeps the lines up to the step it goes on from, and replaces those of
    epochs that are done again. The file is whole at any moment.

    Args:
        path: of the file; its folder must be there.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = Path(path)
        self._rows: dict[int, Mapping[str, object]] = {}

    async def __call__(self, event: Event) -> None:
        """Write what an epoch has come to. Raises ``OSError``."""
        match event:
            case RunStart():
                self._rows = await in_thread(self._read, event.step) if event.step else {}
            case EpochEnd():
                self._rows.pop(event.epoch, None)
                self._rows[event.epoch] = row_of(event)
                await in_thread(write_whole, self._path, csv_of(list(self._rows.values())).encode())

    def _read(self, step: int) -> dict[int, Mapping[str, object]]:
        """Return the rows up to ``step`` that are in the file."""
        if not self._path.exists():
            return {}
        with self._path.open(newline="", encoding="utf-8") as file:
            return {int(row["epoch"]): row for row in csv.DictReader(file) if int(row["step"]) <= step}


class JSONLines:
    """Writes every event as a line of JSON, as ``events.to_json`` has it.

    A new run begins the file anew; a resumed one goes on behind what is there, so steps that are done again stand there
    twice, the second time with a higher ``attempt``. Events of steps are written within a second, the others at once;
    what a killed process had not written yet is in ``history.jsonl`` of the run's folder.

    Args:
        path: of the file; its folder must be there.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = Path(path)
        self._waiting = _Waiting()

    async def __call__(self, event: Event) -> None:
        """Write an event, now or with the next. Raises ``OSError``."""
        if isinstance(event, RunStart):
            await in_thread(self._begin, event.number)
        if events := self._waiting.add(event):
            await in_thread(self._append, events)

    def _begin(self, number: int) -> None:
        """Keep of the file the whole lines of events before ``number``: none for a new run."""
        kept = []
        if number and self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["number"] < number]
        write_whole(self._path, "".join(kept).encode())

    def _append(self, events: Sequence[Event]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(to_json(event)) + "\n" for event in events))


class TensorBoard:
    """Writes figures for TensorBoard: ``step/loss``, ``epoch/loss``, ``validation/accuracy``, ... over the steps.

    A resumed run, given the same folder, tells TensorBoard to drop what is there of later steps than it goes on from.
    Figures of steps are written within a second, the others at once. Needs tensorboardX, which the extra
    ``tensorboard`` brings.

    Args:
        log_dir: where the event files go.
    """

    def __init__(self, log_dir: str | PathLike[str]) -> None:
        self._folder = Path(log_dir)
        self._waiting = _Waiting()
        self._writer: EventsWriter | None = None

    async def __call__(self, event: Event) -> None:
        """Write an event's figures, now or with the next. Raises ``OSError``."""
        if events := self._waiting.add(event):
            await in_thread(self._write, events)

    def _write(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case RunStart():
                    self._begin(event)
                case StepEnd():
                    figures = {"loss": event.loss, "accuracy": event.accuracy}
                    self._add(event, "step", {**figures, "samples_per_second": event.samples_per_second})
                case EpochEnd():
                    self._add(event, "epoch", {"loss": event.loss, "accuracy": event.accuracy})
                case Evaluation():
                    result = event.result
                    figures = {"loss": result.loss, "accuracy": result.accuracy, **scalars(result.metrics)}
                    self._add(event, "validation", figures)
                case RunEnd():
                    self._end()
        if self._writer is not None:
            self._writer.flush()

    def _begin(self, event: RunStart) -> None:
        try:
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                'TensorBoard needs tensorboardX: pip install "asynctrain[tensorboard]"', name=error.name
            ) from error
        self._end()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(self._folder / "events"), f".{event.number}")
        begins = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=event.time, step=event.step + 1, session_log=begins))

    def _add(self, event: StepEnd | EpochEnd | Evaluation, group: str, figures: Mapping[str, float]) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        values = [summary_pb2.Summary.Value(tag=f"{group}/{name}", simple_value=v) for name, v in figures.items()]
        told = event_pb2.Event(wall_time=event.time, step=event.step, summary=summary_pb2.Summary(value=values))
        if self._writer is not None:
            self._writer.write_event(told)

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class ProgressBar:
    """Shows the progress in a notebook or on standard error: live in terminals, as lines in files.

    Needs rich, which the extra ``cli`` brings.
    """

    def __init__(self) -> None:
        from asynctrain.train.display import Display

        self._display = Display()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self._display(event)


class Training(Protocol):
    """What trains, as far as the best model is concerned: a ``Trainer``."""

    @property
    def state(self) -> TrainState:
        """The last state of the run."""
        ...


class SaveBest:
    """Writes the best weights so far as a model file, whenever a controller keeps better ones.

        >>> best = SaveBest("best.safetensors", trainer, loader.classes)
        >>> await trainer.fit(loader, epochs=30, controllers=[KeepBest("validation.accuracy")], callbacks=[best])

    Which weights are the best is part of the run's state, so a resumed run knows it, and writes the file that an
    uninterrupted one would have written. ``Classifier.load`` reads it.

    Args:
        path: of the file, which is whole at any moment; its folder must be there.
        trainer: whose run it is.
        classes: the names of the labels.
        controller: the name of the controller: ``"keep_best"`` or ``"early_stopping"``.
        settings: how images were decoded; by default squashed to the model's input shape.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        trainer: Training,
        classes: Sequence[str],
        controller: str = "keep_best",
        settings: ImageSettings | None = None,
    ) -> None:
        self._path = Path(path)
        self._trainer = trainer
        self._classes = tuple(classes)
        self._controller = controller
        self._settings = settings
        self._saved: int | None = None  # the step of the weights in the file

    async def __call__(self, event: Event) -> None:
        """Write the file if the weights that are kept are others than those in it. Raises ``OSError``."""
        if isinstance(event, RunStart):
            self._saved = None
        if not isinstance(event, EpochEnd | RunEnd):
            return
        state = self._trainer.state
        kept = state.kept.get(self._controller)
        if kept is not None and kept.step != self._saved:
            best = replace(state, params=kept.params, model_state=kept.model_state)
            await in_thread(self._save, best)
            self._saved = kept.step

    def _save(self, best: TrainState) -> None:
        model = Model.from_json(best.program.architecture)
        Classifier.from_state(model, best, classes=self._classes, settings=self._settings).save(self._path)


class _Waiting:
    """Events that are to be written together."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def add(self, event: Event) -> Sequence[Event]:
        """Return all that wait when it is time to write them, else nothing."""
        self._events.append(event)
        if isinstance(event, StepEnd | SampleSkipped) and event.time - self._events[0].time < AT_MOST:
            return ()
        events, self._events = self._events, []
        return events
