"""What a run leaves in the caller's hands."""

from __future__ import annotations

from dataclasses import dataclass, field

from asynctrain.train.events import EpochEnd, Evaluation, Reason
from asynctrain.train.state import TrainState


@dataclass(frozen=True, slots=True)
class History:
    """The result of a run.

    Attributes:
        state: the last state, in read-only arrays of its own.
        events: the ends of epochs and the evaluations, those of earlier attempts included.
        reason: ``finished`` or ``stopped``.
        samples: how many samples were trained on, earlier attempts included.
        seconds: how long this attempt took.
        samples_per_second: of this attempt, validation included.
    """

    state: TrainState = field(compare=False)
    events: tuple[EpochEnd | Evaluation, ...]
    reason: Reason
    samples: int
    seconds: float = field(compare=False)
    samples_per_second: float = field(compare=False)

    @property
    def epochs(self) -> tuple[EpochEnd, ...]:
        """The end of each epoch."""
        return tuple(event for event in self.events if isinstance(event, EpochEnd))

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The evaluations, in their order."""
        return tuple(event for event in self.events if isinstance(event, Evaluation))

    def __repr__(self) -> str:
        last = self.epochs[-1] if self.epochs else None
        told = f", loss {last.loss:.4f}, accuracy {last.accuracy:.4f}" if last else ""
        return f"<History {self.reason}, {len(self.epochs)} epochs, step {self.state.step}{told}>"
