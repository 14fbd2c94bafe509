"""The progress of a run for people: a live line in terminals, the same in notebooks, and lines that stay everywhere."""

from __future__ import annotations

import html
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

from asynctrain.train.events import EpochEnd, Event, Paused, Resumed, RunEnd, RunStart, SampleSkipped, StepEnd

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'the progress display needs rich: pip install "asynctrain[cli]"', name=error.name
    ) from error

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=None),
    TextColumn("{task.fields[figures]}"),
    TimeRemainingColumn(compact=True),
    TextColumn("left"),
)

APART = 1.0  # seconds of training, at least, between two lines that stay
REDRAWN = 0.25  # seconds, at least, between two looks of a notebook
LINES = 200  # that stay in a notebook, at most; the last ones


class View(Protocol):
    """Where a display is seen."""

    def start(self, step: int, steps: int | None) -> None:
        """Begin at ``step`` of ``steps``."""
        ...

    def show(self, step: int, epoch: str, figures: str) -> None:
        """Show how far it is."""
        ...

    def say(self, line: str) -> None:
        """Add a line that stays."""
        ...

    def stop(self) -> None:
        """Leave only the lines that stay; nothing if it has not begun."""
        ...


class Display:
    """Turns events into what is seen; a callback like any other.

    Args:
        view: where; by default the notebook that this is, or else standard error.
    """

    def __init__(self, view: View | None = None) -> None:
        self._view = view or usual_view()
        self._epochs: int | None = None
        self._steps: int | None = None
        self._untold = APART  # seconds since the last line
        self._skipped: set[str] = set()  # what was told to be left out, as it is in each epoch

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case RunStart():
                self._start(event)
            case StepEnd():
                self._view.show(event.step, f"epoch {_of(event.epoch, self._epochs)}", self._figures(event))
            case EpochEnd():
                self._end_epoch(event)
            case SampleSkipped() if event.source not in self._skipped:
                self._skipped.add(event.source)
                self._view.say(f"left out {event.source}: {event.reason}")
            case Paused():
                self._view.say(f"paused after step {event.step:,}")
            case Resumed():
                self._view.say(f"going on after step {event.step:,}")
                for difference in event.differences:
                    self._view.say(f"not as it was: {difference}")
            case RunEnd():
                self._view.stop()

    def close(self) -> None:
        """Stop showing, also where no end was told."""
        self._view.stop()

    def _start(self, event: RunStart) -> None:
        self._epochs, self._steps, self._untold = event.epochs, event.steps, APART
        self._view.start(event.step, event.steps)
        parts = [f"{event.parameters:,} parameters"]
        if event.samples_per_epoch is not None:
            parts.append(f"{event.samples_per_epoch:,} training images")
        if event.epochs is not None:
            steps = "" if event.steps_per_epoch is None else f" of {_counted(event.steps_per_epoch, 'step')}"
            parts.append(f"{_counted(event.epochs, 'epoch')}{steps}")
        self._view.say(", ".join(parts))

    def _figures(self, event: StepEnd) -> str:
        return (
            f"step {_of(event.step, self._steps)}  loss {event.loss:.4f}  accuracy {event.accuracy:5.1%}  "
            f"{event.samples_per_second:,.0f} images/s"
        )

    def _end_epoch(self, event: EpochEnd) -> None:
        self._untold += event.seconds
        if self._untold >= APART or event.epoch == self._epochs:
            self._view.say(self._epoch_line(event))
            self._untold = 0.0

    def _epoch_line(self, event: EpochEnd) -> str:
        epoch = _of(f"{event.epoch:{len(str(self._epochs or 0))}}", self._epochs)
        line = f"epoch {epoch}  loss {event.loss:.4f}  accuracy {100 * event.accuracy:.2f} %"
        if event.validation is not None:
            line += f"  test {100 * event.validation.accuracy:.2f} %"
        return f"{line}  {event.samples / event.seconds:,.0f} images/s"


class TerminalView:
    """A bar below the lines that stay where ``console`` is a terminal, else the lines alone."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None

    def start(self, step: int, steps: int | None) -> None:
        """Begin at ``step`` of ``steps``."""
        self.stop()
        live = self._console.is_terminal
        self._progress = Progress(*COLUMNS, console=self._console, transient=True, disable=not live)
        self._progress.add_task("", total=steps, completed=step, figures="")
        self._progress.start()

    def show(self, step: int, epoch: str, figures: str) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step, description=epoch, figures=figures)

    def say(self, line: str) -> None:
        """Print a line."""
        self._console.print(line, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class NotebookView:
    """A bar and lines in the output of a cell, as plain HTML that needs no extension of the notebook.

    Args:
        display: ``IPython.display.display``.
        now: the time in seconds; what comes sooner than a quarter of a second after the last look waits for the next.
    """

    def __init__(self, display: Callable[..., Any], now: Callable[[], float] = monotonic) -> None:
        self._display = display
        self._now = now
        self._handle: Any = None
        self._lines: list[str] = []
        self._steps: int | None = None
        self._bar = ""
        self._next = 0.0

    def start(self, step: int, steps: int | None) -> None:
        """Begin an output of its own."""
        self._lines, self._steps, self._bar = [], steps, ""
        self._handle = self._display(self._seen(), raw=True, display_id=True)

    def show(self, step: int, epoch: str, figures: str) -> None:
        """Move the bar."""
        place = "" if self._steps is None else f' value="{step}" max="{self._steps}"'
        self._bar = f"<div>{html.escape(epoch)} <progress{place}></progress> {html.escape(figures)}</div>"
        if self._now() >= self._next:
            self._update()

    def say(self, line: str) -> None:
        """Add a line."""
        self._lines = [*self._lines[1 - LINES :], line]
        self._update()

    def stop(self) -> None:
        """Take the bar away."""
        self._bar = ""
        self._update()

    def _update(self) -> None:
        self._next = self._now() + REDRAWN
        if self._handle is not None:
            self._handle.update(self._seen(), raw=True)

    def _seen(self) -> dict[str, str]:
        text = "\n".join(self._lines)
        return {"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>{self._bar}"}


def usual_view() -> View:
    """Return a view in the notebook that runs this code, or else on standard error."""
    if Console().is_jupyter:
        from IPython.display import display

        return NotebookView(display)
    return TerminalView(Console(stderr=True, highlight=False))


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _of(number: object, total: int | None) -> str:
    return f"{number}" if total is None else f"{number}/{total}"
