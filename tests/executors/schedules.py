"""Trainings on simulated workers whose days are full of accidents, and over in a moment: time jumps ahead."""

from __future__ import annotations

import asyncio
import selectors
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np

from asynctrain import nn, optim
from asynctrain.executors import Executor, InlineExecutor
from asynctrain.executors.crew import Crew
from asynctrain.executors.ledger import Statistics
from asynctrain.optim import initial_state
from asynctrain.testing import Faults, SimulatedExecutor
from asynctrain.train.state import TrainState
from asynctrain.train.step import TrainStep
from asynctrain.types import Batch, Cursor, Notice, Program

STEPS = 6
SAMPLES, MICROBATCH = 7, 2  # four microbatches, one of a single sample
MODEL = nn.Model([nn.Flatten(), nn.Dense(6), nn.ReLU(), nn.Dropout(0.3), nn.Dense(3)], (3, 3, 1))


class _JumpingSelector(selectors.SelectSelector):
    """Does not wait where nothing is to be done: it lets the clock jump to the next moment that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.wakings = 0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.wakings += 1
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("everything waits and no timer is set: this would be a hang")
        if not ready and timeout is not None:
            self.now += timeout
        return ready


class JumpingLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while nothing is to be done, and then at once."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    @property
    def wakings(self) -> int:
        """How often it has looked for something to do."""
        return self._jumping.wakings


@dataclass(frozen=True)
class Outcome:
    """How a training has ended: the state's digest, the samples of each step, and what was counted on the way."""

    digest: str
    samples: list[int]
    statistics: Statistics
    notices: list[Notice]


def batch(step: int) -> Batch:
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (SAMPLES, 3, 3, 1), dtype=np.uint8)
    return Batch(images, rng.integers(0, 3, SAMPLES), ("",) * SAMPLES, Cursor(), last=False)


async def train(executor: Executor) -> Outcome:
    optimizer = optim.adamw(1e-2)
    params = MODEL.init(0)
    start = TrainState(Program(MODEL.to_json(), seed=1), params, initial_state(optimizer, params))
    notices: list[Notice] = []
    samples: list[int] = []
    async with executor.open(start.program, notices.append) as session:
        step = TrainStep(MODEL, session, optimizer, MICROBATCH, cast("Any", None))  # it is too small for threads
        state = await step.begin(start)
        for number in range(STEPS):
            state, sums = await step(state, batch(number))
            samples.append(sums.samples)
        statistics = session.statistics if isinstance(session, Crew) else Statistics()
    return Outcome(state.digest(), samples, statistics, notices)


def simulated(seed: int, workers: int) -> Outcome:
    """Return how a training on ``workers`` ends that suffer what is drawn with ``seed``."""

    async def main() -> Outcome:
        async with SimulatedExecutor(workers, Faults(seed)) as executor:
            return await train(executor)

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(main())


@cache
def undisturbed() -> str:
    """Return the digest of a training without accidents."""

    async def main() -> Outcome:
        async with InlineExecutor() as executor:
            return await train(executor)

    with ThreadPoolExecutor(1) as elsewhere:
        return elsewhere.submit(asyncio.run, main()).result().digest


def hold(outcome: Outcome) -> None:
    """Fail unless ``outcome`` is that of a training without accidents, and no sample was lost or counted twice."""
    assert outcome.digest == undisturbed()
    assert outcome.samples == [SAMPLES] * STEPS
    assert outcome.statistics.accepted == STEPS * -(-SAMPLES // MICROBATCH)
