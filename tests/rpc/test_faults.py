"""Workers as processes to which things happen during a training: the bits stay the same."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import numpy as np
import pytest

import asynctrain as at
from asynctrain import nn
from asynctrain.arena import digest
from asynctrain.executors.ledger import Patience
from asynctrain.rpc import Access, GrpcExecutor, Tokens
from asynctrain.train.events import StepEnd, WorkerLost
from asynctrain.types import Program
from tests.executors.process_layers import End
from tests.rpc.conftest import Start, WorkerProcess
from tests.serve.proxy import Proxy

pytestmark = pytest.mark.one_loop

HEARTBEAT = 0.6  # seconds
STEPS, BATCH, MICROBATCH, CLASSES = 12, 12, 3, 4
MODEL = nn.Model(
    [nn.Conv2D(4, 3), nn.BatchNorm(), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Dense(CLASSES)], (8, 8, 1)
)
Happening = Callable[[], Awaitable[None]]


async def trained(executor: at.Executor, happenings: Mapping[int, Happening]) -> tuple[str, list[str]]:
    """Return the digest of a training, in which things happen after some steps, and why workers were lost."""
    rng = np.random.default_rng(5)
    samples = STEPS * BATCH
    data = at.ArrayDataset(rng.integers(0, 256, (samples, 8, 8, 1), dtype=np.uint8), rng.integers(0, CLASSES, samples))
    loader = at.Loader(data, batch_size=BATCH, image_size=(8, 8), channels=1, seed=2)
    trainer = at.Trainer(MODEL, optimizer=at.optim.adamw(0.01), executor=executor, microbatch=MICROBATCH, seed=3)
    lost = []
    async with trainer.start(loader, epochs=1) as run:
        async for event in run:
            if isinstance(event, WorkerLost):
                lost.append(event.reason)
            if isinstance(event, StepEnd) and event.step in happenings:
                await run.pause()
                await happenings[event.step]()
                run.resume()
    state = run.history().state
    return digest(state.params) + digest(state.model_state), lost


async def expected() -> str:
    async with at.InlineExecutor() as executor:
        return (await trained(executor, {}))[0]


@asynccontextmanager
async def two(start: Start, **options: object) -> AsyncIterator[tuple[GrpcExecutor, list[WorkerProcess]]]:
    """Have an executor on two processes of one thread each, both of which are connected."""
    workers = [start("--executor", "threads:1", "--capacity", "1") for _ in range(2)]
    patience = Patience(floor=0.3)
    addresses = [worker.address for worker in workers]
    async with GrpcExecutor(*addresses, heartbeat=HEARTBEAT, patience=patience, **options) as executor:  # type: ignore[arg-type]
        executor._start()
        await present(executor, 2)
        yield executor, workers


async def present(executor: GrpcExecutor, workers: int) -> None:
    async with asyncio.timeout(20):
        while len(executor._present) != workers:
            await asyncio.sleep(0.01)


async def test_who_keeps_a_session_that_is_over_keeps_no_connection(start: Start) -> None:
    worker = start("--executor", "threads:1")
    async with GrpcExecutor(worker.address) as executor, executor.open(Program(MODEL.to_json())) as session:
        pass
    async with asyncio.timeout(20):
        while any("_poll_wrapper" in thread.name for thread in threading.enumerate()):  # gRPC's, while it has a stream
            gc.collect()
            await asyncio.sleep(0.02)
    with pytest.raises(at.errors.ClosedError):
        await session.broadcast({}, {}, 0)


async def test_a_worker_that_is_killed_is_done_without(start: Start) -> None:
    async with two(start) as (executor, workers):

        async def kill() -> None:
            workers[0].send(signal.SIGKILL)
            await present(executor, 1)

        bits, lost = await trained(executor, {4: kill})
    assert bits == await expected()
    assert len(lost) == 1


async def test_a_worker_that_is_frozen_is_noticed_and_comes_back_when_it_thaws(start: Start) -> None:
    async with two(start) as (executor, workers):

        async def freeze() -> None:
            workers[1].send(signal.SIGSTOP)

        bits, _ = await trained(executor, {4: freeze})
        await present(executor, 1)
        workers[1].send(signal.SIGCONT)
        await present(executor, 2)
        again, lost = await trained(executor, {})
    assert bits == again == await expected()
    assert not lost


@pytest.mark.parametrize("fault", ["drop", "half_open"])
async def test_a_connection_that_is_cut_is_noticed_and_made_again(start: Start, fault: str) -> None:
    worker = start("--executor", "threads:2")
    async with Proxy(int(worker.address.rpartition(":")[2])) as proxy:
        proxy.plan = [(fault, 60_000)]
        address = f"127.0.0.1:{proxy.port}"
        async with GrpcExecutor(address, heartbeat=HEARTBEAT) as executor:
            bits, lost = await trained(executor, {})
    assert bits == await expected()
    assert len(lost) == 1


async def test_a_worker_that_dials_in_dials_again_when_its_coordinator_is_another(start: Start, address: str) -> None:
    async with GrpcExecutor(listen=address) as first:
        await first.listening()
        start("--connect", address, "--executor", "threads:1")
        before = await trained(first, {})
    async with GrpcExecutor(listen=address) as second:
        after = await trained(second, {})
    assert before[0] == after[0] == await expected()


async def test_sigterm_lets_a_worker_finish_and_leave(start: Start) -> None:
    async with two(start) as (executor, workers):

        async def terminate() -> None:
            workers[0].send(signal.SIGTERM)
            await present(executor, 1)

        bits, lost = await trained(executor, {4: terminate})
        assert await asyncio.to_thread(workers[0].process.wait, 20) == 143
    assert bits == await expected()
    assert lost == ["it left, as it was asked to"]


async def test_a_worker_without_coordinators_ends_at_once_on_sigterm(start: Start) -> None:
    worker = start()
    began = time.monotonic()
    worker.send(signal.SIGTERM)
    assert await asyncio.to_thread(worker.process.wait, 20) == 143
    assert time.monotonic() - began < 5


async def test_homes_of_all_kinds_in_one_group_give_the_same_bits(start: Start) -> None:
    worker = start("--executor", "threads:1")
    group = at.ExecutorGroup(at.ThreadExecutor(1), at.ProcessExecutor(1), GrpcExecutor(worker.address))
    async with group as executor:
        bits, lost = await trained(executor, {})
    assert bits == await expected()
    assert not lost


async def test_a_worker_around_processes_gives_them_too(start: Start) -> None:
    worker = start("--executor", "processes:2")
    async with GrpcExecutor(worker.address) as executor:
        assert (await trained(executor, {}))[0] == await expected()


async def test_a_layer_that_is_not_registered_there_is_an_error_of_opening(start: Start) -> None:
    worker = start("--executor", "threads:1")
    own = nn.Model([nn.Flatten(), End("/nowhere"), nn.Dense(3)], (4, 4, 1))
    async with GrpcExecutor(worker.address) as executor:
        with pytest.raises(ValueError, match="layer must be one of"):
            async with executor.open(Program(own.to_json())):
                pass


async def test_a_worker_with_a_wrong_token_ends_and_tells_why_without_telling_the_token(start: Start) -> None:
    secret = "wrong-0123456789abcdef"  # noqa: S105 - of nobody
    listening = start(ASYNCTRAIN_TOKENS="worker worker-0123456789abcdef")
    async with GrpcExecutor(listening.address, join_wait=10) as executor:
        with pytest.raises(at.errors.ExecutorError, match="known token"):
            async with executor.open(Program(MODEL.to_json())):
                pass
    access = Access(tokens=Tokens(["worker worker-0123456789abcdef"]))
    async with GrpcExecutor(listen="127.0.0.1:0", access=access) as executor:
        worker = start("--connect", await executor.listening(), ASYNCTRAIN_TOKEN=secret)
        _, told = await asyncio.to_thread(worker.process.communicate, None, 20)
    assert worker.process.returncode == 1
    assert "known token" in told
    assert secret not in told
