"""What a run tells as it goes: frozen, numbered, and JSON if wanted. Epochs and steps count from 1 here."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from asynctrain import types
from asynctrain.inference import evaluate
from asynctrain.types import JSON

Reason = Literal["finished", "stopped", "cancelled", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    """What all events have; events are equal where what they tell is, whenever that was.

    Attributes:
        number: counted from 0 and never given twice in a run, whatever crashes and resumes it has seen.
        time: when it was published, in seconds since 1970.
    """

    number: int = field(default=-1, compare=False)
    time: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class RunStart(_Event):
    """The run begins: ``step`` steps were done before, ``steps`` are to be done when it is finished.

    What only the end of a stream will tell, or a limit other than epochs, is None.
    """

    epochs: int | None
    step: int
    steps: int | None
    steps_per_epoch: int | None
    samples_per_epoch: int | None
    parameters: int


@dataclass(frozen=True, slots=True)
class StepEnd(_Event):
    """A batch was applied.

    loss, accuracy: of this batch, before the update. samples_per_second: since the start. attempt: how often the run
    was started, this time included; a step that was done again after a crash has a higher one.
    """

    epoch: int
    step: int
    loss: float
    accuracy: float
    samples: int
    samples_per_second: float = field(compare=False)
    attempt: int = field(default=1, compare=False)


@dataclass(frozen=True, slots=True)
class EpochEnd(_Event):
    """An epoch is over. loss, accuracy: over its batches, each before its update. seconds: validation included."""

    epoch: int
    step: int
    loss: float
    accuracy: float
    samples: int
    seconds: float = field(compare=False)
    validation: evaluate.EvaluationResult | None


@dataclass(frozen=True, slots=True)
class Evaluation(_Event):
    """The weights of ``step`` were evaluated on the validation data."""

    epoch: int
    step: int
    result: evaluate.EvaluationResult
    seconds: float = field(compare=False)


@dataclass(frozen=True, slots=True)
class CheckpointSaved(_Event):
    """The file at ``path`` holds the whole state after ``step``. seconds: that writing took, beside the training."""

    step: int
    path: str = field(compare=False)
    seconds: float = field(compare=False)


@dataclass(frozen=True, slots=True)
class SampleSkipped(_Event):
    """A sample was left out, as the loader was told to do with bad ones.

    position: in the epoch's order, or in that of the validation data, which are told before each ``Evaluation``.
    """

    epoch: int
    position: int
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerJoined(_Event):
    """A worker at ``address`` computes from now on; it does ``slots`` microbatches at once."""

    address: str
    slots: int


@dataclass(frozen=True, slots=True)
class WorkerLost(_Event):
    """A worker at ``address`` is gone; its work is computed elsewhere, with the same bits."""

    address: str
    reason: str


@dataclass(frozen=True, slots=True)
class Speculated(_Event):
    """A worker at ``address`` computes too what ``instead_of`` has not returned in time; the first result counts.

    step: the one that the work is for. microbatch: which one of it, from 0; None where it is part of the evaluation
    after that step.
    """

    address: str
    instead_of: str
    step: int
    microbatch: int | None


@dataclass(frozen=True, slots=True)
class Paused(_Event):
    """The run waits after ``step`` for its ``resume()``."""

    step: int


@dataclass(frozen=True, slots=True)
class Resumed(_Event):
    """The run goes on after ``step``: a pause is over, or, where ``attempt`` is a new one, it was started again.

    differences: what is not as it was then, a sentence each: the validation data, the controllers, the metrics.
    """

    step: int
    attempt: int = field(default=1, compare=False)
    differences: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class RunEnd(_Event):
    """The last event of a run. error: one sentence where it failed. why: which limit or controller ended it."""

    reason: Reason
    step: int
    seconds: float = field(compare=False)
    error: str | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Missed(_Event):
    """The events from number ``first`` up to and with ``last`` are no longer kept; this listener was too slow."""

    first: int
    last: int


Event = (
    RunStart
    | StepEnd
    | EpochEnd
    | Evaluation
    | CheckpointSaved
    | SampleSkipped
    | WorkerJoined
    | WorkerLost
    | Speculated
    | Paused
    | Resumed
    | RunEnd
    | Missed
)

Callback = Callable[[Event], Awaitable[None] | None]

_BY_NAME: Mapping[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


def of_worker(notice: types.Notice) -> WorkerJoined | WorkerLost | Speculated:
    """Return the event that tells what a home has told of its workers."""
    match notice:
        case types.WorkerJoined():
            return WorkerJoined(notice.address, notice.slots)
        case types.WorkerLost():
            return WorkerLost(notice.address, notice.reason)
        case types.Speculated(microbatch=None):  # averaged weights have the version -1 - step
            step = notice.step if notice.step >= 0 else -1 - notice.step
            return Speculated(notice.address, notice.instead_of, step, None)
    return Speculated(notice.address, notice.instead_of, notice.step + 1, notice.microbatch)


def to_json(event: Event) -> dict[str, Any]:
    """Return ``{"event": "StepEnd", "number": ..., ...}``; what is not finite becomes null, which is valid JSON."""
    return {"event": type(event).__name__, **finite(asdict(event))}


def from_json(value: JSON) -> Event:
    """Return the event that ``to_json`` described; null stands for NaN where a float belongs.

    Raises:
        ValueError: there is no event of that name, or its fields are others.
    """
    arguments = dict(value)
    kind = _BY_NAME.get(arguments.pop("event", ""))
    if kind is None or arguments.keys() - {known.name for known in fields(kind)}:
        raise ValueError(f"this is none of the events {', '.join(_BY_NAME)}: {value}")
    for known in fields(kind):
        if known.type == "float" and arguments.get(known.name, 0.0) is None:
            arguments[known.name] = math.nan
    for name in ("validation", "result"):
        if arguments.get(name) is not None:
            arguments[name] = evaluate.EvaluationResult.from_json(arguments[name])
    if "differences" in arguments:
        arguments["differences"] = tuple(arguments["differences"])
    event: Event = kind(**arguments)
    return event


def finite(value: Any) -> Any:
    """Return the JSON value with null in the place of each number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
