"""What a run leaves in the caller's hands."""

from __future__ import annotations

from dataclasses import dataclass

from asynctrain.train.events import EpochEnd, Reason
from asynctrain.train.state import TrainState


@dataclass(frozen=True, slots=True)
class History:
    """The result of a run.

    Attributes:
        state: the last state, in read-only arrays of its own.
        epochs: the end of each epoch.
        reason: ``finished`` or ``stopped``.
        samples: how many samples were trained on in this run.
        seconds: how long it took.
    """

    state: TrainState
    epochs: tuple[EpochEnd, ...]
    reason: Reason
    samples: int
    seconds: float

    @property
    def samples_per_second(self) -> float:
        """Samples trained on per second of the whole run, validation included."""
        return self.samples / self.seconds

    def __repr__(self) -> str:
        last = self.epochs[-1] if self.epochs else None
        told = f", loss {last.loss:.4f}, accuracy {last.accuracy:.4f}" if last else ""
        return f"<History {self.reason}, {len(self.epochs)} epochs, step {self.state.step}{told}>"
