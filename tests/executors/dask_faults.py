"""Trainings on a Dask cluster to whose workers things happen: killed, frozen, slowed down, joined by others."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import asynctrain as at
from asynctrain import nn
from asynctrain._aio import in_thread
from asynctrain.arena import digest
from asynctrain.executors.ledger import Patience
from asynctrain.train.events import StepEnd
from tests.executors.dask_clusters import DaskCluster

Kind = Literal["kill", "freeze", "slow", "join"]
KINDS: tuple[Kind, ...] = ("kill", "freeze", "slow", "join")

PATIENCE = Patience(floor=0.3, factor=4.0)
STEPS, BATCH, MICROBATCH, CLASSES = 24, 12, 3, 4
SLOW = 0.6  # seconds without work
SIDE = 8
MODEL = nn.Model(
    [nn.Conv2D(4, 3), nn.BatchNorm(), nn.Flatten(), nn.Dropout(0.3), nn.Dense(16), nn.Dense(CLASSES)], (SIDE, SIDE, 1)
)


@dataclass(frozen=True)
class Fault:
    """What happens ``delay`` seconds after the end of ``step``, to which worker (modulo their number)."""

    step: int
    delay: float
    kind: Kind
    worker: int


@dataclass(frozen=True)
class Schedule:
    """The faults of one training, and on how many workers it begins."""

    workers: int
    faults: tuple[Fault, ...]


def schedule(seed: int) -> Schedule:
    """Draw two to four faults for one to three workers."""
    rng = random.Random(seed)
    faults = [
        Fault(rng.randrange(1, STEPS - 4), rng.uniform(0, 0.03), rng.choice(KINDS), rng.randrange(3))
        for _ in range(rng.randint(2, 4))
    ]
    return Schedule(rng.randint(1, 3), tuple(sorted(faults, key=lambda fault: fault.step)))


async def train(
    executor: at.Executor, told: Counter[str], cluster: DaskCluster | None = None, plan: Schedule = Schedule(0, ())
) -> str:
    """Return the digest after the last step, of which each has had all its samples once."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (STEPS * BATCH, SIDE, SIDE, 1), dtype=np.uint8)
    data = at.ArrayDataset(images, rng.integers(0, CLASSES, STEPS * BATCH))
    loader = at.Loader(data, batch_size=BATCH, image_size=(SIDE, SIDE), channels=1, seed=2)
    trainer = at.Trainer(MODEL, optimizer=at.optim.adamw(0.01), executor=executor, microbatch=MICROBATCH, seed=3)
    seen = []
    async with trainer.start(loader, epochs=1) as run, asyncio.TaskGroup() as group:
        async for event in run:
            told[type(event).__name__] += 1
            if isinstance(event, StepEnd):
                seen.append(event.samples)
                for fault in plan.faults:
                    if fault.step == event.step and cluster is not None:
                        group.create_task(_happen(cluster, fault))
    assert seen == [BATCH] * STEPS
    state = run.history().state
    return digest(state.params) + digest(state.model_state)


async def _happen(cluster: DaskCluster, fault: Fault) -> None:
    """Let it happen. A worker that does no more for good is followed by a new one, as a nanny or a cluster would do."""
    await asyncio.sleep(fault.delay)
    worker = cluster.workers[fault.worker % len(cluster.workers)]
    match fault.kind:
        case "kill":
            worker.kill()
        case "freeze" | "slow":
            worker.send_signal(signal.SIGSTOP)
    if fault.kind == "slow":
        await asyncio.sleep(SLOW)
        worker.send_signal(signal.SIGCONT)
    else:
        cluster.add_worker()


async def undisturbed() -> str:
    """Return the digest of a training to which nothing happens."""
    async with at.InlineExecutor() as inline:
        return await train(inline, Counter())


async def hold(plan: Schedule, folder: Path) -> Counter[str]:
    """Fail unless a training with the faults of ``plan`` ends as one without; return what was told."""
    told: Counter[str] = Counter()
    cluster = DaskCluster(folder, plan.workers)
    await in_thread(cluster.__enter__)
    try:
        async with at.DaskExecutor(cluster.address, patience=PATIENCE) as executor:
            async with asyncio.timeout(60):
                assert await train(executor, told, cluster, plan) == await undisturbed(), plan
    finally:
        await in_thread(cluster.__exit__, None, None, None)
    return told
