"""A run's folder, read as it stands: of a run that has ended, that is under way, or that was killed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from asynctrain.train import checkpoint
from asynctrain.train.events import (
    EpochEnd,
    Evaluation,
    Event,
    RunEnd,
    RunStart,
    SampleSkipped,
    StepEnd,
)
from asynctrain.train.log import parsed
from asynctrain.train.run_folder import CONFIG, EVENTS


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """What a run has written.

    Attributes:
        path: its folder.
        config: the text of its ``config.toml``.
        events: what it told; of steps that were done again after a crash, the last time counts.
        checkpoints: its files, the latest first.
    """

    path: Path
    config: str
    events: tuple[Event, ...]
    checkpoints: tuple[Path, ...]

    @classmethod
    def read(cls, run_dir: Path) -> RecordedRun:
        """Read a folder and change nothing in it. Blocks.

        Raises:
            FileNotFoundError: it holds no run.
            CheckpointError: its events are not those of this version, or torn.
        """
        config = run_dir / CONFIG
        if not config.is_file():
            raise FileNotFoundError(f"{run_dir}: this folder holds no run")
        told = settled(_lines(run_dir / EVENTS))
        return cls(run_dir, config.read_text(encoding="utf-8"), told, tuple(checkpoint.find(run_dir)))

    @property
    def start(self) -> RunStart | None:
        """How the last attempt began; None where it has not told anything yet."""
        return next((event for event in reversed(self.events) if isinstance(event, RunStart)), None)

    @property
    def end(self) -> RunEnd | None:
        """How the last attempt ended; None where it is under way, or was killed."""
        after = next((event for event in reversed(self.events) if isinstance(event, RunStart | RunEnd)), None)
        return after if isinstance(after, RunEnd) else None

    @property
    def steps(self) -> tuple[StepEnd, ...]:
        """The steps."""
        return tuple(event for event in self.events if isinstance(event, StepEnd))

    @property
    def epochs(self) -> tuple[EpochEnd, ...]:
        """The ends of epochs."""
        return tuple(event for event in self.events if isinstance(event, EpochEnd))

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The evaluations."""
        return tuple(event for event in self.events if isinstance(event, Evaluation))

    @property
    def skipped(self) -> tuple[SampleSkipped, ...]:
        """The samples that were left out."""
        return tuple(event for event in self.events if isinstance(event, SampleSkipped))

    @property
    def seconds(self) -> float:
        """How long the last attempt took, or has taken so far."""
        if self.end is not None:
            return self.end.seconds
        return self.events[-1].time - self.start.time if self.start is not None else 0.0

    @property
    def samples_per_second(self) -> float:
        """How fast the last attempt trained, validation included."""
        steps = self.steps
        trained = sum(step.samples for step in steps if step.attempt == steps[-1].attempt)
        return trained / self.seconds if self.seconds else 0.0


def settled(events: Iterable[Event]) -> tuple[Event, ...]:
    """Return what counts of the events of all attempts: of what was done again after a crash, the last time."""
    counting: dict[tuple[object, ...], Event] = {}
    for event in events:
        if isinstance(event, RunStart):
            counting = {key: told for key, told in counting.items() if not _is_later(told, event.step)}
        counting[_key(event)] = event
    return tuple(counting.values())


def _is_later(event: Event, step: int) -> bool:
    return isinstance(event, StepEnd | EpochEnd | Evaluation) and event.step > step


def _key(event: Event) -> tuple[object, ...]:
    """Return what two events have in common that tell the same."""
    match event:
        case StepEnd() | Evaluation():
            return type(event), event.step
        case EpochEnd():
            return type(event), event.epoch
        case SampleSkipped():
            return type(event), event.epoch, event.position
    return type(event), event.number


def _lines(file: Path) -> Iterator[Event]:
    """Yield the events of all whole lines; the last may be half-written at this moment."""
    if not file.exists():
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n"):
                yield parsed(file, number, line)
