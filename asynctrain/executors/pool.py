"""A home out of any ``concurrent.futures.Executor``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import BrokenExecutor, Future
from concurrent.futures import Executor as Pool
from contextlib import asynccontextmanager
from itertools import chain
from typing import Any, Self, TypeVar, overload

import numpy as np

from asynctrain._aio import in_thread
from asynctrain.arena import Arena, Array, Layout
from asynctrain.errors import ClosedError, StaleParametersError, WorkerLostError
from asynctrain.executors import pool_worker, remote
from asynctrain.executors.base import Session, Tell, nobody
from asynctrain.executors.blas import find_blas, one_blas_thread
from asynctrain.executors.in_flight import InFlight, wait_for_end
from asynctrain.executors.local import GRACE
from asynctrain.executors.pool_worker import Failed, Foreign, Kept, Lacking, Reply, Sent, Summed
from asynctrain.executors.worker import GradientWorker, StopFlag
from asynctrain.nn.model import Model
from asynctrain.types import ForwardResult, ForwardWork, GradientResult, GradientWork, Params, Program

T = TypeVar("T")

WARM_UP = 120.0  # seconds in which a pool must have answered its first question


class _PoolSession:
    """Sends work to the pool: first the parameters' name alone, and where a worker lacks them the parameters too."""

    def __init__(self, pool: Pool, slots: int, address: str, program: Program, fingerprint: Mapping[str, str]) -> None:
        self.slots = slots
        self.fingerprint = fingerprint
        self._pool = pool
        self._address = address
        self._program = program
        self._name = os.urandom(16).hex()
        self._worker = GradientWorker(program)  # for a pool of threads
        model = Model.from_json(program.architecture)
        self._layouts = model.layout(program.dtype), model.statistics_layout
        self._in_flight = InFlight(address)
        self._version: int | None = None
        self._edition = 0  # a version may be broadcast again, with other values
        self._sent = Sent(program, {}, {}, fingerprint)
        self._workers_lack = False  # those of a pool of processes do, for every edition
        self._to_be_sent = 0
        self._closed = False

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        self._require_open()
        self._version = version
        self._edition += 1
        self._sent = Sent(self._program, dict(params), dict(model_state), self.fingerprint)
        self._to_be_sent = self.slots if self._workers_lack else 0
        kept = Kept(self._worker, self._edition, params, model_state, os.getpid(), lends=True)
        pool_worker.keep(self._name, kept)

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        self._require_open()
        self._require(version)
        stop, edition = StopFlag(), self._edition
        sent = self._sent if self._to_be_sent > 0 else None
        self._to_be_sent -= 1
        reply = await self._reply(work, edition, stop, sent)
        if isinstance(reply, Lacking):
            self._require(version)
            self._workers_lack = True
            reply = await self._reply(work, edition, stop, self._sent)
        return self._result(reply, version)

    async def _reply(self, work: GradientWork | ForwardWork, edition: int, stop: StopFlag, sent: Sent | None) -> Reply:
        try:
            future = _submitted(self._pool, self._address, pool_worker.compute, self._name, edition, work, stop, sent)
            self._in_flight.add(future, stop)
            return await self._cancelled_with(future, stop)
        except BrokenExecutor as error:
            raise WorkerLostError(self._address, f"the pool is broken: {error}") from error

    async def _cancelled_with(self, future: Future[Reply], stop: StopFlag) -> Reply:
        try:
            return await self._in_flight.result(future, stop)
        except asyncio.CancelledError:
            future.cancel()  # where it has not begun; a pool cannot interrupt what has
            raise

    def _result(self, reply: Reply, version: int) -> GradientResult | ForwardResult:
        match reply:
            case Foreign(error):
                raise error
            case Failed(telling):
                raise remote.rebuilt(telling, self._address)
            case Lacking():
                raise StaleParametersError(self._address, self._version, version)
            case Summed():
                gradients, statistics = self._layouts
                return GradientResult(
                    _arena(gradients, reply.gradients), reply.sums, _arena(statistics, reply.statistics)
                )
        return reply

    @property
    def under_way(self) -> list[Future[Any]]:
        """What the pool has not ended."""
        return self._in_flight.futures

    def stop(self) -> None:
        """Refuse further work, and stop what is under way, as far as the pool can."""
        self._closed = True
        self._in_flight.stop()

    def forget(self) -> None:
        """Let go of the memory of a closed session."""
        pool_worker.forget(self._name)
        self._worker.forget_arrays()
        self._sent = Sent(self._program, {}, {}, self.fingerprint)

    def _require(self, version: int) -> None:
        if version != self._version:
            raise StaleParametersError(self._address, self._version, version)

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the session on {self._address} is closed")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self._address}, version {self._version}>"


def _arena(layout: Layout, vector: Array) -> Arena:
    """Return a vector that was received as an arena, over aligned memory."""
    arena = layout.empty()
    np.copyto(arena.vector, vector)
    return arena


def _submitted(pool: Pool, address: str, function: Callable[..., T], *args: Any) -> Future[T]:
    try:
        return pool.submit(function, *args)
    except BrokenExecutor:
        raise
    except RuntimeError as error:
        raise ClosedError(f"the pool of {address} is shut down") from error


class PoolExecutor:
    """Computes on any ``concurrent.futures.Executor``: an adapter, not one of those itself.

    The pool stays the caller's to shut down. What is sent are module-level functions and plain values, so whatever
    pickles those will do; custom layers must be registered where the workers import them. A running microbatch cannot
    be interrupted in another process, so cancelling waits for it when the session is closed.

        >>> with concurrent.futures.ProcessPoolExecutor(4) as pool:
        ...     trainer = at.Trainer(model, optimizer=optimizer, executor=at.PoolExecutor(pool, slots=4))

    Args:
        pool: for example a ``ThreadPoolExecutor`` or a ``ProcessPoolExecutor``.
        slots: how many microbatches it computes at once, at least 1: its number of workers.
    """

    def __init__(self, pool: Pool, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self._pool = pool
        self._slots = slots
        self._address = f"{type(pool).__name__}:{slots}"
        self._sessions: set[_PoolSession] = set()
        self._closed = False

    @asynccontextmanager
    async def open(self, program: Program, tell: Tell = nobody) -> AsyncIterator[Session]:
        """Open a session for ``program``; leaving it waits for what is still computed.

        Raises:
            WorkerLostError: the pool does not answer, or is broken.
            ClosedError: the executor is closed, or the pool shut down.
        """
        if self._closed:
            raise ClosedError(f"the executor {self._address} is closed")
        with one_blas_thread(await in_thread(find_blas)):
            fingerprint = await self._introduction(program.kernels)
            session = await in_thread(_PoolSession, self._pool, self._slots, self._address, program, fingerprint)
            self._sessions.add(session)
            try:
                yield session
            finally:
                self._sessions.discard(session)
                session.stop()
                await wait_for_end(self._address, lambda: session.under_way, GRACE)
                session.forget()

    async def _introduction(self, kernels: str) -> dict[str, str]:
        try:
            future = _submitted(self._pool, self._address, pool_worker.introduce, kernels)
            async with asyncio.timeout(WARM_UP):
                return await asyncio.wrap_future(future)
        except TimeoutError as error:
            raise WorkerLostError(self._address, f"the pool did not answer within {WARM_UP:g} s") from error
        except BrokenExecutor as error:
            raise WorkerLostError(self._address, f"the pool is broken: {error}") from error

    async def aclose(self, grace: float = GRACE) -> None:
        """Refuse further sessions and stop the work of those that are open, within ``grace`` seconds.

        Raises:
            ExecutorError: a microbatch goes on in the pool.
        """
        self._closed = True
        sessions = list(self._sessions)
        for session in sessions:
            session.stop()
        await wait_for_end(self._address, lambda: chain.from_iterable(s.under_way for s in sessions), grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._sessions)} sessions"
        return f"<{type(self).__name__} {self._address}, {state}>"
