"""The library's events as messages of the service, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from grpc import StatusCode, aio

from asynctrain.inference import evaluate
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve.records import Outcome
from asynctrain.train import events as at

CODES: Mapping[int, StatusCode] = {code.value[0]: code for code in StatusCode}
EOF: Any = aio.EOF  # type: ignore[attr-defined] # what is read at the end of a stream


def to_message(event: at.Event) -> pb.TrainEvent:
    """Return an event of a run that goes on, or, of the end of one, a notice: ``outcome_event`` tells the true end."""
    message = pb.TrainEvent(number=event.number, time=event.time)
    match event:
        case at.RunStart():
            message.started.CopyFrom(_started(event))
        case at.StepEnd():
            message.progress.CopyFrom(
                pb.Progress(
                    epoch=event.epoch,
                    step=event.step,
                    loss=event.loss,
                    accuracy=event.accuracy,
                    samples=event.samples,
                    samples_per_second=event.samples_per_second,
                    attempt=event.attempt,
                )
            )
        case at.EpochEnd():
            message.epoch_end.CopyFrom(_epoch_end(event))
        case at.CheckpointSaved():
            message.checkpoint_saved.CopyFrom(pb.CheckpointSaved(step=event.step, seconds=event.seconds))
        case at.Paused():
            message.paused.CopyFrom(pb.Paused(step=event.step))
        case at.Resumed():
            message.resumed.CopyFrom(pb.Resumed(step=event.step, attempt=event.attempt))
        case _:
            message.notice.CopyFrom(pb.Notice(name=type(event).__name__, json=json.dumps(at.to_json(event))))
    return message


def outcome_event(outcome: Outcome, number: int) -> pb.TrainEvent:
    """Return the last event of a run that has ended."""
    message = pb.TrainEvent(number=number, time=outcome.time)
    if outcome.end in ("finished", "stopped"):
        message.done.CopyFrom(done(outcome))
    else:
        message.failed.CopyFrom(failed(outcome))
    return message


def done(outcome: Outcome) -> pb.Done:
    """Return what a run has come to."""
    return pb.Done(
        stopped=outcome.end == "stopped",
        metrics=outcome.metrics,
        digest=outcome.digest,
        step=outcome.step,
        seconds=outcome.seconds,
    )


def failed(outcome: Outcome) -> pb.Failed:
    """Return why a run has not come to its end."""
    return pb.Failed(code=outcome.code, detail=outcome.detail, step=outcome.step)


def from_message(message: pb.TrainEvent) -> at.Event | None:
    """Return the library's event that a message stands for; None where there is none, as of ``Accepted``."""
    kind = message.WhichOneof("kind")
    read = _READERS.get(kind or "")
    if read is None:
        return None
    return read(getattr(message, kind or ""), {"number": message.number, "time": message.time})


def _started(event: at.RunStart) -> pb.Started:
    return pb.Started(
        step=event.step,
        steps=event.steps,
        epochs=event.epochs or 0,
        steps_per_epoch=event.steps_per_epoch or 0,
        samples_per_epoch=event.samples_per_epoch or 0,
        parameters=event.parameters,
    )


def _epoch_end(event: at.EpochEnd) -> pb.EpochEnd:
    message = pb.EpochEnd(
        epoch=event.epoch,
        step=event.step,
        loss=event.loss,
        accuracy=event.accuracy,
        samples=event.samples,
        seconds=event.seconds,
    )
    if (found := event.validation) is not None:
        message.validation.CopyFrom(pb.Evaluation(loss=found.loss, accuracy=found.accuracy, samples=found.samples))
    return message


def _run_start(m: pb.Started, common: dict[str, Any]) -> at.Event:
    steps = m.steps if m.HasField("steps") else None
    return at.RunStart(m.epochs, m.step, steps, m.steps_per_epoch, m.samples_per_epoch, m.parameters, **common)


def _step_end(m: pb.Progress, common: dict[str, Any]) -> at.Event:
    return at.StepEnd(m.epoch, m.step, m.loss, m.accuracy, m.samples, m.samples_per_second, m.attempt, **common)


def _end_of_epoch(m: pb.EpochEnd, common: dict[str, Any]) -> at.Event:
    found = None
    if m.HasField("validation"):
        found = evaluate.EvaluationResult(m.validation.loss, m.validation.accuracy, m.validation.samples)
    return at.EpochEnd(m.epoch, m.step, m.loss, m.accuracy, m.samples, m.seconds, found, **common)


def _checkpoint_saved(m: pb.CheckpointSaved, common: dict[str, Any]) -> at.Event:
    return at.CheckpointSaved(m.step, "", m.seconds, **common)


def _paused(m: pb.Paused, common: dict[str, Any]) -> at.Event:
    return at.Paused(m.step, **common)


def _resumed(m: pb.Resumed, common: dict[str, Any]) -> at.Event:
    return at.Resumed(m.step, m.attempt, **common)


def _notice(m: pb.Notice, common: dict[str, Any]) -> at.Event | None:
    try:
        return at.from_json(json.loads(m.json))
    except ValueError:  # of a newer server
        return None


def _done(m: pb.Done, common: dict[str, Any]) -> at.Event:
    return at.RunEnd("stopped" if m.stopped else "finished", m.step, m.seconds, **common)


def _failed(m: pb.Failed, common: dict[str, Any]) -> at.Event:
    reason: at.Reason = "cancelled" if CODES.get(m.code) is StatusCode.CANCELLED else "failed"
    return at.RunEnd(reason, m.step, 0.0, m.detail or None, **common)


_READERS: Mapping[str, Callable[[Any, dict[str, Any]], at.Event | None]] = {
    "started": _run_start,
    "progress": _step_end,
    "epoch_end": _end_of_epoch,
    "checkpoint_saved": _checkpoint_saved,
    "paused": _paused,
    "resumed": _resumed,
    "notice": _notice,
    "done": _done,
    "failed": _failed,
}
