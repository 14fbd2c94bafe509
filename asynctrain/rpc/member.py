"""A worker as its coordinator knows it: what it is sent, and what is done with what it says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import numpy as np

from asynctrain._aio import ServingGroup
from asynctrain.arena import Layout
from asynctrain.errors import ExecutorError, StaleParametersError, WorkerLostError
from asynctrain.executors.remote import rebuilt
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.codec import Arrival, Cargo, Frame, are_alike, layouts_of
from asynctrain.rpc.link import Link, LinkError
from asynctrain.rpc.session import GrpcSession, Parcel
from asynctrain.types import ForwardResult, ForwardWork, GradientResult, GradientWork, Params, Sums

OPENING = 60.0  # seconds that a worker has to open a session: its executor may have processes to start
MOST_SLOTS = 4096  # of one session on one worker


class _Answer(asyncio.Future[GradientResult | ForwardResult]):
    """What a worker will answer. Cancelling it tells the worker in that very call."""

    def __init__(self, member: Member, work: GradientWork | ForwardWork, cancel: Callable[[], None]) -> None:
        super().__init__()
        self._member = member
        self._work = work
        self._cancel_there = cancel
        self._said: pb.Sums | None = None
        self._arrival: Arrival | None = None

    def cancel(self, msg: Any | None = None) -> bool:
        if not self.done():
            self._cancel_there()
        return super().cancel(msg)

    def begin(self, said: pb.Result) -> Arrival:
        """Return where the result arrives; raises ``LinkError`` where it is not what the work makes."""
        expected = self._member.expected(self._work)
        if self._arrival is not None:
            raise LinkError("it has sent a result twice")
        if said.sums.samples > len(self._work.images) or not are_alike(layouts_of(said.groups), expected):
            raise LinkError("it has sent a result that is not of its work and of the program's model")
        self._said = said.sums
        gradients = isinstance(self._work, GradientWork)
        self._arrival = Arrival(expected, self._member.memory) if gradients else Arrival(expected)
        return self._arrival

    def complete(self) -> None:
        """All of the result has arrived."""
        if self.done():
            return
        assert self._arrival is not None  # noqa: S101 - it has begun
        assert self._said is not None  # noqa: S101
        sums = Sums(self._said.loss, self._said.weight, self._said.samples, dict(self._said.counts))
        arenas = self._arrival.arenas()
        if isinstance(self._work, GradientWork):
            give_back = partial(self._member.give_back, self._arrival.memory)
            self.set_result(GradientResult(arenas[0], sums, arenas[1], give_back))
        else:
            self.set_result(ForwardResult(arenas[0]["outputs"], sums))


class ConnectedWorker:
    """A worker that is connected.

    Args:
        address: what it is called.
        instance: of its process.
        link: to it.
    """

    def __init__(self, address: str, instance: str, link: Link) -> None:
        self.address = address
        self.instance = instance
        self.link = link
        self.members: dict[int, Member] = {}  # by the numbers of their sessions
        self.is_leaving = False
        self._answers: dict[int, _Answer] = {}  # by the numbers of their work
        self._arrivals: dict[int, Arrival] = {}
        self._tasks = ServingGroup()

    async def run(self) -> str:
        """Serve its stream until that is over, and return why; raises ``RefusedError``."""
        try:
            async with self._tasks:
                return await self.link.run(self._receive)
        finally:
            error = WorkerLostError(self.address, self.link.gone.result())
            for answer in self._answers.values():
                _fail(answer, error)
            for member in list(self.members.values()):
                member.fail(error)

    def expect(self, work: int, answer: _Answer) -> None:
        """Let the result of ``work`` go to ``answer``."""
        self._answers[work] = answer

    def forget(self, work: int) -> None:
        """Drop what still comes of ``work``."""
        del self._answers[work]
        self._arrivals.pop(work, None)

    async def send(self, message: pb.FromCoordinator | bytes) -> None:
        """Send a message; raises ``WorkerLostError``."""
        try:
            await self.link.send(message)
        except LinkError as error:
            raise WorkerLostError(self.address, str(error)) from error

    async def send_frames(self, cargo: Cargo, transfer: int) -> None:
        """Send the frames of a transfer; raises ``WorkerLostError``."""
        try:
            await self.link.send_frames(cargo, transfer)
        except LinkError as error:
            raise WorkerLostError(self.address, str(error)) from error

    async def _receive(self, kind: str, said: Any) -> None:
        if kind not in _DEEDS:
            raise LinkError(f"it has sent {kind}, which cannot come now")
        await _DEEDS[kind](self, said)

    async def _opened(self, said: pb.Opened) -> None:
        if member := self.members.get(said.session):
            member.opened(said)

    async def _taken(self, said: pb.Taken) -> None:
        if member := self.members.get(said.session):
            member.taken(said.transfer)

    async def _resized(self, said: pb.Slots) -> None:
        if member := self.members.get(said.session):
            member.resize(said.slots)

    async def _closed(self, said: pb.Closed) -> None:
        if member := self.members.pop(said.session, None):
            member.fail(WorkerLostError(self.address, "it has closed the session"))

    async def _draining(self, _: pb.Draining) -> None:
        if not self.is_leaving:
            self.is_leaving = True
            self._tasks.create_task(self._leave(), name=f"leave-{self.address}")

    async def _leave(self) -> None:
        """Let it finish what it has, and tell it that this is done."""
        async with asyncio.TaskGroup() as group:
            for member in self.members.values():
                group.create_task(member.leave(), name=f"leave-{self.address}")
        self.link.say(pb.FromCoordinator(drained=pb.Drained()))

    async def _announced(self, said: pb.Result) -> None:
        answer = self._answers.get(said.work)
        if answer is None:
            return  # it is no longer wanted; the frames find nobody either
        arrival = self._arrivals[said.work] = answer.begin(said)
        self._count(said.work, arrival)

    async def _take(self, frame: Frame) -> None:
        if arrival := self._arrivals.get(frame.transfer):
            arrival.take(frame)
            self._count(frame.transfer, arrival)

    def _count(self, work: int, arrival: Arrival) -> None:
        if arrival.is_complete:
            del self._arrivals[work]
            self._answers[work].complete()

    async def _failed(self, said: pb.Failed) -> None:
        error = _error_of(said, self.address)
        if said.WhichOneof("of") == "session":
            if member := self.members.get(said.session):
                member.fail(error)
        elif answer := self._answers.get(said.work):
            _fail(answer, error)

    def __repr__(self) -> str:
        return f"<worker {self.address}, {len(self.members)} sessions, {len(self._answers)} pieces of work>"


_DEEDS: dict[str, Callable[[ConnectedWorker, Any], Awaitable[None]]] = {
    "opened": ConnectedWorker._opened,
    "taken": ConnectedWorker._taken,
    "result": ConnectedWorker._announced,
    "failed": ConnectedWorker._failed,
    "frame": ConnectedWorker._take,
    "slots": ConnectedWorker._resized,
    "draining": ConnectedWorker._draining,
    "closed": ConnectedWorker._closed,
}


def _error_of(said: pb.Failed, address: str) -> Exception:
    try:
        error = rebuilt(json.loads(said.error), address)
    except (KeyError, TypeError, AttributeError, RecursionError) as wrong:
        raise LinkError("it has told an error that is none") from wrong
    return WorkerLostError(address, str(error)) if said.elsewhere else error


def _fail(future: asyncio.Future[Any], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()  # it may be that nobody awaits it


class Member:
    """One session on one worker: a member of the session's crew."""

    def __init__(self, session: GrpcSession, worker: ConnectedWorker) -> None:
        self.slots = 0
        self.fingerprint: Mapping[str, str] = {}
        self.memory = session.memory
        self.give_back = session.give_back
        self._session = session
        self._worker = worker
        self._version: int | None = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed = asyncio.Event()
        self._taken: dict[int, asyncio.Future[None]] = {}
        self._joined = False

    async def open(self) -> None:
        """Open the session there, and join the crew.

        Raises:
            WorkerLostError: the worker is gone, or does not answer.
            FingerprintError: it would not give the bits of the others.
            Exception: whatever opening raised there.
        """
        worker, session = self._worker, self._session
        if worker.link.gone.done():
            raise WorkerLostError(worker.address, worker.link.gone.result())
        worker.members[session.number] = self
        worker.link.say(session.opening)
        try:
            async with asyncio.timeout(OPENING):
                await self._opened
            session.crew.join(self, worker.address)
        except TimeoutError:
            worker.link.lose(f"it has not opened a session within {OPENING:g} s")
            raise WorkerLostError(worker.address, worker.link.gone.result()) from None
        except BaseException:
            worker.members.pop(session.number, None)
            worker.link.say(session.closing)
            raise
        self._joined = True

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        """Send the parameters, and wait until they are taken."""
        assert isinstance(params, Parcel)  # noqa: S101 - the crew hands on what the session gave it
        taken = self._taken[params.transfer] = asyncio.get_running_loop().create_future()
        try:
            for message in params.messages():
                await self._worker.send(message)
            await taken
        finally:
            del self._taken[params.transfer]
        self._version = version

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        """Send ``work``, and return what comes of it."""
        worker = self._worker
        if version != self._version:
            raise StaleParametersError(worker.address, self._version, version)
        number = self._session.new_number()
        cargo = _cargo_of(work)
        message = pb.Assign(session=self._session.number, work=number, version=version, groups=cargo.groups())
        if isinstance(work, GradientWork):
            message.microbatch.CopyFrom(pb.Microbatch(step=work.step, number=work.microbatch, of=work.of))
        else:
            message.prediction.SetInParent()
        cancel = pb.FromCoordinator(cancel=pb.Cancel(work=number))
        answer = _Answer(self, work, partial(worker.link.say, cancel))
        worker.expect(number, answer)
        try:
            await worker.send(pb.FromCoordinator(assign=message))
            await worker.send_frames(cargo, number)
            return await answer
        except BaseException:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                _drop(answer.result())
            answer.cancel()
            raise
        finally:
            worker.forget(number)

    def kill(self) -> None:
        """End the connection; other sessions on it lose the worker too, and it is dialled again."""
        self._worker.link.lose("it was given up")

    async def leave(self) -> None:
        """Leave the crew when what it computes is done."""
        await self._session.crew.leave(self._worker.address)

    async def close(self, patience: float) -> None:
        """Have the worker forget the session, and wait for that; one that takes more seconds than that is lost."""
        if self._worker.link.gone.done():
            return
        self._worker.link.say(self._session.closing)
        try:
            async with asyncio.timeout(patience):
                await self._closed.wait()
        except TimeoutError:
            self._worker.link.lose(f"its work did not end within {patience:g} s of being stopped")

    def expected(self, work: GradientWork | ForwardWork) -> Sequence[Layout]:
        """Return how the arrays of a result must lie."""
        places = self._session.places
        if isinstance(work, GradientWork):
            return places.gradients, places.statistics
        return [places.output_layout(len(work.images))]

    # What the worker says

    def opened(self, said: pb.Opened) -> None:
        """The session is open there."""
        if self._opened.done():
            raise LinkError("it has opened a session twice")
        _require_slots(said.slots)
        self.slots = said.slots
        self.fingerprint = dict(said.fingerprint)
        self._opened.set_result(None)

    def taken(self, transfer: int) -> None:
        """It has these parameters."""
        if (taken := self._taken.get(transfer)) is not None and not taken.done():
            taken.set_result(None)

    def resize(self, slots: int) -> None:
        """It does so many pieces of work at once from now on."""
        _require_slots(slots)
        self.slots = slots
        if self._joined:
            self._session.crew.resize(self._worker.address)

    def fail(self, error: Exception) -> None:
        """The session could not be opened there, or is no more."""
        self._closed.set()
        for future in (self._opened, *self._taken.values()):
            _fail(future, error)
        if self._joined:
            reason = error.reason if isinstance(error, ExecutorError) else str(error)
            self._session.crew.lose(self._worker.address, reason)


def _require_slots(slots: int) -> None:
    if slots > MOST_SLOTS:
        raise LinkError(f"it must have at most {MOST_SLOTS} slots, got {slots}")


def _cargo_of(work: GradientWork | ForwardWork) -> Cargo:
    if work.images.dtype != np.uint8 or not work.images.flags.c_contiguous:
        raise ValueError(
            f"images must be C-contiguous uint8, got {work.images.dtype} with strides {work.images.strides}"
        )
    arrays = {"images": work.images, "labels": work.labels, "weights": work.weights}
    return Cargo.of_arrays({name: array for name, array in arrays.items() if array is not None})


def _drop(result: GradientResult | ForwardResult) -> None:
    if isinstance(result, GradientResult):
        result.release()
