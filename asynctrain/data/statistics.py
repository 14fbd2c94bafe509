"""What a pipeline's stages do and wait for, as data and as a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from asynctrain._aio import Meter


@dataclass(frozen=True, slots=True)
class StageStatistics:
    """One stage so far.

    Attributes:
        name: of the stage.
        items: how many it has handed on; samples, in a loader.
        failures: how many failed in it.
        items_per_second: since the pipeline was opened.
        concurrency: how many items, or chunks of them, it works on at once.
        utilization: the share of its time that its places worked, 0 to 1.
        starved: seconds it waited for something to do.
        blocked: seconds it waited for room behind it.
        occupancy: how full the queue behind it was, 0 to 1.
        capacity: how much that queue holds.
    """

    name: str
    items: int
    failures: int
    items_per_second: float
    concurrency: int
    utilization: float
    starved: float
    blocked: float
    occupancy: float
    capacity: int


def snapshot(meter: Meter, seconds: float) -> StageStatistics:
    """Return what ``meter`` counted in ``seconds``."""
    return StageStatistics(
        name=meter.name,
        items=meter.items,
        failures=meter.failures,
        items_per_second=meter.items / seconds if seconds else 0.0,
        concurrency=meter.concurrency,
        utilization=min(1.0, meter.busy / (seconds * meter.concurrency)) if seconds else 0.0,
        starved=meter.starved,
        blocked=meter.blocked,
        occupancy=meter.occupancy,
        capacity=meter.capacity,
    )


@dataclass(frozen=True, slots=True)
class Statistics:
    """A pipeline so far: its stages from source to last, and how long its consumer let it wait.

    Attributes:
        seconds: since it was opened.
        stages: in the order of the data.
        consumer_waited: seconds in which the consumer waited for an item.
        hints: what would make a stage faster, by its name.
    """

    seconds: float
    stages: tuple[StageStatistics, ...]
    consumer_waited: float
    hints: dict[str, str]

    @property
    def bottleneck(self) -> str | None:
        """The stage the others wait for; None where the consumer is the slowest."""
        if self.consumer_waited < 0.1 * self.seconds:
            return None
        return max(self.stages, key=lambda stage: stage.utilization).name

    def report(self) -> str:
        """Return one sentence on what holds the pipeline up, and a table of the stages."""
        return f"{self._sentence()}\n\n{_table(self.stages)}"

    def _sentence(self) -> str:
        share = self.consumer_waited / self.seconds if self.seconds else 0.0
        if self.bottleneck is None:
            return f"The consumer is the slowest: it waited {share:.0%} of the time, so faster loading gains nothing."
        stage = next(stage for stage in self.stages if stage.name == self.bottleneck)
        busy = f"its {stage.concurrency} places" if stage.concurrency > 1 else "its one place"
        hint = self.hints.get(stage.name, f"more concurrency of {stage.name!r} may help")
        return (
            f"The stage {stage.name!r} is the bottleneck: {busy} worked {stage.utilization:.0%} of the time, while the "
            f"consumer waited for data {share:.0%} of it; {hint}."
        )


def _table(stages: Sequence[StageStatistics]) -> str:
    head = ("stage", "items", "items/s", "at once", "busy", "starved", "blocked", "queue", "failed")
    rows = [
        (
            stage.name,
            f"{stage.items:,}",
            f"{stage.items_per_second:,.0f}",
            str(stage.concurrency),
            f"{stage.utilization:.0%}",
            f"{stage.starved:.1f} s",
            f"{stage.blocked:.1f} s",
            f"{stage.occupancy:.0%} of {stage.capacity}",
            str(stage.failures),
        )
        for stage in stages
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *rows)
    )
