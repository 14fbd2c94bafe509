"""A coordinator as its worker knows it: what it asks for, within the limits, and what is done about it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from asynctrain._aio import ServingGroup, in_thread
from asynctrain.arena import Arena, Array, Layout, aligned_empty
from asynctrain.errors import ClosedError
from asynctrain.executors.base import Executor, Session
from asynctrain.executors.crew import ELSEWHERE
from asynctrain.executors.remote import told
from asynctrain.executors.shared_memory import Places
from asynctrain.nn.model import Model
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.codec import Arrival, Cargo, Frame, are_alike, layouts_of, nbytes
from asynctrain.rpc.link import Link, LinkError
from asynctrain.types import ForwardResult, ForwardWork, GradientResult, GradientWork, Notice, Program, Speculated, Sums

PENDING = 4  # times the capacity of a session: what may be under way, as what was cancelled takes time to end
WORK = (  # the arrays that may come with a piece of work
    [["images"]],
    [["images"], ["labels"]],
    [["images"], ["weights"]],
    [["images"], ["labels"], ["weights"]],
)


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """What a worker does for its coordinators; what is beyond it is refused before anything is allocated for it.

    Attributes:
        streams: coordinators at once.
        sessions: of one coordinator, at once.
        parameter_bytes: of one model's parameters.
        activation_bytes: that one microbatch leaves for its backward pass.
        work_bytes: of one microbatch's images, labels and weights.
        pending_bytes: of all that one coordinator has sent and that is not done yet.
    """

    streams: int = 8
    sessions: int = 16
    parameter_bytes: int = 2**32
    activation_bytes: int = 2**34
    work_bytes: int = 2**28
    pending_bytes: int = 2**33


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
class _Transfer:
    """What arrives, and when that is there, the task that deals with it."""

    message: Any  # that announced it
    opened: _Opened
    arrival: Arrival
    task: asyncio.Task[None] | None = None


class Coordinator:
    """One coordinator's stream, and its sessions on the worker's executor.

    Args:
        link: to it.
        executor: what computes.
        capacity: pieces of work that each session does at once, at most.
        limits: of what is done.
    """

    def __init__(self, link: Link, executor: Executor, capacity: int, limits: WorkerLimits) -> None:
        self.link = link
        self._executor = executor
        self._capacity = capacity
        self._limits = limits
        self._sessions: dict[int, _Opened] = {}
        self._transfers: dict[int, _Transfer] = {}
        self._tasks = ServingGroup()

    async def run(self) -> str:
        """Do what it asks until that is over, and return why; raises ``RefusedError``."""
        async with self._tasks:
            return await self.link.run(self._receive)

    def drain(self) -> None:
        """Ask it to send no more work, and to tell when all it has sent is done."""
        self.link.say(pb.FromWorker(draining=pb.Draining()))

    async def _receive(self, kind: str, said: Any) -> None:
        if kind not in _DEEDS:
            raise LinkError(f"it has sent {kind}, which cannot come now")
        await _DEEDS[kind](self, said)

    async def _leave(self, _: pb.Drained) -> None:
        await self.link.flush()
        self.link.lose("the worker has left, as it was asked to")

    # Sessions

    async def _open(self, said: pb.Open) -> None:
        if len(self._sessions) >= self._limits.sessions or said.session in self._sessions:
            raise LinkError(f"it must have at most {self._limits.sessions} sessions, each of another number")
        opened = self._sessions[said.session] = _Opened(said.session, said.program)
        self._tasks.create_task(self._keep(opened), name=f"session-{said.session}")

    async def _close(self, said: pb.Close) -> None:
        if said.session in self._sessions:
            self._sessions[said.session].close.set()

    async def _keep(self, opened: _Opened) -> None:
        """Keep the session open until the coordinator closes it."""

        def hear(notice: Notice) -> None:
            if opened.session is not None and not isinstance(notice, Speculated):
                slots = min(opened.session.slots, self._capacity)
                self.link.say(pb.FromWorker(slots=pb.Slots(session=opened.number, slots=slots)))

        try:
            program = await in_thread(self._examined, opened)
            async with self._executor.open(program, hear) as session:
                opened.session = session
                slots, fingerprint = min(session.slots, self._capacity), dict(session.fingerprint)
                answer = pb.Opened(session=opened.number, slots=slots, fingerprint=fingerprint)
                self.link.say(pb.FromWorker(opened=answer))
                await opened.close.wait()
                await self._stop(opened)
        except Exception as error:
            self._tell(error, session=opened.number)
        finally:
            opened.close.set()
            del self._sessions[opened.number]
            self.link.say(pb.FromWorker(closed=pb.Closed(session=opened.number)))

    def _examined(self, opened: _Opened) -> Program:
        """Return the session's program; raises ``ValueError`` where it is none, or is too large."""
        limits = self._limits
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
        """Stop what arrives for the session, and what it computes, and wait for that."""
        tasks = []
        for number, transfer in list(self._transfers.items()):
            if transfer.opened is opened:
                self._cancel_transfer(number, transfer)
                tasks.append(transfer.task)
        if under_way := [task for task in tasks if task is not None]:
            await asyncio.wait(under_way)

    # Arrays that come

    async def _announced_parameters(self, said: pb.Parameters) -> None:
        opened = self._sessions.get(said.session)
        if opened is None or opened.close.is_set():
            return  # it is being closed; the frames find nobody either
        layouts = opened.layouts[: len(said.groups)]
        if opened.session is None or not layouts or not are_alike(layouts_of(said.groups), layouts):
            raise LinkError("parameters must have the names, shapes and dtype of the program's model")
        self._expect(said.transfer, said, opened, layouts, opened.memory)

    async def _announced_work(self, said: pb.Assign) -> None:
        opened = self._sessions.get(said.session)
        if opened is None or opened.close.is_set():
            return
        layouts = layouts_of(said.groups)
        _require_work(layouts, opened, self._limits)
        self._expect(said.work, said, opened, layouts, _fresh)

    def _expect(
        self, number: int, said: Any, opened: _Opened, layouts: Sequence[Layout], memory: Callable[[int], Array]
    ) -> None:
        if len(self._transfers) >= PENDING * (self._capacity + 1) * len(self._sessions):
            raise LinkError("it has sent more work than there are slots")
        pending = sum(len(transfer.arrival.memory) for transfer in self._transfers.values())
        if pending + nbytes(layouts) > self._limits.pending_bytes:
            raise LinkError(f"it must have at most {self._limits.pending_bytes} bytes under way")
        if number in self._transfers:
            raise LinkError(f"transfers must have different numbers, got {number} twice")
        transfer = self._transfers[number] = _Transfer(said, opened, Arrival(layouts, memory))
        if transfer.arrival.is_complete:
            self._arrived(number, transfer)

    async def _take(self, frame: Frame) -> None:
        transfer = self._transfers.get(frame.transfer)
        if transfer is None:
            return  # it was cancelled
        if transfer.task is not None:
            raise LinkError(f"frames of transfer {frame.transfer} must not come any more: it is complete")
        transfer.arrival.take(frame)
        if transfer.arrival.is_complete:
            self._arrived(frame.transfer, transfer)

    def _arrived(self, number: int, transfer: _Transfer) -> None:
        deal = self._publish(transfer) if isinstance(transfer.message, pb.Parameters) else self._compute(transfer)
        transfer.task = self._tasks.create_task(deal, name=f"transfer-{number}")
        transfer.task.add_done_callback(lambda _: self._transfers.pop(number, None))

    async def _cancel(self, said: pb.Cancel) -> None:
        transfer = self._transfers.get(said.work)
        if transfer is not None and isinstance(transfer.message, pb.Assign):
            self._cancel_transfer(said.work, transfer)

    def _cancel_transfer(self, number: int, transfer: _Transfer) -> None:
        if transfer.task is None:
            del self._transfers[number]
        else:
            transfer.task.cancel()

    # What is done

    async def _publish(self, transfer: _Transfer) -> None:
        said, opened, arenas = transfer.message, transfer.opened, transfer.arrival.arenas()
        assert opened.session is not None  # noqa: S101 - or they would not have been let in
        try:
            state: Any = arenas[1] if len(arenas) > 1 else {}
            await opened.session.broadcast(arenas[0], state, said.version)
        except Exception as error:
            if not opened.close.is_set():
                self.link.lose(f"its executor does not take the parameters: {error}")
            return
        opened.present = _Board(transfer.arrival.memory)
        opened.boards.append(opened.present)
        self.link.say(pb.FromWorker(taken=pb.Taken(session=opened.number, transfer=said.transfer)))

    async def _compute(self, transfer: _Transfer) -> None:
        said, opened, board = transfer.message, transfer.opened, transfer.opened.present
        if board is not None:
            board.readers += 1
        try:
            if opened.session is None:
                raise ClosedError(f"session {opened.number} is not open yet")
            work = _work(said, transfer.arrival.arenas())
            result: GradientResult | ForwardResult = await opened.session.compute(work, said.version)
            try:
                await self._send(said.work, result)
            finally:
                if isinstance(result, GradientResult):
                    result.release()
        except LinkError:
            pass  # nobody is there to be told
        except Exception as error:
            self._tell(error, work=said.work)
        finally:
            if board is not None:
                board.readers -= 1

    async def _send(self, work: int, result: GradientResult | ForwardResult) -> None:
        if isinstance(result, GradientResult):
            cargo = Cargo.of(result.gradients, result.statistics)
        else:
            cargo = Cargo.of_arrays({"outputs": result.outputs})
        message = pb.Result(work=work, sums=_sums_of(result.sums), groups=cargo.groups())
        self.link.say(pb.FromWorker(result=message))
        await self.link.send_frames(cargo, work)

    def _tell(self, error: Exception, **of: int) -> None:
        failed = pb.Failed(error=json.dumps(told(error)), elsewhere=isinstance(error, ELSEWHERE), **of)
        self.link.say(pb.FromWorker(failed=failed))

    def __repr__(self) -> str:
        return f"<Coordinator of {len(self._sessions)} sessions, {len(self._transfers)} transfers under way>"


_DEEDS: dict[str, Callable[[Coordinator, Any], Awaitable[None]]] = {
    "open": Coordinator._open,
    "parameters": Coordinator._announced_parameters,
    "assign": Coordinator._announced_work,
    "frame": Coordinator._take,
    "cancel": Coordinator._cancel,
    "close": Coordinator._close,
    "drained": Coordinator._leave,
}


def _fresh(size: int) -> Array:
    return aligned_empty((size,), np.uint8)


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


def _work(said: pb.Assign, arenas: Sequence[Arena]) -> GradientWork | ForwardWork:
    arrays = {name: array for arena in arenas for name, array in arena.items()}
    images, labels, weights = arrays["images"], arrays.get("labels"), arrays.get("weights")
    if said.WhichOneof("kind") == "microbatch":
        if labels is None:
            raise ValueError("labels must come with a microbatch")
        part = said.microbatch
        return GradientWork(part.step, part.number, part.of, images, labels, weights)
    return ForwardWork(images, labels, weights)


def _sums_of(sums: Sums) -> pb.Sums:
    counts = {name: float(value) for name, value in sums.counts.items()}
    return pb.Sums(loss=float(sums.loss), weight=float(sums.weight), samples=int(sums.samples), counts=counts)
