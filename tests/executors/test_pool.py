"""What is particular to pools of ``concurrent.futures``: what travels, and pools that break."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Executor as Pool
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AsyncExitStack
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np
import pytest

from asynctrain import nn
from asynctrain.errors import ClosedError, FingerprintError, WorkerLostError
from asynctrain.executors import InlineExecutor, PoolExecutor, pool_worker
from asynctrain.executors.fingerprint import numeric_fingerprint
from asynctrain.executors.pool_worker import Kept, Lacking, Sent
from asynctrain.executors.worker import StopFlag
from asynctrain.types import GradientWork, Program

T = TypeVar("T")

MODEL = nn.Model([nn.Flatten(), nn.Dense(3)], (2, 2, 1))
PROGRAM = Program(MODEL.to_json())
PARAMS = MODEL.init(0)
WORK = [GradientWork(0, i, 4, np.full((2, 2, 2, 1), i, np.uint8), np.array([0, 1])) for i in range(4)]


class Elsewhere(Pool):
    """A pool of one worker with a memory of its own: arguments and results are pickled, as for another process."""

    def __init__(self) -> None:
        self.memory: OrderedDict[str, Kept] = OrderedDict()
        self.sent: list[Sent | None] = []

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        arguments = pickle.loads(pickle.dumps(args))  # noqa: S301 - our own
        if fn is pool_worker.compute:
            self.sent.append(arguments[-1])
        future.set_result(pickle.loads(pickle.dumps(self.there(fn, *arguments))))  # noqa: S301 - our own
        return future

    def there(self, function: Callable[..., T], *args: Any) -> T:
        here, pool_worker._kept = pool_worker._kept, self.memory
        try:
            return function(*args)
        finally:
            pool_worker._kept = here


@pytest.fixture
def blas_is_free() -> Iterator[None]:
    """Let go of the guard that the worker's side takes, here, for the life of its process."""
    yield
    if pool_worker._hold_blas.cache_info().currsize:
        pool_worker._hold_blas().close()
        pool_worker._hold_blas.cache_clear()


async def test_parameters_travel_once_for_each_version_and_the_pixels_seldom_twice(blas_is_free: None) -> None:
    pool = Elsewhere()
    async with PoolExecutor(pool, slots=1) as executor, executor.open(PROGRAM) as session:
        for version in range(2):
            await session.broadcast(PARAMS, {}, version)
            for work in WORK:
                await session.compute(work, version)
    with_parameters = [sent is not None for sent in pool.sent]
    assert with_parameters == [False, True, False, False, False, True, False, False, False], (
        "the first worker is asked whether it has them; that it has not is then known for each version"
    )


async def test_a_broadcast_of_the_same_version_with_other_values_is_not_mistaken(blas_is_free: None) -> None:
    async with PoolExecutor(Elsewhere(), slots=1) as executor, executor.open(PROGRAM) as session:
        results = []
        for params in (PARAMS, MODEL.init(7), PARAMS):
            await session.broadcast(params, {}, 0)
            results.append((await session.compute(WORK[1], 0)).gradients.vector.tobytes())
    assert results[0] == results[2] != results[1]


async def test_a_worker_with_another_fingerprint_is_refused(
    blas_is_free: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprints = [numeric_fingerprint(), {**numeric_fingerprint(), "machine": "pdp11"}]
    monkeypatch.setattr(pool_worker, "numeric_fingerprint", lambda kernels: fingerprints.pop(0))
    async with PoolExecutor(Elsewhere(), slots=1) as executor, executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        with pytest.raises(FingerprintError, match="and 'pdp11' there"):
            await session.compute(WORK[0], 0)


def test_a_worker_keeps_the_parameters_of_some_sessions_and_forgets_the_oldest(blas_is_free: None) -> None:
    sent = Sent(PROGRAM, dict(PARAMS), {}, numeric_fingerprint())
    before = pool_worker._kept.copy()
    try:
        for number in range(pool_worker.KEPT + 1):
            pool_worker.compute(f"session {number}", 1, WORK[0], StopFlag(), sent)
        replies = [pool_worker.compute(f"session {number}", 1, WORK[0], StopFlag()) for number in (0, 1)]
    finally:
        pool_worker._kept.clear()
        pool_worker._kept.update(before)
    assert isinstance(replies[0], Lacking)
    assert not isinstance(replies[1], Lacking)


def test_what_a_fork_inherits_is_not_taken_for_its_own(blas_is_free: None) -> None:
    kept = Kept(None, 1, PARAMS, {}, os.getpid() + 1, lends=True)  # type: ignore[arg-type]
    pool_worker.keep("a session", kept)
    try:
        assert isinstance(pool_worker.compute("a session", 1, WORK[0], StopFlag()), Lacking)
    finally:
        pool_worker.forget("a session")


async def test_nothing_is_kept_for_a_session_that_was_left() -> None:
    with ThreadPoolExecutor(1) as pool:
        async with PoolExecutor(pool, slots=1) as executor, executor.open(PROGRAM) as session:
            await session.broadcast(PARAMS, {}, 0)
            assert len(pool_worker._kept) == 1
            await session.compute(WORK[0], 0)
    assert not pool_worker._kept


async def test_a_pool_whose_workers_die_is_lost() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        async with PoolExecutor(pool, slots=1) as executor, executor.open(PROGRAM) as session:
            await session.broadcast(PARAMS, {}, 0)
            await session.compute(WORK[0], 0)
            with pytest.raises(Exception, match="terminated abruptly"):
                await asyncio.wrap_future(pool.submit(os._exit, 1))
            with pytest.raises(WorkerLostError, match="ProcessPoolExecutor:1: the pool is broken"):
                await session.compute(WORK[0], 0)


async def test_a_pool_that_was_shut_down_is_closed() -> None:
    pool = ThreadPoolExecutor(1)
    async with PoolExecutor(pool, slots=1) as executor:
        async with executor.open(PROGRAM) as session:
            await session.broadcast(PARAMS, {}, 0)
            pool.shutdown()
            with pytest.raises(ClosedError, match="the pool of ThreadPoolExecutor:1 is shut down"):
                await session.compute(WORK[0], 0)
        with pytest.raises(ClosedError):
            await AsyncExitStack().enter_async_context(executor.open(PROGRAM))


async def test_the_pool_stays_its_owners() -> None:
    with ThreadPoolExecutor(1) as pool:
        async with PoolExecutor(pool, slots=1) as executor, executor.open(PROGRAM):
            pass
        assert pool.submit(len, "pool").result() == 4


async def test_in_a_pool_of_threads_nothing_is_copied() -> None:
    with ThreadPoolExecutor(1) as pool:
        async with (
            PoolExecutor(pool, slots=1) as executor,
            executor.open(PROGRAM) as session,
            InlineExecutor() as inline,
            inline.open(PROGRAM) as reference,
        ):
            await session.broadcast(PARAMS, {}, 0)
            await reference.broadcast(PARAMS, {}, 0)
            first = await session.compute(WORK[0], 0)
            address = first.gradients.vector.ctypes.data
            first.release()
            second = await session.compute(WORK[1], 0)
            assert second.gradients.vector.ctypes.data == address, "what was released is used again"
            expected = await reference.compute(WORK[1], 0)
            assert second.gradients.vector.tobytes() == expected.gradients.vector.tobytes()


def test_a_pool_without_slots_is_refused() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        PoolExecutor(pool, slots=0)
