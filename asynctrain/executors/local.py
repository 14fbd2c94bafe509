"""Homes inside this process: the caller's own thread, and a pool of threads."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self, TypeVar, overload

from asynctrain._aio import Threads, in_thread
from asynctrain.errors import ClosedError, StaleParametersError
from asynctrain.executors.base import Session, Tell, nobody
from asynctrain.executors.blas import find_blas, one_blas_thread
from asynctrain.executors.fingerprint import numeric_fingerprint
from asynctrain.executors.in_flight import InFlight, wait_for_end
from asynctrain.executors.worker import GradientWorker, Job, StopFlag
from asynctrain.types import ForwardResult, ForwardWork, GradientResult, GradientWork, Params, Program, SharedThreads

T = TypeVar("T")
Split = Literal["auto", "microbatches", "layers"]

GRACE = 10.0  # seconds that a kernel has to end once it is asked to


@dataclass(frozen=True, slots=True)
class _Ready:
    """A worker that is ready for work, and the fingerprint of what it computes with."""

    worker: GradientWorker
    fingerprint: Mapping[str, str]


class _LocalSession(ABC):
    """Holds one program's worker and the parameters of one version, by reference."""

    slots: int

    def __init__(self, address: str, ready: _Ready) -> None:
        self.fingerprint = ready.fingerprint
        self._address = address
        self._worker = ready.worker
        self._params: Params = {}
        self._model_state: Params = {}
        self._version: int | None = None
        self._closed = False

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        self._require_open()
        self._params = params
        self._model_state = model_state
        self._version = version

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        self._require_open()
        if version != self._version:
            raise StaleParametersError(self._address, self._version, version)
        if isinstance(work, ForwardWork):
            return await self._forward(work)
        return await self._gradients(work)

    def stop(self) -> None:
        """Refuse further work, and stop what is under way."""
        self._closed = True

    async def aclose(self, grace: float) -> None:
        """Stop what is under way and wait for it, at most ``grace`` seconds."""
        self.stop()

    def forget(self) -> None:
        """Let go of the memory of a closed session, to which others may still refer."""
        self._worker.forget_arrays()
        self._params = self._model_state = {}

    @abstractmethod
    async def _forward(self, work: ForwardWork) -> ForwardResult: ...

    @abstractmethod
    async def _gradients(self, work: GradientWork) -> GradientResult: ...

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the session on {self._address} is closed")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self._address}, version {self._version}>"


class _InlineSession(_LocalSession):
    slots = 1

    async def _forward(self, work: ForwardWork) -> ForwardResult:
        await asyncio.sleep(0)
        return self._worker.forward(self._params, self._model_state, work, StopFlag())

    async def _gradients(self, work: GradientWork) -> GradientResult:
        await asyncio.sleep(0)
        return self._worker.gradients(self._params, work, StopFlag())


class _LocalExecutor(ABC):
    """Opens sessions under the BLAS guard and closes those that are left."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._sessions: set[_LocalSession] = set()
        self._closed = False

    @asynccontextmanager
    async def open(self, program: Program, tell: Tell = nobody) -> AsyncIterator[Session]:
        """Open a session for ``program``; leaving it stops its work and waits for the kernels under way."""
        if self._closed:
            raise ClosedError(f"the executor {self._address} is closed")
        with one_blas_thread(await in_thread(find_blas)):
            session = self._session(await in_thread(_make_ready, program))
            self._sessions.add(session)
            try:
                yield session
            finally:
                self._sessions.discard(session)
                await session.aclose(GRACE)
                session.forget()

    @abstractmethod
    def _session(self, ready: _Ready) -> _LocalSession: ...

    async def aclose(self, grace: float = GRACE) -> None:
        """Refuse further sessions and stop the work of those that are open, within ``grace`` seconds."""
        self._closed = True
        for session in self._sessions:
            session.stop()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._sessions)} sessions"
        return f"<{type(self).__name__} {self._address}, {state}>"


def _make_ready(program: Program) -> _Ready:
    """Return a worker whose first microbatch finds everything imported and compiled; this may take seconds."""
    worker = GradientWorker(program)
    worker.warm_up()
    return _Ready(worker, numeric_fingerprint(program.kernels))


class InlineExecutor(_LocalExecutor):
    """Computes in the caller's own thread, for tests and debugging; not a ``concurrent.futures.Executor``.

    It BLOCKS THE EVENT LOOP while a microbatch is computed, and lets the loop run (and be cancelled) between two.
    """

    def __init__(self) -> None:
        super().__init__("inline")

    def _session(self, ready: _Ready) -> _InlineSession:
        return _InlineSession(self._address, ready)


class _ThreadSession(_LocalSession):
    """Sends work to the executor's threads and knows what is in flight there."""

    def __init__(self, address: str, ready: _Ready, threads: Threads, split: Split) -> None:
        super().__init__(address, ready)
        self.slots = threads.workers
        self._threads = threads
        self._split = split
        self._in_flight = InFlight(address)

    async def _forward(self, work: ForwardWork) -> ForwardResult:
        stop = StopFlag()
        compute = partial(self._worker.forward, self._params, self._model_state, work, stop)
        return await self._in_flight.result(self._submit(stop, compute), stop)

    async def _gradients(self, work: GradientWork) -> GradientResult:
        stop = StopFlag()
        if self._splits_layers(work):
            return await self._gradients_by_layer(work, stop)
        compute = partial(self._worker.gradients, self._params, work, stop)
        return await self._in_flight.result(self._submit(stop, compute), stop)

    async def _gradients_by_layer(self, work: GradientWork, stop: StopFlag) -> GradientResult:
        """Let one thread go down the chain of input gradients while others take the weight gradients it frees."""
        jobs: list[Future[None]] = []

        def emit(job: Job) -> None:  # called by the chain's thread
            jobs.append(self._submit(stop, job))

        chain = self._submit(stop, partial(self._worker.gradients, self._params, work, stop, emit))
        try:
            result = await self._in_flight.result(chain, stop)
            await asyncio.gather(*(self._in_flight.result(job, stop) for job in jobs))
        except BaseException:
            stop.set()  # one layer failed: the others need not go on
            raise
        return result

    def _splits_layers(self, work: GradientWork) -> bool:
        return self._split == "layers" or (self._split == "auto" and work.of < self.slots)

    def _submit(self, stop: StopFlag, function: Callable[[], T]) -> Future[T]:
        future = self._threads.submit(function)
        self._in_flight.add(future, stop)
        return future

    def stop(self) -> None:
        super().stop()
        self._in_flight.stop()

    async def aclose(self, grace: float) -> None:
        await super().aclose(grace)
        await wait_for_end(self._address, lambda: self._in_flight.futures, grace)


class ThreadExecutor(_LocalExecutor):
    """Computes on threads of this process; not a ``concurrent.futures.Executor``.

    numpy lets go of the interpreter inside its kernels, so threads compute side by side and the loop stays responsive.

    Args:
        workers: how many threads; by default one for each CPU that this process may use.
        split: what is computed side by side. ``"microbatches"``: each job is one microbatch. ``"layers"``: the weight
            gradient of each layer is a job of its own, collected with ``asyncio.gather``, which runs while the chain of
            input gradients goes on. ``"auto"``: layers where a step has fewer microbatches than there are threads. The
            bits are the same.

    Cancelling the task that awaits a computation stops it before the next layer's kernel. The images of a run are
    decoded on the same threads, unless its loader was given a number of threads of its own.
    """

    def __init__(self, workers: int | None = None, *, split: Split = "auto") -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if split not in ("auto", "microbatches", "layers"):
            raise ValueError(f"split must be 'auto', 'microbatches' or 'layers', got {split!r}")
        self._split: Split = split
        workers = workers or usable_cpus()
        super().__init__(f"threads:{workers}")
        self._threads = Threads(workers, "kernel", owner=f"the executor {self._address}")

    def _session(self, ready: _Ready) -> _ThreadSession:
        return _ThreadSession(self._address, ready, self._threads, self._split)

    @property
    def shared_threads(self) -> SharedThreads:
        """The threads, for what belongs to the same training: a run decodes its images on them."""
        return self._threads

    async def aclose(self, grace: float = GRACE) -> None:
        """Stop all work and end the threads; may be called again.

        What others have handed to the threads, such as a chunk of images, is done to its end. Raises ``ExecutorError``
        where that, or a kernel, does not end within ``grace`` seconds; a thread cannot be killed.
        """
        self._threads.shutdown(wait=False)
        await super().aclose(grace)
        await wait_for_end(self._address, lambda: self._threads.under_way, grace)
        await in_thread(self._threads.shutdown)  # idle by now, they end at once


def usable_cpus() -> int:
    """Return how many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
