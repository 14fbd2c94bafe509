"""The progress of a run, live where standard error is a terminal, and lines that stay everywhere."""

from __future__ import annotations

from collections.abc import AsyncIterable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from asynctrain.cli.output import percent
from asynctrain.train.events import EpochEnd, Event, RunStart, StepEnd

COLUMNS = (
    TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
    BarColumn(bar_width=None),
    TextColumn("step {task.completed}/{task.total}"),
    TextColumn("loss {task.fields[loss]:.4f}"),
    TextColumn("accuracy {task.fields[accuracy]:5.1%}"),
    TextColumn("{task.fields[rate]:,.0f} images/s"),
    TimeRemainingColumn(compact=True),
    TextColumn("left"),
)

APART = 1.0  # seconds of training, at least, between two lines that stay


async def show(events: AsyncIterable[Event], console: Console) -> None:
    """Show ``events`` on ``console`` until they end."""
    with Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        display = _Display(progress)
        async for event in events:
            display.update(event)


class _Display:
    """Turns events into what is seen."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._epochs = 0
        self._untold = APART  # seconds since the last line
        self._bar = TaskID(0)

    def update(self, event: Event) -> None:
        match event:
            case RunStart():
                self._start(event)
            case StepEnd():
                self._progress.update(
                    self._bar,
                    completed=event.step,
                    epoch=event.epoch,
                    loss=event.loss,
                    accuracy=event.accuracy,
                    rate=event.samples_per_second,
                )
            case EpochEnd():
                self._end_epoch(event)

    def _start(self, event: RunStart) -> None:
        self._epochs = event.epochs or 0
        self._progress.console.print(
            f"{event.parameters:,} parameters, {event.samples_per_epoch:,} training images, "
            f"{event.epochs} epochs of {event.steps_per_epoch} steps",
            markup=False,
        )
        self._bar = self._progress.add_task(
            "training",
            total=event.steps,
            completed=event.step,
            epoch=1,
            epochs=event.epochs,
            loss=float("nan"),
            accuracy=float("nan"),
            rate=0.0,
        )

    def _end_epoch(self, event: EpochEnd) -> None:
        self._untold += event.seconds
        if self._untold >= APART or event.epoch == self._epochs:
            self._progress.console.print(self._epoch_line(event), markup=False)
            self._untold = 0.0

    def _epoch_line(self, event: EpochEnd) -> str:
        line = (
            f"epoch {event.epoch:{len(str(self._epochs))}}/{self._epochs}  loss {event.loss:.4f}  "
            f"accuracy {percent(event.accuracy)}"
        )
        if event.validation is not None:
            line += f"  test {percent(event.validation.accuracy)}"
        return f"{line}  {event.samples / event.seconds:,.0f} images/s"
