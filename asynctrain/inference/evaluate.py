"""Loss and accuracy of a model over labelled images, on any home."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from asynctrain.executors.base import Session
from asynctrain.types import Batch, BatchStream, ForwardResult, ForwardWork, Sums


@dataclass(frozen=True, slots=True)
class Evaluation:
    """loss: mean per sample. accuracy: share of samples predicted right, 0 to 1."""

    loss: float
    accuracy: float
    samples: int


async def evaluate(session: Session, version: int, stream: BatchStream, microbatch: int) -> Evaluation:
    """Evaluate the parameters of ``version`` over one epoch of ``stream``, ``microbatch`` samples at a time."""
    sums = Sums()
    async with stream.open() as batches:
        async for batch in batches:
            for result in await forward(session, version, batch, microbatch):
                sums += result.sums
    return Evaluation(sums.mean_loss, sums.accuracy, sums.samples)


async def forward(session: Session, version: int, batch: Batch, microbatch: int) -> list[ForwardResult]:
    """Compute a batch in pieces of at most ``microbatch`` samples, side by side; the results are in order."""
    works = [
        ForwardWork(batch.images[start : start + microbatch], batch.labels[start : start + microbatch])
        for start in range(0, len(batch.images), microbatch)
    ]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(session.compute(work, version), name=f"forward-{i}") for i, work in enumerate(works)]
        return await asyncio.gather(*tasks)
