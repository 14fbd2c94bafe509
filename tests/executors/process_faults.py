"""Trainings on worker processes to which things happen: killed, frozen, slowed down, at any moment."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import asynctrain as at
from asynctrain import nn
from asynctrain.arena import digest
from asynctrain.executors.ledger import Patience
from asynctrain.train.events import StepEnd
from tests.executors.process_layers import End

Kind = Literal["kill", "freeze", "slow", "kill in a write", "freeze in a write"]
KINDS: tuple[Kind, ...] = ("kill", "freeze", "slow", "kill in a write", "freeze in a write")

HEARTBEAT = 0.5  # seconds
PATIENCE = Patience(floor=0.15, factor=4.0)  # so that what is slowed down is computed twice
STEPS, BATCH, MICROBATCH, CLASSES = 24, 12, 3, 4
SIDE = 8


@dataclass(frozen=True)
class Fault:
    """What happens ``delay`` seconds after the end of ``step``, to which worker (modulo their number)."""

    step: int
    delay: float
    kind: Kind
    worker: int


@dataclass(frozen=True)
class Schedule:
    """The faults of one training, and on how many workers it runs."""

    workers: int
    faults: tuple[Fault, ...]


def schedule(seed: int) -> Schedule:
    """Draw one to four faults for one to three workers."""
    rng = random.Random(seed)
    faults = [
        Fault(rng.randrange(1, STEPS - 1), rng.uniform(0, 0.02), rng.choice(KINDS), rng.randrange(3))
        for _ in range(rng.randint(1, 4))
    ]
    return Schedule(rng.randint(1, 3), tuple(sorted(faults, key=lambda fault: fault.step)))


def model(folder: Path) -> nn.Model:
    """Return a model with dropout, batch norm, and two layers that end or freeze whoever finds the order to do so."""
    killing, freezing = End(str(folder / "kill")), End(str(folder / "freeze"), signal.SIGSTOP)
    layers = [nn.Conv2D(4, 3), nn.BatchNorm(), killing, nn.Flatten(), nn.Dropout(0.3), nn.Dense(16), freezing]
    return nn.Model([*layers, nn.Dense(CLASSES)], input_shape=(SIDE, SIDE, 1))


def executor_for(plan: Schedule) -> at.ProcessExecutor:
    return at.ProcessExecutor(plan.workers, heartbeat=HEARTBEAT, patience=PATIENCE)


class Training:
    """One training, and who lets things happen to its workers."""

    def __init__(self, folder: Path, plan: Schedule) -> None:
        self.told: Counter[str] = Counter()
        self._folder = folder
        self._plan = plan
        for name in ("kill", "freeze"):
            (folder / name).mkdir(exist_ok=True, parents=True)

    async def run(self, executor: at.Executor) -> str:
        """Return the digest after the last step, of which each has had all its samples once."""
        rng = np.random.default_rng(5)
        samples = STEPS * BATCH
        data = at.ArrayDataset(
            rng.integers(0, 256, (samples, SIDE, SIDE, 1), dtype=np.uint8), rng.integers(0, CLASSES, samples)
        )
        loader = at.Loader(data, batch_size=BATCH, image_size=(SIDE, SIDE), channels=1, seed=2)
        trainer = at.Trainer(
            model(self._folder), optimizer=at.optim.adamw(0.01), executor=executor, microbatch=MICROBATCH, seed=3
        )
        seen = []
        async with trainer.start(loader, epochs=1) as run, asyncio.TaskGroup() as group:
            async for event in run:
                self.told[type(event).__name__] += 1
                if isinstance(event, StepEnd):
                    seen.append(event.samples)
                    for number, fault in enumerate(self._plan.faults):
                        if fault.step == event.step and isinstance(executor, at.ProcessExecutor):
                            group.create_task(self._happen(executor, fault, number))
        assert seen == [BATCH] * STEPS
        state = run.history().state
        return digest(state.params) + digest(state.model_state)

    async def _happen(self, executor: at.ProcessExecutor, fault: Fault, number: int) -> None:
        if fault.kind.endswith("in a write"):
            (self._folder / fault.kind.split()[0] / f"die-{number}").touch()
            return
        await asyncio.sleep(fault.delay)
        workers = [int(worker.address.split()[1]) for worker in executor._present]
        if not workers:
            return
        pid = workers[fault.worker % len(workers)]
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
            if fault.kind == "slow":
                await asyncio.sleep(HEARTBEAT * 0.7)
                os.kill(pid, signal.SIGCONT)


def orders_left(folder: Path) -> list[Path]:
    """Return the faults in a write that never took place."""
    return list(folder.rglob("die-*"))
