"""What a run leaves in the caller's hands."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asynctrain._files import write_whole
from asynctrain.errors import CheckpointError
from asynctrain.train import checkpoint
from asynctrain.train.controllers import Mode
from asynctrain.train.events import EpochEnd, Evaluation, Reason
from asynctrain.train.figures import Row, best_of, csv_of, last_metric, row_of, table
from asynctrain.train.recorded import RecordedRun
from asynctrain.train.state import TrainState

if TYPE_CHECKING:
    from asynctrain.train.plots import Picture

SHOWN = 10  # epochs in a notebook


@dataclass(frozen=True, slots=True)
class History:
    """The result of a run.

    Attributes:
        state: the last state, in read-only arrays of its own.
        events: the ends of epochs and the evaluations, those of earlier attempts included.
        reason: ``finished`` or ``stopped``; of one that is loaded, or ``trainer.history``, also ``cancelled`` or
            ``failed``, and None where no end is told: the run is under way, or was killed.
        samples: how many samples were trained on, earlier attempts included.
        seconds: how long this attempt took.
        samples_per_second: of this attempt, validation included.
    """

    state: TrainState = field(compare=False)
    events: tuple[EpochEnd | Evaluation, ...]
    reason: Reason | None
    samples: int
    seconds: float = field(compare=False)
    samples_per_second: float = field(compare=False)

    @classmethod
    def load(cls, run_dir: str | PathLike[str]) -> History:
        """Return the history of a run as its folder tells it, up to its latest checkpoint. Blocks.

        Raises:
            FileNotFoundError: the folder holds no run.
            CheckpointError: it holds no checkpoint, or the latest cannot be used.
        """
        run = RecordedRun.read(Path(run_dir))
        if not run.checkpoints:
            raise CheckpointError(run.path, "this run has no checkpoint yet")
        state = checkpoint.load(run.checkpoints[0]).state
        reason = None if run.end is None else run.end.reason
        if state.restore and reason in ("finished", "stopped"):
            kept = state.kept[state.restore]
            state = replace(state, params=kept.params, model_state=kept.model_state)
        return cls(state.read_only(), state.history, reason, state.samples, run.seconds, run.samples_per_second)

    @property
    def epochs(self) -> tuple[EpochEnd, ...]:
        """The end of each epoch."""
        return tuple(event for event in self.events if isinstance(event, EpochEnd))

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The evaluations, in their order."""
        return tuple(event for event in self.events if isinstance(event, Evaluation))

    def best(self, monitor: str = "validation.loss", mode: Mode | None = None) -> EpochEnd:
        """Return the epoch with the best ``monitor``, the earliest of equals.

        Args:
            monitor: ``"validation.loss"``, ``"accuracy"``, ``"validation.<metric>"``, ... as for ``EarlyStopping``.
            mode: ``"min"`` or ``"max"``; by default more of anything but a loss or an error is better.

        Raises:
            ValueError: no epoch is over, ``monitor`` is no figure of this run, or it is NaN in every epoch.
        """
        return best_of(self.epochs, monitor, mode)

    def to_rows(self) -> list[Row]:
        """Return a mapping for each epoch: epoch, step, loss, accuracy, validation.loss, ... for a data frame, say."""
        return [row_of(epoch) for epoch in self.epochs]

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write ``to_rows()`` as CSV with a line of names. Blocks; raises ``OSError``."""
        write_whole(Path(path), csv_of(self.to_rows()).encode())

    def plot(self) -> Picture:
        """Return a figure of loss, accuracy and the other metrics over the epochs.

        Raises:
            ModuleNotFoundError: matplotlib is not there; the extra ``plot`` brings it.
        """
        from asynctrain.train import plots

        return plots.curves(self.epochs, self.evaluations)

    def plot_confusion(self, classes: Sequence[str] = ()) -> Picture:
        """Return a figure of the last evaluation's confusion matrix, ``classes`` naming its rows and columns.

        Raises:
            ValueError: no evaluation has one; the metric ``confusion`` asks for it.
            ModuleNotFoundError: as for ``plot``.
        """
        from asynctrain.train import plots

        return plots.confusion_matrix(self._last("confusion"), classes)

    def plot_mistakes(self, classes: Sequence[str] = ()) -> Picture:
        """Return a figure of the last evaluation's worst mistakes, as images where they come from files. Blocks.

        Raises:
            ValueError: no evaluation has them; the metric ``worst`` asks for them.
            ModuleNotFoundError: as for ``plot``.
        """
        from asynctrain.train import plots

        return plots.mistakes(self._last("worst"), classes)

    def _last(self, metric: str) -> Any:
        found = last_metric(self.evaluations, metric)
        if found is None:
            raise ValueError(f"no evaluation of this run has the metric {metric!r}")
        return found

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Mapping[str, str]:
        """Show itself in a notebook: the last epochs as a table, their curves as a plot where matplotlib is there."""
        shown = f"<p>{html.escape(repr(self)[1:-1])}</p>{table(self.epochs[-SHOWN:])}{self._curves()}"
        return {"text/plain": repr(self), "text/html": shown}

    def _curves(self) -> str:
        try:
            from asynctrain.train import plots
        except ModuleNotFoundError:
            return ""  # then a notebook shows the table alone
        return plots.to_svg(plots.curves(self.epochs, self.evaluations)) if self.epochs else ""

    def __repr__(self) -> str:
        last = self.epochs[-1] if self.epochs else None
        told = f", loss {last.loss:.4f}, accuracy {last.accuracy:.4f}" if last else ""
        reason = self.reason or "without an end"
        return f"<History {reason}, {len(self.epochs)} epochs, step {self.state.step}{told}>"
