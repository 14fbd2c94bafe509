"""The public fakes and checks for tests of one's own parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from asynctrain import nn
from asynctrain.errors import StaleParametersError
from asynctrain.executors import InlineExecutor, Session, ThreadExecutor
from asynctrain.executors.base import Tell, nobody
from asynctrain.testing import FailingExecutor, Faults, GatedExecutor, SimulatedExecutor, check_executor
from asynctrain.types import ForwardWork, Params, Program

MODEL = nn.Model([nn.Flatten(), nn.Dense(3)], (2, 2, 1))
PROGRAM = Program(MODEL.to_json())
WORK = ForwardWork(np.zeros((2, 2, 2, 1), np.uint8))


async def test_a_gate_holds_computations_back_until_it_is_opened() -> None:
    async with GatedExecutor(ThreadExecutor(1)) as executor, executor.open(PROGRAM) as session:
        await session.broadcast(MODEL.init(0), {}, 0)
        tasks = [asyncio.create_task(session.compute(WORK, 0)) for _ in range(2)]
        await executor.arrived(2)
        assert executor.waiting == 2
        tasks[0].cancel()
        await asyncio.wait([tasks[0]])
        assert executor.waiting == 1
        executor.open_gate()
        await tasks[1]
        executor.close_gate()
        task = asyncio.create_task(session.compute(WORK, 0))
        await executor.arrived(1)
        executor.open_gate()
        await task
    assert repr(executor) == "<GatedExecutor around <ThreadExecutor threads:1, closed>>"


async def test_chosen_computations_fail() -> None:
    async with (
        FailingExecutor(InlineExecutor(), {1: OSError("no")}) as executor,
        executor.open(PROGRAM) as session,
    ):
        await session.broadcast(MODEL.init(0), {}, 0)
        await session.compute(WORK, 0)
        with pytest.raises(OSError, match="no"):
            await session.compute(WORK, 0)
        await session.compute(WORK, 0)


async def test_simulated_workers_on_a_quiet_day_pass_the_check() -> None:
    quiet = Faults(0, kill=0, freeze=0, slow=0, late=0)
    await check_executor(lambda: SimulatedExecutor(2, quiet))


class Broken(InlineExecutor):
    """An executor that breaks one promise."""

    def __init__(self, promise: str) -> None:
        super().__init__()
        self.promise = promise
        self.last: Params = {}

    @asynccontextmanager
    async def open(self, program: Program, tell: Tell = nobody) -> AsyncIterator[Session]:
        if self.promise == "closed":
            self._closed = False
        async with super().open(program, tell) as session:
            yield _BrokenSession(session, self)


class _BrokenSession:
    def __init__(self, session: Any, executor: Broken) -> None:
        self.session, self.executor = session, executor
        self.slots, self.fingerprint = session.slots, session.fingerprint

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        self.executor.last = params
        await self.session.broadcast(params, model_state, version)

    async def compute(self, work: Any, version: int) -> Any:
        promise = self.executor.promise
        if promise == "sessions":
            await self.session.broadcast(self.executor.last, {}, version)
        if promise == "version":
            version = 0
        try:
            result = await self.session.compute(work, version)
        except asyncio.CancelledError:
            self.session._version = 17 if promise == "cancelled" else self.session._version
            raise
        if promise == "bits":
            result.gradients.vector[0] += 1e-6
        return result


@pytest.mark.parametrize(
    ("promise", "message"),
    [
        ("bits", "the gradients have other bits than those of the inline executor"),
        ("sessions", "the gradients have other bits than those of the inline executor|two sessions share"),
        ("version", "a version that was not broadcast is accepted"),
        ("closed", "an executor that was closed opens a session"),
    ],
)
async def test_the_check_names_the_promise_that_is_broken(promise: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        await check_executor(lambda: Broken(promise))


async def test_the_check_finds_a_session_that_cannot_be_used_after_a_cancellation() -> None:
    with pytest.raises((AssertionError, StaleParametersError)):
        await check_executor(lambda: Broken("cancelled"))
