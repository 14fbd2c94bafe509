"""What is particular to groups: homes that come and go, and homes in homes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import numpy as np
import pytest

from asynctrain import nn
from asynctrain.errors import ClosedError, FingerprintError
from asynctrain.executors import Executor, InlineExecutor, Session, ThreadExecutor
from asynctrain.executors.base import Tell, nobody
from asynctrain.executors.crew import Crew
from asynctrain.executors.group import ExecutorGroup
from asynctrain.executors.ledger import Patience
from asynctrain.testing import FailingExecutor, Faults, GatedExecutor, SimulatedExecutor
from asynctrain.types import GradientWork, Notice, Program, WorkerJoined, WorkerLost

MODEL = nn.Model([nn.Flatten(), nn.Dense(3)], (2, 2, 1))
PROGRAM = Program(MODEL.to_json())
PARAMS = MODEL.init(0)
WORK = [GradientWork(0, i, 4, np.full((2, 2, 2, 1), i, np.uint8), np.array([0, 1])) for i in range(4)]
QUIET = Faults(0, kill=0, freeze=0, slow=0, late=0)


def bits(result: Any) -> bytes:
    vector: bytes = result.gradients.vector.tobytes()
    return vector


async def expected() -> list[bytes]:
    async with InlineExecutor() as executor, executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        return [bits(await session.compute(work, 0)) for work in WORK]


async def test_work_goes_to_the_least_busy_home() -> None:
    one, two = GatedExecutor(ThreadExecutor(1)), GatedExecutor(ThreadExecutor(2))
    async with ExecutorGroup(one, two) as group, group.open(PROGRAM) as session:
        assert session.slots == 3
        await session.broadcast(PARAMS, {}, 0)
        tasks = [asyncio.create_task(session.compute(work, 0)) for work in WORK]
        await one.arrived(1)
        await two.arrived(2)
        assert (one.waiting, two.waiting) == (1, 2)
        two.open_gate()
        results = await asyncio.gather(*tasks[1:])
        assert one.waiting == 1
        one.open_gate()
        results.insert(0, await tasks[0])
        assert [bits(result) for result in results] == await expected()


async def test_a_home_that_is_closed_under_the_group_is_lost_and_the_others_do_its_work() -> None:
    gated, notices = GatedExecutor(ThreadExecutor(1)), list[Notice]()
    async with ExecutorGroup(gated, InlineExecutor()) as group, group.open(PROGRAM, notices.append) as session:
        await session.broadcast(PARAMS, {}, 0)
        tasks = [asyncio.create_task(session.compute(work, 0)) for work in WORK]
        await gated.arrived(1)
        await gated.aclose()
        gated.open_gate()
        assert [bits(result) for result in await asyncio.gather(*tasks)] == await expected()
    assert notices[:2] == [WorkerJoined("GatedExecutor-0", 1), WorkerJoined("InlineExecutor-1", 1)]
    assert [notice.address for notice in notices[2:]] == ["GatedExecutor-0"]
    assert isinstance(notices[2], WorkerLost)


async def test_a_home_that_does_not_return_in_time_is_helped_by_another() -> None:
    gated = GatedExecutor(ThreadExecutor(1))
    patience = Patience(floor=0.02, factor=1.0)
    async with (
        ExecutorGroup(gated, InlineExecutor(), patience=patience) as group,
        group.open(PROGRAM) as session,
    ):
        await session.broadcast(PARAMS, {}, 0)
        assert bits(await session.compute(WORK[0], 0)) == (await expected())[0]
        assert isinstance(session, Crew)
        assert session.statistics.speculated == 1


async def test_a_home_that_joins_takes_part_in_the_sessions_that_are_open_and_those_to_come() -> None:
    gated, late = GatedExecutor(InlineExecutor()), GatedExecutor(InlineExecutor())
    async with ExecutorGroup(gated) as group:
        async with group.open(PROGRAM) as session:
            await session.broadcast(PARAMS, {}, 0)
            tasks = [asyncio.create_task(session.compute(work, 0)) for work in WORK]
            await group.join(late)
            await late.arrived(1)
            gated.open_gate()
            late.open_gate()
            assert [bits(result) for result in await asyncio.gather(*tasks)] == await expected()
        async with group.open(PROGRAM) as session:
            assert session.slots == 2


async def test_a_home_that_leaves_does_what_it_has_and_stays_its_owners() -> None:
    gated, other = GatedExecutor(InlineExecutor()), InlineExecutor()
    async with ExecutorGroup(gated, other) as group, group.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        tasks = [asyncio.create_task(session.compute(work, 0)) for work in WORK]
        await gated.arrived(1)
        leaving = asyncio.create_task(group.leave(gated))
        await asyncio.gather(*tasks[1:])
        assert not leaving.done()
        gated.open_gate()
        await leaving
        assert bits(await tasks[0]) == (await expected())[0]
        assert session.slots == 1
        with pytest.raises(ValueError, match="executor must be one of 1 in the group, and not the last, got"):
            await group.leave(other)
        async with gated.open(PROGRAM):
            pass
    await gated.aclose()


class Foreign:
    """An executor on a machine of another kind."""

    def __init__(self, machine: str) -> None:
        self.machine = machine
        self.open_sessions = 0

    @asynccontextmanager
    async def open(self, program: Program, tell: Tell = nobody) -> AsyncIterator[Session]:
        self.open_sessions += 1
        try:
            async with InlineExecutor() as inline, inline.open(program) as session:
                yield _Elsewhere(session, {"machine": self.machine})
        finally:
            self.open_sessions -= 1

    async def aclose(self, grace: float = 1.0) -> None:
        pass

    async def __aenter__(self) -> Foreign:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        pass


class _Elsewhere:
    def __init__(self, session: Session, fingerprint: Mapping[str, str]) -> None:
        self.slots = session.slots
        self.fingerprint = fingerprint
        self.broadcast = session.broadcast
        self.compute = session.compute


async def test_homes_with_different_fingerprints_are_refused_when_a_session_opens() -> None:
    homes = Foreign("x86_64"), Foreign("arm64")
    async with ExecutorGroup(*homes) as group:
        with pytest.raises(FingerprintError, match="machine is 'x86_64' here and 'arm64' there"):
            await AsyncExitStack().enter_async_context(group.open(PROGRAM))
    assert [home.open_sessions for home in homes] == [0, 0]


async def test_a_home_with_another_fingerprint_may_not_join() -> None:
    first, other = Foreign("x86_64"), Foreign("arm64")
    async with ExecutorGroup(first) as group, group.open(PROGRAM) as session:
        with pytest.raises(FingerprintError):
            await group.join(other)
        await asyncio.sleep(0)
        assert other.open_sessions == 0
        await session.broadcast(PARAMS, {}, 0)
        assert bits(await session.compute(WORK[0], 0)) == (await expected())[0]


async def test_a_home_that_cannot_be_opened_fails_the_opening_and_leaves_nothing_open() -> None:
    closed, fine = InlineExecutor(), Foreign("x86_64")
    await closed.aclose()
    async with ExecutorGroup(fine, closed) as group:
        with pytest.raises(ClosedError, match="the executor inline is closed"):
            await AsyncExitStack().enter_async_context(group.open(PROGRAM))
    assert fine.open_sessions == 0


async def test_an_error_of_the_work_comes_through_from_a_home_in_a_home() -> None:
    failing = FailingExecutor(InlineExecutor(), {1: ValueError("the second one fails")})
    async with ExecutorGroup(ExecutorGroup(failing)) as group, group.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        await session.compute(WORK[0], 0)
        with pytest.raises(ValueError, match="the second one fails"):
            await session.compute(WORK[1], 0)
        await session.compute(WORK[2], 0)


async def test_the_slots_of_a_home_follow_its_workers_and_their_notices_come_through() -> None:
    notices: list[Notice] = []
    simulated = SimulatedExecutor(2, QUIET)
    async with ExecutorGroup(simulated, InlineExecutor()) as group, group.open(PROGRAM, notices.append) as session:
        assert session.slots == 3
        (crew,) = simulated.crews
        crew.lose("worker-0", "it was killed")
        assert session.slots == 2
        crew.lose("worker-1", "it was killed")
        await session.broadcast(PARAMS, {}, 0)
        assert session.slots == 1
        results = await asyncio.gather(*(session.compute(work, 0) for work in WORK))
        assert [bits(result) for result in results] == await expected()
    assert WorkerLost("worker-1", "it was killed") in notices
    assert WorkerJoined("SimulatedExecutor-0", 2) in notices


async def test_the_executors_of_a_group_are_closed_with_it_even_if_one_of_them_fails() -> None:
    class Unwilling(InlineExecutor):
        async def aclose(self, grace: float = 1.0) -> None:
            raise OSError("it cannot be closed")

    last = InlineExecutor()
    group = ExecutorGroup(Unwilling(), last)
    with pytest.raises(OSError, match="it cannot be closed"):
        await group.aclose()
    with pytest.raises(ClosedError):
        await AsyncExitStack().enter_async_context(last.open(PROGRAM))


def test_a_group_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="executors must be at least one, got none"):
        ExecutorGroup()


def test_a_group_is_an_executor() -> None:
    executor: Executor = ExecutorGroup(InlineExecutor(), ThreadExecutor(1))
    assert repr(executor) == "<ExecutorGroup, group of InlineExecutor-0, ThreadExecutor-1, 0 sessions>"
