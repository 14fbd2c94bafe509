"""The worker role: a server around any executor, for coordinators that train on other machines.

Each coordinator has a stream of its own, each of its trainings a session on the executor. Whatever the executor is
(threads, processes, a group, a Dask cluster), the coordinator sees one member of its crew with so many slots.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from asynctrain._aio import ServingGroup
from asynctrain.errors import ExecutorError
from asynctrain.executors.base import Executor
from asynctrain.executors.local import usable_cpus
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.coordinator import Coordinator, WorkerLimits
from asynctrain.rpc.link import BROKEN, PROTOCOL, SCHEMA, Link, LinkError, first_message, shaken, told
from asynctrain.rpc.wire import Access, Pauses, dialled, is_permanent, listening

GRACE = 30.0  # seconds that draining may take
HEARTBEATS = 0.05, 3600.0  # seconds: what a coordinator may ask for

_logger = logging.getLogger(__name__)


class Worker:
    """One worker, whoever its coordinators are.

    Args:
        executor: what computes; it stays the caller's to close.
        node: what the coordinators call it; by default the machine's name and the process's number.
        capacity: pieces of work that each session does at once, at most; by default one for each CPU.
        limits: of what it does.
        grace: seconds that draining may take.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        node: str | None = None,
        capacity: int | None = None,
        limits: WorkerLimits | None = None,
        grace: float = GRACE,
    ) -> None:
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.executor = executor
        self.node = node or f"{platform.node() or 'worker'}-{os.getpid()}"
        self.capacity = capacity or usable_cpus()
        self.limits = limits or WorkerLimits()
        self.grace = grace
        self.instance = uuid.uuid4().hex
        self.is_draining = asyncio.Event()
        self._coordinators: set[Coordinator] = set()
        self._changed = asyncio.Event()

    @property
    def coordinators(self) -> int:
        """How many are connected."""
        return len(self._coordinators)

    async def serve(self, stream: Any) -> str:
        """Do what the coordinator at the other end of ``stream`` asks, until that is over, and return why.

        Raises:
            LinkError: it does not keep to the protocol.
        """
        hello = pb.Hello(
            node=self.node, instance=self.instance, capacity=self.capacity, protocol=PROTOCOL, schema=SCHEMA
        )
        await shaken(stream.write(pb.FromWorker(hello=hello).SerializeToString()), "hello")
        welcome = await first_message(stream, pb.FromCoordinator, "welcome")
        heartbeat = min(max(welcome.heartbeat_ms / 1000, HEARTBEATS[0]), HEARTBEATS[1])
        link = Link(stream, pb.FromCoordinator, pb.FromWorker(heartbeat=pb.Heartbeat()), heartbeat)
        coordinator = Coordinator(link, self.executor, self.capacity, self.limits)
        self._coordinators.add(coordinator)
        try:
            if self.is_draining.is_set():
                coordinator.drain()
            return await coordinator.run()
        finally:
            self._coordinators.discard(coordinator)
            self._changed.set()

    async def drain(self) -> None:
        """Take no more work, finish what there is, and leave the coordinators, within ``grace`` seconds."""
        self.is_draining.set()
        for coordinator in self._coordinators:
            coordinator.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(self.grace):
                while self._coordinators:
                    self._changed.clear()
                    await self._changed.wait()
        for coordinator in self._coordinators:
            coordinator.link.lose("the worker has left")

    def __repr__(self) -> str:
        return f"<Worker {self.node} on {self.executor!r}, {self.coordinators} coordinators>"


@asynccontextmanager
async def listen(worker: Worker, address: str, access: Access | None = None) -> AsyncIterator[int]:
    """Let coordinators dial ``worker`` at ``HOST:PORT`` while the block lasts; yields the port. Its end drains.

    Raises:
        ValueError: other machines could connect, unencrypted, and that is not permitted.
        OSError: the port cannot be used.
    """

    async def handle(context: Any) -> None:
        if worker.coordinators >= worker.limits.streams or worker.is_draining.is_set():
            raise LinkError("the worker takes no more coordinators")
        _logger.info("a coordinator has gone: %s", await worker.serve(context))

    async with listening(address, "Serve", handle, access or Access()) as port:
        try:
            yield port
        finally:
            await worker.drain()


async def dial(worker: Worker, address: str, access: Access | None = None) -> None:
    """Serve the coordinator at ``HOST:PORT``, and whenever the connection is lost, dial again, until it is drained.

    Raises:
        ValueError: the address is another machine's, unencrypted, and that is not permitted.
        ExecutorError: the coordinator refuses the worker for good: its token, or another release.
    """
    access = access or Access()
    access.require_safe(address, dials=True)
    pauses = Pauses()
    while not worker.is_draining.is_set():
        began = asyncio.get_running_loop().time()
        try:
            async with dialled(address, "Join", access) as call:
                reason = await worker.serve(call)
        except BROKEN as error:
            if is_permanent(error):
                raise ExecutorError(address, told(error)) from error
            reason = told(error)
        if worker.is_draining.is_set():
            return
        pause = pauses.after(asyncio.get_running_loop().time() - began)
        _logger.info("no connection to %s: %s; dialling again in %.1f s", address, reason, pause)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause):
                await worker.is_draining.wait()


@asynccontextmanager
async def dialling(worker: Worker, address: str, access: Access | None = None) -> AsyncIterator[None]:
    """``dial`` while the block lasts, the end of which drains. What ``dial`` raises ends the block."""
    async with ServingGroup() as group:
        group.create_task(dial(worker, address, access), name=f"dial-{address}")
        try:
            yield
        finally:
            await worker.drain()
