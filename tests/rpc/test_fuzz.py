"""Whatever is said on a worker's stream, by whichever side: a status in time, and everybody else goes on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import pytest
from grpc import aio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import asynctrain as at
from asynctrain.rpc import GrpcExecutor, Worker, WorkerLimits, dialling, listen
from tests.rpc import fuzzing

T = TypeVar("T")

CASES = 250  # of each side
LIMITS = WorkerLimits(sessions=3, parameter_bytes=2**20, activation_bytes=2**20, work_bytes=2**20, pending_bytes=2**22)
Talk = Callable[[aio.Channel, fuzzing.Talk], Coroutine[Any, Any, None]]


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def fuzz(
    runner: asyncio.Runner, channel: aio.Channel, talks: st.SearchStrategy[fuzzing.Talk], lie: Talk, cases: int
) -> None:
    """Have so many conversations."""

    @settings(max_examples=cases, suppress_health_check=list(HealthCheck), database=None)
    @given(talks)
    def one(talk: fuzzing.Talk) -> None:
        runner.run(lie(channel, talk))

    one()


@contextmanager
def held(runner: asyncio.Runner, block: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """Have an async block around tasks that come and go, in a task of its own."""
    stop = asyncio.Event()

    async def keep(ready: asyncio.Future[T]) -> None:
        async with block as value:
            ready.set_result(value)
            await stop.wait()

    async def begin() -> tuple[T, asyncio.Task[None]]:
        ready: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(keep(ready))
        both: list[asyncio.Future[Any]] = [ready, task]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        return ready.result(), task

    value, task = runner.run(begin())
    try:
        yield value
    finally:

        async def end() -> None:
            stop.set()
            await task

        runner.run(end())


@asynccontextmanager
async def a_worker() -> AsyncIterator[tuple[Worker, str, aio.Channel]]:
    async with at.ThreadExecutor(1) as home:
        worker = Worker(home, capacity=1, limits=LIMITS)
        async with listen(worker, "127.0.0.1:0") as port, aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield worker, f"127.0.0.1:{port}", channel


@asynccontextmanager
async def a_coordinator() -> AsyncIterator[tuple[GrpcExecutor, at.Session, aio.Channel]]:
    async with GrpcExecutor(listen="127.0.0.1:0", heartbeat=60) as executor, at.ThreadExecutor(1) as home:
        address = await executor.listening()
        async with (
            dialling(Worker(home, capacity=1), address),
            fuzzing.busy(executor) as session,
            aio.insecure_channel(address) as channel,
        ):
            yield executor, session, channel


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.02)


def test_a_worker_that_is_lied_to_answers_with_a_status_and_works_on(
    runner: asyncio.Runner, caplog: pytest.LogCaptureFixture
) -> None:
    async def works(address: str) -> bool:
        async with GrpcExecutor(address) as executor, executor.open(fuzzing.PROGRAM) as session:
            await session.broadcast(fuzzing.PARAMS, {}, 0)
            return await fuzzing.bits(session) == await fuzzing.expected()

    with held(runner, a_worker()) as (worker, address, channel):
        fuzz(runner, channel, fuzzing.talks_to_worker, fuzzing.lie_to_worker, CASES)
        assert runner.run(works(address))
        runner.run(until(lambda: worker.coordinators == 0))
    assert not unforeseen(caplog)


def test_a_coordinator_that_is_lied_to_answers_with_a_status_and_computes_on_with_its_other_workers(
    runner: asyncio.Runner, caplog: pytest.LogCaptureFixture
) -> None:
    with held(runner, a_coordinator()) as (executor, session, channel):
        fuzz(runner, channel, fuzzing.talks_to_coordinator, fuzzing.lie_to_coordinator, CASES)
        assert len(executor._present) == 1
        assert runner.run(fuzzing.bits(session)) == runner.run(fuzzing.expected())
    assert not unforeseen(caplog)


def unforeseen(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged of errors that nobody has thought of."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
