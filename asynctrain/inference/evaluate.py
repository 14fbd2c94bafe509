"""Loss and accuracy of a model over labelled images, on any home."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, Protocol

import numpy as np

from asynctrain.arena import Array
from asynctrain.executors.base import Session
from asynctrain.types import JSON, Batch, BatchStream, ForwardResult, ForwardWork, Sums


@dataclass(frozen=True, slots=True)
class Evaluation:
    """loss: mean per sample. accuracy: share of samples predicted right, 0 to 1. metrics: what else was asked for."""

    loss: float
    accuracy: float
    samples: int
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: JSON) -> Evaluation:
        """Return the evaluation whose fields are in ``value``; null stands for NaN."""
        numbers = {name: nan if value[name] is None else value[name] for name in ("loss", "accuracy")}
        return cls(**{**value, **numbers})


class Metric(Protocol):
    """A figure over an evaluation, or several, gathered batch by batch; ``asynctrain.metrics`` has ready ones."""

    def begin(self) -> Any:
        """Return what is gathered before the first batch."""
        ...

    def add(self, gathered: Any, outputs: Array, labels: Array) -> Any:
        """Return what is gathered after a batch: outputs (N, K) as the model gives them, labels (N,) or (N, K)."""
        ...

    def result(self, gathered: Any) -> Mapping[str, Any]:
        """Return the figures by name, as JSON values."""
        ...


async def evaluate(
    session: Session, version: int, stream: BatchStream, microbatch: int, metrics: Sequence[Metric] = ()
) -> Evaluation:
    """Evaluate the parameters of ``version`` over one epoch of ``stream``, ``microbatch`` samples at a time."""
    sums = Sums()
    gathered = [metric.begin() for metric in metrics]
    async with stream.open() as batches:
        async for batch in batches:
            results = await forward(session, version, batch, microbatch)
            sums = sum((result.sums for result in results), start=sums)
            if metrics:
                outputs = np.concatenate([result.outputs for result in results])
                gathered = [
                    metric.add(own, outputs, batch.labels) for metric, own in zip(metrics, gathered, strict=True)
                ]
    found: dict[str, Any] = {}
    for metric, own in zip(metrics, gathered, strict=True):
        found |= metric.result(own)
    return Evaluation(sums.mean_loss, sums.accuracy, sums.samples, found)


async def forward(session: Session, version: int, batch: Batch, microbatch: int) -> list[ForwardResult]:
    """Compute a batch in pieces of at most ``microbatch`` samples, side by side; the results are in order."""
    works = [
        ForwardWork(batch.images[start : start + microbatch], batch.labels[start : start + microbatch])
        for start in range(0, len(batch.images), microbatch)
    ]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(session.compute(work, version), name=f"forward-{i}") for i, work in enumerate(works)]
        return await asyncio.gather(*tasks)
