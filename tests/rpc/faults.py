"""Trainings on worker processes to which things happen: killed, told to leave, frozen, slowed down, at any moment."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

import asynctrain as at
from asynctrain import nn
from asynctrain.arena import digest
from asynctrain.executors.ledger import Patience
from asynctrain.rpc import GrpcExecutor
from asynctrain.train.events import StepEnd
from tests.ports import kept_port
from tests.rpc.conftest import WorkerProcess, worker_process

Kind = Literal["kill", "drain", "freeze", "slow"]
KINDS: tuple[Kind, ...] = ("kill", "drain", "freeze", "slow")

HEARTBEAT = 0.5  # seconds
FROZEN = 3 * HEARTBEAT  # seconds until who is frozen is let go on
SLOWED = 0.7 * HEARTBEAT
STEPS, BATCH, MICROBATCH, CLASSES, SIDE = 40, 12, 3, 4, 8
MODEL = nn.Model(
    [nn.Conv2D(4, 3), nn.BatchNorm(), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Dense(CLASSES)], (SIDE, SIDE, 1)
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


class Workers:
    """Worker processes at addresses that stay; who ends is started again there."""

    def __init__(self, number: int) -> None:
        self._stack = ExitStack()
        self.addresses: list[str] = []
        self._number = number
        self._processes: dict[str, WorkerProcess] = {}  # who is at an address; nobody while the next one starts

    def __enter__(self) -> Self:
        for _ in range(self._number):
            self.addresses.append(f"127.0.0.1:{self._stack.enter_context(kept_port())}")
            self._start(self.addresses[-1])
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _start(self, address: str) -> None:
        process = worker_process("--listen", address, "--executor", "threads:1", "--capacity", "1")
        self._processes[address] = self._stack.enter_context(process)

    async def happen(self, fault: Fault, among: int) -> None:
        """Let a fault happen to one of the first ``among`` workers, and then what makes up for it."""
        await asyncio.sleep(fault.delay)
        address = self.addresses[fault.worker % among]
        worker = self._processes.get(address)
        if worker is None:
            return
        with suppress(ProcessLookupError):
            if fault.kind in ("freeze", "slow"):
                worker.send(signal.SIGSTOP)
                await asyncio.sleep(FROZEN if fault.kind == "freeze" else SLOWED)
                worker.send(signal.SIGCONT)
                return
            worker.send(signal.SIGCONT)  # it may be frozen, and could not leave
            worker.send(signal.SIGKILL if fault.kind == "kill" else signal.SIGTERM)
        await asyncio.to_thread(worker.process.wait, 60)
        if self._processes.get(address) is worker:  # the first of those that wait for its end starts the next one
            del self._processes[address]
            await asyncio.to_thread(self._start, address)


async def trained(executor: at.Executor, plan: Schedule, workers: Workers | None) -> tuple[str, Counter[str]]:
    """Return the digest of a training to whose workers things happen, if there are any, and the names of its events."""
    rng = np.random.default_rng(5)
    samples = STEPS * BATCH
    images = rng.integers(0, 256, (samples, SIDE, SIDE, 1), dtype=np.uint8)
    data = at.ArrayDataset(images, rng.integers(0, CLASSES, samples))
    loader = at.Loader(data, batch_size=BATCH, image_size=(SIDE, SIDE), channels=1, seed=2)
    trainer = at.Trainer(MODEL, optimizer=at.optim.adamw(0.01), executor=executor, microbatch=MICROBATCH, seed=3)
    told: Counter[str] = Counter()
    seen = []
    async with asyncio.TaskGroup() as group, trainer.start(loader, epochs=1) as run:
        async for event in run:
            told[type(event).__name__] += 1
            if isinstance(event, StepEnd):
                seen.append(event.samples)
                for fault in plan.faults:
                    if workers is not None and fault.step == event.step:
                        group.create_task(workers.happen(fault, plan.workers))
    assert seen == [BATCH] * STEPS
    state = run.history().state
    return digest(state.params) + digest(state.model_state), told


async def hold(plan: Schedule, workers: Workers) -> Counter[str]:
    """Hold that a training to which all this happens has the bits of one without, and return what it told."""
    async with at.InlineExecutor() as inline:
        expected, _ = await trained(inline, plan, None)
    addresses = workers.addresses[: plan.workers]
    patience = Patience(floor=0.15, factor=4.0)  # so that what is slowed down is computed twice
    async with GrpcExecutor(
        *addresses, heartbeat=HEARTBEAT, patience=patience, join_wait=60, worker_wait=60
    ) as executor:
        bits, told = await trained(executor, plan, workers)
    assert bits == expected, plan
    return told
