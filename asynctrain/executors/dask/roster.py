"""Who is there to compute: the workers of a Dask cluster as they come, are asked who they are, fall silent, and go."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from asynctrain._aio import ServingGroup
from asynctrain.errors import ExecutorError, FingerprintError, WorkerLostError
from asynctrain.executors.base import Tell
from asynctrain.executors.dask import worker as remote_side
from asynctrain.executors.dask.link import GONE, SCHEDULER, Link
from asynctrain.executors.dask.worker import Introduction
from asynctrain.executors.fingerprint import require_same
from asynctrain.types import WorkerJoined, WorkerLost

ANSWER = 1.0  # seconds, at most, in which a worker that lives answers a ping
PREPARATION = 120.0  # seconds in which a worker must have imported and compiled what a program needs


@dataclass(eq=False, slots=True)
class Worker:
    """One that computes for the session.

    Attributes:
        address: by which Dask knows it.
        slots: how many microbatches it computes at once.
        doubted: it did not answer in time; while there are others it gets no work, until it is heard of again.
    """

    address: str
    slots: int
    doubted: bool = False


class Roster:
    """The workers that take part.

    Args:
        link: to the cluster.
        program: as the text that ``Introduction`` asks for.
        tell: hears of workers that come and go.
        joined: called with each worker that takes part from now on.
        tasks: what the roster does by itself.
    """

    def __init__(
        self, link: Link, program: str, tell: Tell, joined: Callable[[Worker], None], tasks: ServingGroup
    ) -> None:
        self.workers: dict[str, Worker] = {}
        self.fingerprint: Mapping[str, str] = {}
        self._link = link
        self._program = program
        self._tell = tell
        self._joined = joined
        self._tasks = tasks
        self._expected: set[str] = set()  # that are asked who they are
        self._refused: dict[str, Exception] = {}

    async def begin(self) -> None:
        """Learn which workers there are, and hear of all changes from now on."""
        link = self._link
        link.client.subscribe_topic("all", self._hear)
        try:
            addresses = await link.asked(link.client.nthreads(), SCHEDULER)
        except GONE as error:
            raise WorkerLostError(link.address, f"the Dask scheduler does not answer: {error}") from error
        for address in addresses:
            self._meet(address)
        await link.until(lambda: bool(self._refused or self.workers) and not self._expected, link.worker_wait)
        if self._expected and not self.workers:  # they are there, and compile
            await link.until(lambda: bool(self.workers) or not self._expected, PREPARATION)
        for refusal in self._refused.values():
            raise refusal
        if not self.workers:
            raise self._nobody()

    # Who comes and goes

    def _hear(self, event: tuple[float, Any]) -> None:
        """Take what the scheduler tells of its workers; called by Dask on the loop."""
        _, told = event
        if self._link.closed or not isinstance(told, Mapping):
            return
        if told.get("action") == "add-worker":
            self._meet(told["worker"])
        elif told.get("action") == "remove-worker":
            self._part(told["worker"], "Dask took it away" if told.get("expected") else "its connection broke")

    def _meet(self, address: str) -> None:
        if address not in self.workers.keys() | self._refused.keys() | self._expected:
            self._expected.add(address)
            self._tasks.create_task(self._introduced(address), name=f"introduction of {address}")

    def _part(self, address: str, reason: str) -> None:
        self._expected.discard(address)
        self._refused.pop(address, None)
        if self.workers.pop(address, None) is not None:
            self._tell(WorkerLost(address, reason))
        self._link.notify()

    async def _introduced(self, address: str) -> None:
        """Let the worker take part, if it gives the same bits as the others."""
        introduce = remote_side.introduce, self._link.session, self._program
        try:
            introduction: Introduction = await self._link.run_at(address, PREPARATION, *introduce)
            if address not in self._expected:  # it has gone meanwhile
                return
            require_same(self.fingerprint or introduction.fingerprint, introduction.fingerprint)
        except GONE:
            self._expected.discard(address)
        except (FingerprintError, ExecutorError) as error:
            self.refuse(address, error)
        else:
            self._welcome(address, introduction)
        self._link.notify()

    def _welcome(self, address: str, introduction: Introduction) -> None:
        self._expected.discard(address)
        self.fingerprint = introduction.fingerprint
        self.workers[address] = worker = Worker(address, introduction.slots)
        self._tell(WorkerJoined(address, worker.slots))
        self._joined(worker)

    def refuse(self, address: str, error: Exception) -> None:
        """Let the worker have no part, or no longer."""
        self._expected.discard(address)
        self.workers.pop(address, None)
        if address not in self._refused:
            self._refused[address] = error
            self._tell(WorkerLost(address, f"refused: {error}"))
        self._link.notify()

    # Who may be given work

    def usable(self) -> list[Worker]:
        """Return the workers that are not in doubt, or all where all are."""
        trusted = [worker for worker in self.workers.values() if not worker.doubted]
        return trusted or list(self.workers.values())

    def permitted(self, avoided: Collection[str]) -> list[str] | None:
        """Return who may compute, those ``avoided`` left out; None where Dask may choose among all it has."""
        usable = [worker.address for worker in self.usable() if worker.address not in avoided]
        everyone = not self._refused and not self._expected and len(usable) == len(self.workers)
        return None if everyone else usable

    async def somebody(self) -> None:
        """Wait until there is a worker; ``WorkerLostError`` where none comes within ``worker_wait``."""
        link = self._link
        if not await link.until(lambda: link.closed or bool(self.workers), link.worker_wait):
            raise self._nobody()
        link.require_open()

    def _nobody(self) -> WorkerLostError:
        return WorkerLostError(self._link.address, f"there was no worker for {self._link.worker_wait:g} s")

    # Who is in doubt

    def trust(self, address: str) -> None:
        """Take note of a sign of life."""
        if address in self.workers:
            self.workers[address].doubted = False
        else:
            self._meet(address)

    def doubt(self, worker: Worker) -> None:
        """Take note that there was none in time."""
        worker.doubted = True
        self._link.notify()

    async def examine(self, addresses: Set[str], seconds: float) -> bool:
        """Ask for a sign of life, and doubt those that give none in time; return whether there are new ones."""
        asked = [self.workers[address] for address in addresses if address in self.workers]
        async with asyncio.TaskGroup() as tasks:
            pings = [
                tasks.create_task(self._is_silent(worker, min(ANSWER, seconds)), name=f"ping of {worker.address}")
                for worker in asked
                if not worker.doubted
            ]
        return any(ping.result() for ping in pings)

    async def _is_silent(self, worker: Worker, seconds: float) -> bool:
        try:
            await self._link.run_at(worker.address, seconds, remote_side.ping)
        except GONE:
            found_before = worker.doubted  # by another piece of work that asked too
            self.doubt(worker)
            return not found_before
        return False

    # The end

    async def leave(self, grace: float) -> None:
        """Stop what the workers compute for the session and wait for that, at most ``grace`` seconds."""
        async with asyncio.TaskGroup() as tasks:
            for worker in self.workers.values():
                if not worker.doubted:
                    tasks.create_task(self._left(worker.address, grace), name=f"leave-taking of {worker.address}")

    async def _left(self, address: str, grace: float) -> None:
        with suppress(*GONE, ExecutorError):
            await self._link.run_at(address, grace, remote_side.leave, self._link.session, self._program, grace)
