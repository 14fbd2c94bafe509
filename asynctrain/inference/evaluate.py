"""Loss and accuracy of a model over labelled images, on any home."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, Protocol

import numpy as np

from asynctrain._aio import first_of_several
from asynctrain.arena import Array
from asynctrain.executors.base import Session
from asynctrain.types import JSON, Batch, BatchStream, ForwardResult, ForwardWork, SharedThreads, Skipped, Sums, cut


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """How well a model does on labelled images.

    Attributes:
        loss: the mean, weighted by samples and classes where the loss is.
        accuracy: the share of samples predicted right, 0 to 1; weights do not change it, but a sample without any
            weight is left out.
        samples: how many there were.
        metrics: what else was asked for, by name: JSON values.
        skipped: samples that were left out, as the loader was told to do with bad ones; those of a run are its events.
    """

    loss: float
    accuracy: float
    samples: int
    metrics: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def from_json(cls, value: JSON) -> EvaluationResult:
        """Return the evaluation whose fields are in ``value``; null stands for NaN."""
        skipped = tuple(Skipped(**one) for one in value.get("skipped", ()))
        return cls(**{**_numbers(value), "metrics": _numbers(value.get("metrics", {})), "skipped": skipped})


def _numbers(value: JSON) -> dict[str, Any]:
    return {name: nan if figure is None else figure for name, figure in value.items()}


class Metric(Protocol):
    """A figure over an evaluation, or several, gathered batch by batch; ``asynctrain.metrics`` has ready ones.

    What it gathers is a value that it is handed and hands back, so that one metric serves any number of evaluations at
    once. It is called on the event loop, so ``add`` takes well under a millisecond.
    """

    def begin(self) -> Any:
        """Return what is gathered before the first batch."""
        ...

    def add(self, gathered: Any, outputs: Array, batch: Batch) -> Any:
        """Return what is gathered after ``batch``; outputs (N, K) are the model's, before softmax or sigmoid."""
        ...

    def result(self, gathered: Any) -> Mapping[str, Any]:
        """Return the figures by name, as JSON values; numbers can be monitored as ``validation.<name>``."""
        ...


async def _go_on() -> None:
    pass


async def evaluate(
    session: Session,
    version: int,
    stream: BatchStream,
    microbatch: int | None,
    metrics: Sequence[Metric] = (),
    between: Callable[[], Awaitable[None]] = _go_on,
    threads: SharedThreads | None = None,
) -> EvaluationResult:
    """Evaluate the parameters of ``version`` over one epoch of ``stream``, each batch ``cut`` as in training.

    After each batch it awaits ``between()``, which may take as long as it likes. ``threads`` are those that the session
    computes on, if any are.
    """
    sums = Sums()
    gathered = [metric.begin() for metric in metrics]
    async with stream.open(threads=threads) as batches:
        async for batch in batches:
            results = await forward(session, version, _pieces(batch, microbatch))
            sums = sum((result.sums for result in results), start=sums)
            if metrics:
                outputs = np.concatenate([result.outputs for result in results])
                gathered = [metric.add(own, outputs, batch) for metric, own in zip(metrics, gathered, strict=True)]
            await between()
        skipped = tuple(batches.skipped)
    found: dict[str, Any] = {}
    for metric, own in zip(metrics, gathered, strict=True):
        found |= metric.result(own)
    return EvaluationResult(sums.mean_loss, sums.accuracy, sums.samples, found, skipped)


async def forward(session: Session, version: int, works: Sequence[ForwardWork]) -> list[ForwardResult]:
    """Compute works side by side; the results are in their order."""
    with first_of_several():
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(session.compute(work, version), name=f"forward-{i}") for i, work in enumerate(works)
            ]
            return await asyncio.gather(*tasks)


def _pieces(batch: Batch, microbatch: int | None) -> list[ForwardWork]:
    pieces = cut(len(batch.images), microbatch)
    weights = [None if batch.weights is None else batch.weights[piece] for piece in pieces]
    return [
        ForwardWork(batch.images[piece], batch.labels[piece], own) for piece, own in zip(pieces, weights, strict=True)
    ]
