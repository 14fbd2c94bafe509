"""A session's way to a Dask cluster: every question has a deadline, and who waits for a change hears of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import CancelledError as Withdrawn
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import Any, TypeVar
from uuid import uuid4

from distributed import Client
from distributed.scheduler import KilledWorker

from asynctrain.errors import ClosedError, ExecutorError, WorkerLostError
from asynctrain.executors.local import GRACE

T = TypeVar("T")

GONE = (OSError,)  # what a connection raises, broken or silent for too long
SCHEDULER = 10.0  # seconds in which the scheduler answers what it knows without a worker
LOST = (Withdrawn, KilledWorker, OSError)  # what Dask raises for work that may be attempted again


@asynccontextmanager
async def connected(client: Client) -> AsyncIterator[Client]:
    """Own ``client``, which has yet to connect. Dask's own ``async with`` leaves it there if that is cancelled."""
    try:
        yield await client
    finally:
        await client.close(GRACE)


class Link:
    """What all parts of one session have in common.

    Attributes:
        address: of the executor, for messages.
        client: of the session alone, so that all that it holds at the scheduler goes with it.
        worker_wait: seconds that work waits while there is no worker.
        session: its name at the workers.
        closed: nothing is asked for any longer.
    """

    def __init__(self, address: str, client: Client, worker_wait: float) -> None:
        self.address = address
        self.client = client
        self.worker_wait = worker_wait
        self.session = f"asynctrain-{uuid4().hex[:12]}"
        self.closed = False
        self._numbers = count()
        self._changed = asyncio.Event()

    def new_key(self) -> str:
        """Return a name for something new at the scheduler."""
        return f"{self.session}-{next(self._numbers)}"

    @property
    def is_up(self) -> bool:
        """Whether the scheduler is there."""
        return bool(self.client.status == "running")

    @property
    def scheduler(self) -> Any:
        """Dask's, for questions to it; ``WorkerLostError`` where it is gone."""
        self.require_connection()
        return self.client.scheduler

    def require_connection(self) -> None:
        """Raise ``WorkerLostError`` where the scheduler is gone."""
        if not self.is_up:
            raise WorkerLostError(self.address, "the connection to Dask's scheduler broke")

    def require_open(self) -> None:
        """Raise ``ClosedError`` where the session is closed."""
        if self.closed:
            raise ClosedError(f"the session on {self.address} is closed")

    def close(self) -> None:
        """Let nothing be asked for any longer, and nobody wait."""
        self.closed = True
        self.notify()

    def notify(self) -> None:
        """Have those who wait look again."""
        self._changed.set()

    async def until(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``holds()``, at most so many seconds; return whether it does."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not holds():
                    self._changed.clear()
                    await self._changed.wait()
        return holds()

    async def asked(self, answer: Awaitable[T], seconds: float) -> T:
        """Return what Dask answers, within so many seconds."""
        async with asyncio.timeout(seconds):
            return await answer

    async def settle(self, seconds: float) -> None:
        """Have what was released said: Dask says it some turns of the loop later, and complains once it has left."""
        with suppress(*GONE):
            await self.asked(self.client.nthreads(), seconds)

    async def run_at(self, address: str, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``, run on the loop of the worker at ``address``."""
        answers = await self.asked(self.client.run(function, *args, workers=[address], on_error="return"), seconds)
        answer = answers[address]
        if isinstance(answer, OSError):
            raise answer
        if isinstance(answer, Exception):
            raise ExecutorError(address, f"cannot compute this program: {answer!r}") from answer
        return answer
