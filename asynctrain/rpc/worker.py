"""The worker role: a server around any executor, for coordinators that train on other machines.

Each coordinator has a stream of its own, each of its trainings a session on the executor. Whatever the executor is
(threads, processes, a group, a Dask cluster), the coordinator sees one member of its crew with so many slots.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asynctrain._aio import ServingGroup, in_thread, thread_pool
from asynctrain.arena import Arena, Array, Layout, aligned_empty
from asynctrain.errors import ClosedError, ExecutorError, StaleParametersError, WorkerLostError
from asynctrain.executors.base import Executor, Session
from asynctrain.executors.local import usable_cpus
from asynctrain.executors.remote import told as told_error
from asynctrain.executors.shared_memory import Places
from asynctrain.nn.model import Model
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.codec import Arrival, are_alike, frames, groups_of, layouts_of, nbytes, vector_of
from asynctrain.rpc.link import BROKEN, IN_THREAD, PROTOCOL, SCHEMA, Link, LinkError, first_message, shaken, told
from asynctrain.rpc.wire import Access, dialled, is_permanent, listening
from asynctrain.types import ForwardResult, ForwardWork, GradientResult, GradientWork, Notice, Program, Speculated, Sums

ELSEWHERE = WorkerLostError, ClosedError, StaleParametersError  # the home has failed, not the work
SHORTEST_PAUSE, LONGEST_PAUSE = 0.2, 10.0  # seconds between attempts to dial
GRACE = 30.0  # seconds that draining may take
PENDING = 4  # times the capacity of a session: what may be under way, as what was cancelled takes time to end
WORK = (  # the arrays that may come with a piece of work
    [["images"]],
    [["images"], ["labels"]],
    [["images"], ["weights"]],
    [["images"], ["labels"], ["weights"]],
)
HEARTBEATS = 0.05, 3600.0  # seconds: what a coordinator may ask for

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What a worker does for its coordinators; what is beyond it is refused before anything is allocated for it.

    Attributes:
        streams: coordinators at once.
        sessions: of one coordinator, at once.
        parameter_bytes: of one model's parameters.
        activation_bytes: that one microbatch leaves for its backward pass.
        work_bytes: of one microbatch's images, labels and weights.
    """

    streams: int = 8
    sessions: int = 16
    parameter_bytes: int = 2**32
    activation_bytes: int = 2**34
    work_bytes: int = 2**28


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
        self._served: set[_Served] = set()
        self._changed = asyncio.Event()

    @property
    def coordinators(self) -> int:
        """How many are connected."""
        return len(self._served)

    async def serve(self, stream: Any) -> str:
        """Do what the coordinator at the other end of ``stream`` asks, until that is over, and return why."""
        hello = pb.Hello(
            node=self.node, instance=self.instance, capacity=self.capacity, protocol=PROTOCOL, schema=SCHEMA
        )
        await shaken(stream.write(pb.FromWorker(hello=hello)), "hello")
        welcome = await first_message(stream, "welcome")
        heartbeat = min(max(welcome.heartbeat_ms / 1000, HEARTBEATS[0]), HEARTBEATS[1])
        served = _Served(self, Link(stream, heartbeat, pb.FromWorker(heartbeat=pb.Heartbeat())))
        self._served.add(served)
        self._changed.set()
        try:
            return await served.run()
        finally:
            self._served.discard(served)
            self._changed.set()

    async def drain(self) -> None:
        """Take no more work, finish what there is, and leave the coordinators, within ``grace`` seconds."""
        self.is_draining.set()
        for served in self._served:
            served.link.say(pb.FromWorker(draining=pb.Draining()))
        with suppress(TimeoutError):
            async with asyncio.timeout(self.grace):
                while self._served:
                    self._changed.clear()
                    await self._changed.wait()
        for served in self._served:
            served.link.lose("the worker has left")

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

    async with listening(address, "Serve", handle, pb.FromCoordinator, access or Access()) as port:
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
    pause = SHORTEST_PAUSE
    while not worker.is_draining.is_set():
        began = asyncio.get_running_loop().time()
        try:
            async with dialled(address, "Join", pb.FromCoordinator, access) as call:
                reason = await worker.serve(call)
        except BROKEN as error:
            if is_permanent(error):
                raise ExecutorError(address, told(error)) from error
            reason = told(error)
        if worker.is_draining.is_set():
            return
        lasted = asyncio.get_running_loop().time() - began
        pause = SHORTEST_PAUSE if lasted > LONGEST_PAUSE else min(2 * pause, LONGEST_PAUSE)
        _logger.info("no connection to %s: %s; dialling again in %.1f s", address, reason, pause)
        with suppress(TimeoutError):
            async with asyncio.timeout(pause * random.uniform(0.5, 1.0)):  # noqa: S311 - that not all dial at once
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


@dataclass(slots=True, eq=False)
class _Opened:
    """A coordinator's session: what is checked of it, and what it computes."""

    number: int
    text: str  # the program's
    close: asyncio.Event = field(default_factory=asyncio.Event)
    session: Session | None = None
    layouts: tuple[Layout, ...] = ()  # of the parameters, and of the model's state
    input_shape: tuple[int, ...] = ()
    activation_bytes: int = 0  # of one sample
    boards: list[_Board] = field(default_factory=list)
    present: _Board | None = None
    computing: set[asyncio.Task[None]] = field(default_factory=set)

    def memory(self, size: int) -> Array:
        """Return where parameters may arrive: what nobody reads any more, or else new memory."""
        for board in self.boards:
            if board is not self.present and not board.readers and len(board.memory) == size:
                self.boards.remove(board)
                return board.memory
        return aligned_empty((size,), np.uint8)


@dataclass(slots=True, eq=False)
class _Board:
    """The memory of one version's parameters. readers: pieces of work under way with it."""

    memory: Array
    readers: int = 0


@dataclass(slots=True, eq=False)
class _Incoming:
    """A transfer under way, and the message that announced it."""

    message: Any
    opened: _Opened
    arrival: Arrival


class _Served:
    """One coordinator's stream."""

    def __init__(self, worker: Worker, link: Link) -> None:
        self.link = link
        self._worker = worker
        self._sessions: dict[int, _Opened] = {}
        self._incoming: dict[int, _Incoming] = {}
        self._work: dict[int, asyncio.Task[None]] = {}
        self._tasks = ServingGroup()

    async def run(self) -> str:
        async with thread_pool(1, "frames") as self._threads, self._tasks:
            if self._worker.is_draining.is_set():
                self.link.say(pb.FromWorker(draining=pb.Draining()))
            await self.link.run(self._receive)
        return self.link.gone.result()

    async def _receive(self, message: pb.FromCoordinator) -> None:
        kind = message.WhichOneof("kind")
        if kind is None or kind not in _DEEDS:
            raise LinkError(f"it has sent {kind}, which cannot come now")
        await _DEEDS[kind](self, getattr(message, kind))

    async def _leave(self, _: pb.Drained) -> None:
        await self.link.flush()
        self.link.lose("the worker has left, as it was asked to")

    # Arrays that come

    async def _announced_parameters(self, message: pb.Parameters) -> None:
        opened = self._sessions.get(message.session)
        if opened is None or opened.close.is_set():
            return  # it is being closed; the frames find nobody either
        layouts = opened.layouts[: len(message.groups)]
        said = layouts_of(message.groups)
        if not said or len(said) != len(layouts) or not all(map(are_alike, said, layouts)):
            raise LinkError("parameters must have the names, shapes and dtype of the program's model")
        self._expect(message.transfer, _Incoming(message, opened, Arrival(layouts, opened.memory)))

    async def _announced_work(self, message: pb.Assign) -> None:
        opened = self._sessions.get(message.session)
        if opened is None or opened.close.is_set():
            return
        layouts = layouts_of(message.groups)
        _require_work(layouts, opened, self._worker.limits)
        self._expect(message.work, _Incoming(message, opened, Arrival(layouts)))

    def _expect(self, transfer: int, incoming: _Incoming) -> None:
        if len(self._incoming) + len(self._work) >= PENDING * (self._worker.capacity + 1) * len(self._sessions):
            raise LinkError("it has sent more work than there are slots")
        if transfer in self._incoming or transfer in self._work:
            raise LinkError(f"transfers must have different numbers, got {transfer} twice")
        self._incoming[transfer] = incoming
        if incoming.arrival.is_complete:
            self._arrived(transfer)

    async def _take(self, frame: pb.Frame) -> None:
        incoming = self._incoming.get(frame.transfer)
        if incoming is None:
            return  # what it belongs to was cancelled
        if len(frame.data) > IN_THREAD:
            await asyncio.get_running_loop().run_in_executor(self._threads, incoming.arrival.take, frame)
        else:
            incoming.arrival.take(frame)
        if incoming.arrival.is_complete and self._incoming.get(frame.transfer) is incoming:
            self._arrived(frame.transfer)

    def _arrived(self, transfer: int) -> None:
        incoming = self._incoming.pop(transfer)
        message, opened, arenas = incoming.message, incoming.opened, incoming.arrival.arenas()
        if isinstance(message, pb.Parameters):
            board = _Board(incoming.arrival.memory)
            self._tasks.create_task(self._publish(opened, message, board, arenas), name=f"parameters-{message.version}")
            return
        task = self._tasks.create_task(self._compute(opened, message, arenas), name=f"work-{message.work}")
        self._work[message.work] = task
        opened.computing.add(task)
        task.add_done_callback(lambda _: self._work.pop(message.work, None))
        task.add_done_callback(opened.computing.discard)

    # Sessions

    async def _open(self, message: pb.Open) -> None:
        if len(self._sessions) >= self._worker.limits.sessions or message.session in self._sessions:
            raise LinkError(f"it must have at most {self._worker.limits.sessions} sessions, each of another number")
        opened = self._sessions[message.session] = _Opened(message.session, message.program)
        self._tasks.create_task(self._keep(opened), name=f"session-{message.session}")

    async def _close(self, message: pb.Close) -> None:
        if message.session in self._sessions:
            self._sessions[message.session].close.set()

    async def _keep(self, opened: _Opened) -> None:
        """Keep the session open until the coordinator closes it."""

        def hear(notice: Notice) -> None:
            if opened.session is not None and not isinstance(notice, Speculated):
                slots = min(opened.session.slots, self._worker.capacity)
                self.link.say(pb.FromWorker(slots=pb.Slots(session=opened.number, slots=slots)))

        try:
            program = await in_thread(self._examined, opened)
            async with self._worker.executor.open(program, hear) as session:
                opened.session = session
                answer = pb.Opened(
                    session=opened.number,
                    slots=min(session.slots, self._worker.capacity),
                    fingerprint=dict(session.fingerprint),
                )
                self.link.say(pb.FromWorker(opened=answer))
                await opened.close.wait()
                await self._stop(opened)
        except Exception as error:
            failed = pb.Failed(session=opened.number, error=_json_of(error), elsewhere=isinstance(error, ELSEWHERE))
            self.link.say(pb.FromWorker(failed=failed))
        finally:
            opened.close.set()
            del self._sessions[opened.number]
            self.link.say(pb.FromWorker(closed=pb.Closed(session=opened.number)))

    def _examined(self, opened: _Opened) -> Program:
        """Return the session's program; raises ``ValueError`` where it is none, or is too large."""
        limits = self._worker.limits
        program = Program.from_json(json.loads(opened.text))
        model = Model.from_json(program.architecture)
        costs = model.costs(1, program.dtype)
        if costs.parameter_bytes > limits.parameter_bytes or costs.activation_bytes > limits.activation_bytes:
            raise ValueError(
                f"a model must have at most {limits.parameter_bytes} bytes of parameters and "
                f"{limits.activation_bytes} of activations on this worker, "
                f"got {costs.parameter_bytes} and {costs.activation_bytes}"
            )
        places = Places(program)
        opened.layouts = places.params, places.state
        opened.input_shape = tuple(model.input_shape)
        opened.activation_bytes = costs.activation_bytes
        return program

    async def _stop(self, opened: _Opened) -> None:
        """Stop what the session computes, and wait for that."""
        for number, incoming in list(self._incoming.items()):
            if incoming.opened is opened:
                del self._incoming[number]
        for task in opened.computing:
            task.cancel()
        if opened.computing:
            await asyncio.wait(opened.computing)

    # Work

    async def _publish(self, opened: _Opened, message: pb.Parameters, board: _Board, arenas: list[Arena]) -> None:
        if opened.session is None:
            return
        try:
            state: Any = arenas[1] if len(arenas) > 1 else {}
            await opened.session.broadcast(arenas[0], state, message.version)
        except Exception as error:
            self.link.lose(f"its executor does not take the parameters: {error}")
            return
        opened.boards.append(board)
        opened.present = board
        taken = pb.Taken(session=opened.number, transfer=message.transfer)
        self.link.say(pb.FromWorker(taken=taken))

    async def _compute(self, opened: _Opened, message: pb.Assign, arenas: list[Arena]) -> None:
        board = opened.present
        if board is not None:
            board.readers += 1
        try:
            if opened.session is None or opened.close.is_set():
                raise ClosedError(f"session {opened.number} is closed")
            work = _work(message, arenas)
            result: GradientResult | ForwardResult = await opened.session.compute(work, message.version)
            try:
                await self._send(message.work, result)
            finally:
                if isinstance(result, GradientResult):
                    result.release()
        except LinkError:
            pass  # nobody is there to be told
        except Exception as error:
            failed = pb.Failed(work=message.work, error=_json_of(error), elsewhere=isinstance(error, ELSEWHERE))
            self.link.say(pb.FromWorker(failed=failed))
        finally:
            if board is not None:
                board.readers -= 1

    async def _cancel(self, message: pb.Cancel) -> None:
        self._incoming.pop(message.work, None)
        if message.work in self._work:
            self._work[message.work].cancel()

    async def _send(self, work: int, result: GradientResult | ForwardResult) -> None:
        if isinstance(result, GradientResult):
            arenas = [result.gradients, result.statistics]
        else:
            arenas = [vector_of("outputs", result.outputs)]
        sums = _sums_of(result.sums)
        message = pb.Result(work=work, sums=sums, groups=groups_of(arenas))
        self.link.say(pb.FromWorker(result=message))
        encoded = (pb.FromWorker(frame=frame).SerializeToString() for frame in frames(work, arenas))
        await self.link.send_parcels(encoded, nbytes(arena.layout for arena in arenas), self._threads)


_DEEDS: dict[str, Callable[[_Served, Any], Awaitable[None]]] = {
    "open": _Served._open,
    "parameters": _Served._announced_parameters,
    "assign": _Served._announced_work,
    "frame": _Served._take,
    "cancel": _Served._cancel,
    "close": _Served._close,
    "drained": _Served._leave,
}


def _require_work(layouts: Sequence[Layout], opened: _Opened, limits: WorkerLimits) -> None:
    """Raise ``LinkError`` where these are not the arrays of a piece of work, or are too large."""
    if [list(layout.shapes) for layout in layouts] not in WORK:
        raise LinkError("work must have images, and may have labels and weights")
    samples, *shape = layouts[0].shapes["images"] or (0,)
    if layouts[0].dtype != np.uint8 or tuple(shape) != opened.input_shape or samples < 1:
        raise LinkError(f"images must be uint8 of shape {('n', *opened.input_shape)}, got {(samples, *shape)}")
    if nbytes(layouts) > limits.work_bytes or samples * opened.activation_bytes > limits.activation_bytes:
        raise LinkError(
            f"work must have at most {limits.work_bytes} bytes, and {limits.activation_bytes} of activations, "
            f"got {samples} samples, which have more"
        )


def _work(message: pb.Assign, arenas: Sequence[Arena]) -> GradientWork | ForwardWork:
    arrays = {name: array for arena in arenas for name, array in arena.items()}
    images, labels, weights = arrays["images"], arrays.get("labels"), arrays.get("weights")
    if message.WhichOneof("kind") == "microbatch":
        if labels is None:
            raise ValueError("labels must come with a microbatch")
        part = message.microbatch
        return GradientWork(part.step, part.number, part.of, images, labels, weights)
    return ForwardWork(images, labels, weights)


def _sums_of(sums: Sums) -> pb.Sums:
    counts = {name: float(value) for name, value in sums.counts.items()}
    return pb.Sums(loss=float(sums.loss), weight=float(sums.weight), samples=int(sums.samples), counts=counts)


def _json_of(error: Exception) -> str:
    return json.dumps(told_error(error))
