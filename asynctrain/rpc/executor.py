"""A home of workers on other machines: parameters, pixels and gradients in frames on one stream for each worker."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count
from typing import Any, Self, overload

import numpy as np

from asynctrain._aio import ServingGroup, first_of_several, in_thread, step_back
from asynctrain.arena import Arena, Array, Layout, aligned_empty
from asynctrain.errors import ClosedError, ExecutorError, StaleParametersError, WorkerLostError
from asynctrain.executors.base import Session, Tell, nobody
from asynctrain.executors.crew import WORKER_WAIT, Crew
from asynctrain.executors.ledger import Patience
from asynctrain.executors.local import GRACE
from asynctrain.executors.remote import rebuilt
from asynctrain.executors.shared_memory import Places, write
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.codec import FRAME, Arrival, are_alike, frames, groups_of, layouts_of, nbytes, vector_of
from asynctrain.rpc.link import (
    BROKEN,
    IN_THREAD,
    PROTOCOL,
    SCHEMA,
    Link,
    LinkError,
    first_message,
    shaken,
    told,
)
from asynctrain.rpc.wire import Access, dialled, is_permanent, listening, parted
from asynctrain.types import ForwardResult, ForwardWork, GradientResult, GradientWork, Params, Program, Sums

HEARTBEAT = 5.0  # seconds of silence after which a worker counts as gone
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts to dial
LEAVING = 5.0  # seconds that workers have to close a session
OUTPUT_BYTES = 2**28  # of one prediction

_logger = logging.getLogger(__name__)


class _Parcel(dict[str, Array]):
    """The parameters of one version as all workers get them, for a crew to hand to its members; as a mapping, empty."""

    def __init__(self, transfer: int, messages: list[bytes]) -> None:
        super().__init__()
        self.transfer = transfer
        self.messages = messages


class _Answer(asyncio.Future[GradientResult | ForwardResult]):
    """What the worker will answer. Cancelling it tells the worker in that very call."""

    def __init__(self, member: _Member, gradients: bool, cancel: Callable[[], None]) -> None:
        super().__init__()
        self.member = member
        self.gradients = gradients  # or predictions
        self._cancel_there = cancel

    def cancel(self, msg: Any | None = None) -> bool:
        if not self.done():
            self._cancel_there()
        return super().cancel(msg)


class _Worker:
    """A worker that is connected."""

    def __init__(self, address: str, instance: str, link: Link, threads: ThreadPoolExecutor) -> None:
        self.address = address
        self.instance = instance
        self.link = link
        self.threads = threads
        self.members: dict[int, _Member] = {}  # by the numbers of their sessions
        self.is_leaving = False
        self._work: dict[int, _Answer] = {}
        self._arrivals: dict[int, tuple[pb.Result, Arrival]] = {}
        self._tasks = ServingGroup()

    async def run(self) -> str:
        """Serve its stream until that is over, and return why."""
        try:
            async with self._tasks:
                return await self.link.run(self._receive)
        finally:
            self._fail(self.link.gone.result())

    def expect(self, work: int, answer: _Answer) -> None:
        """Let the result of ``work`` go to ``answer``."""
        self._work[work] = answer

    def forget(self, work: int) -> None:
        """Drop what still comes of ``work``."""
        del self._work[work]
        self._arrivals.pop(work, None)

    def _fail(self, reason: str) -> None:
        error = WorkerLostError(self.address, reason)
        for answer in self._work.values():
            if not answer.done():
                answer.set_exception(error)
        for member in list(self.members.values()):
            member.fail(error)

    async def _receive(self, message: pb.FromWorker) -> None:
        kind = message.WhichOneof("kind")
        if kind is None or kind not in _DEEDS:
            raise LinkError(f"it has sent {kind}, which cannot come now")
        await _DEEDS[kind](self, getattr(message, kind))

    async def _opened(self, message: pb.Opened) -> None:
        if member := self.members.get(message.session):
            member.opened(message)

    async def _taken(self, message: pb.Taken) -> None:
        if member := self.members.get(message.session):
            member.taken(message.transfer)

    async def _resized(self, message: pb.Slots) -> None:
        if member := self.members.get(message.session):
            member.resize(message.slots)

    async def _closed(self, message: pb.Closed) -> None:
        if member := self.members.pop(message.session, None):
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

    async def _announced(self, result: pb.Result) -> None:
        answer = self._work.get(result.work)
        if answer is None:
            return  # it is no longer wanted; the frames find nobody either
        arrival = answer.member.arrival(answer.gradients, layouts_of(result.groups))
        self._arrivals[result.work] = result, arrival
        if arrival.is_complete:
            self._arrived(result.work)

    async def _take(self, frame: pb.Frame) -> None:
        if frame.transfer not in self._arrivals:
            return
        _, arrival = self._arrivals[frame.transfer]
        if len(frame.data) > IN_THREAD:
            await asyncio.get_running_loop().run_in_executor(self.threads, arrival.take, frame)
        else:
            arrival.take(frame)
        if arrival.is_complete and frame.transfer in self._arrivals:
            self._arrived(frame.transfer)

    def _arrived(self, work: int) -> None:
        result, arrival = self._arrivals.pop(work)
        answer = self._work[work]
        if not answer.done():
            answer.set_result(answer.member.result(answer.gradients, result, arrival))

    async def _failed(self, failed: pb.Failed) -> None:
        error = rebuilt(json.loads(failed.error), self.address)
        if failed.elsewhere:
            error = WorkerLostError(self.address, str(error))
        if failed.WhichOneof("of") == "session":
            if member := self.members.get(failed.session):
                member.fail(error)
        elif (answer := self._work.get(failed.work)) is not None and not answer.done():
            answer.set_exception(error)

    def __repr__(self) -> str:
        return f"<worker {self.address}, {len(self.members)} sessions, {len(self._work)} pieces of work>"


_DEEDS: dict[str, Callable[[_Worker, Any], Awaitable[None]]] = {
    "opened": _Worker._opened,
    "taken": _Worker._taken,
    "result": _Worker._announced,
    "failed": _Worker._failed,
    "frame": _Worker._take,
    "slots": _Worker._resized,
    "draining": _Worker._draining,
    "closed": _Worker._closed,
}


class _Member:
    """One session on one worker: a member of the session's crew."""

    def __init__(self, session: _GrpcSession, worker: _Worker) -> None:
        self.slots = 0
        self.fingerprint: Mapping[str, str] = {}
        self._session = session
        self._worker = worker
        self._version: int | None = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed = asyncio.Event()
        self._taken: dict[int, asyncio.Future[None]] = {}
        self._joined = False

    async def open(self) -> None:
        """Open the session there; raises whatever opening raised there, or ``WorkerLostError``."""
        worker, session = self._worker, self._session
        worker.members[session.number] = self
        worker.link.say(session.opening)
        try:
            if worker.link.gone.done():
                raise WorkerLostError(worker.address, worker.link.gone.result())
            await self._opened
            session.crew.join(self, worker.address)
        except BaseException:
            worker.members.pop(session.number, None)
            worker.link.say(session.closing)
            raise
        self._joined = True

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        """Send the parameters, and wait until they are taken."""
        assert isinstance(params, _Parcel)  # noqa: S101 - the crew hands on what the session gave it
        taken = self._taken[params.transfer] = asyncio.get_running_loop().create_future()
        try:
            await self._send(params.messages)
            await taken
        finally:
            del self._taken[params.transfer]
        self._version = version

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        worker = self._worker
        if version != self._version:
            raise StaleParametersError(worker.address, self._version, version)
        number = self._session.new_number()
        arenas = _arenas_of(work)
        message = pb.Assign(session=self._session.number, work=number, version=version, groups=groups_of(arenas))
        if isinstance(work, GradientWork):
            message.microbatch.CopyFrom(pb.Microbatch(step=work.step, number=work.microbatch, of=work.of))
        else:
            message.prediction.SetInParent()
        cancel = pb.FromCoordinator(cancel=pb.Cancel(work=number))
        answer = _Answer(self, isinstance(work, GradientWork), partial(worker.link.say, cancel))
        worker.expect(number, answer)
        try:
            await self._send([pb.FromCoordinator(assign=message)])
            parcels = (pb.FromCoordinator(frame=frame).SerializeToString() for frame in frames(number, arenas))
            await self._send_parcels(parcels, nbytes(arena.layout for arena in arenas))
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

    async def close(self) -> None:
        """Have the worker forget the session, and wait for that."""
        if self._worker.link.gone.done():
            return
        self._worker.link.say(self._session.closing)
        await self._closed.wait()

    # What the worker says

    def opened(self, message: pb.Opened) -> None:
        """The session is open there."""
        self.slots = message.slots
        self.fingerprint = dict(message.fingerprint)
        if not self._opened.done():
            self._opened.set_result(None)

    def taken(self, transfer: int) -> None:
        """It has these parameters."""
        if (taken := self._taken.get(transfer)) is not None and not taken.done():
            taken.set_result(None)

    def resize(self, slots: int) -> None:
        """It does so many pieces of work at once from now on."""
        self.slots = slots
        if self._joined:
            self._session.crew.resize(self._worker.address)

    def fail(self, error: Exception) -> None:
        """The session could not be opened there, or is no more."""
        self._closed.set()
        for future in (self._opened, *self._taken.values()):
            if not future.done():
                future.set_exception(error)
                future.exception()  # it may be that nobody awaits it
        if self._joined:
            self._session.crew.lose(
                self._worker.address, error.reason if isinstance(error, ExecutorError) else str(error)
            )

    def arrival(self, gradients: bool, layouts: Sequence[Layout]) -> Arrival:
        """Return where a result arrives; raises ``LinkError`` where it is not what the program makes."""
        if gradients:
            expected = self._session.places.gradients, self._session.places.statistics
            if len(layouts) != len(expected) or not all(map(are_alike, layouts, expected)):
                raise LinkError("it has sent gradients that are not those of the program's model")
            return Arrival(expected, self._session.memory)
        if [list(layout.shapes) for layout in layouts] != [["outputs"]] or nbytes(layouts) > OUTPUT_BYTES:
            raise LinkError("it has sent what are no predictions")
        return Arrival(layouts)

    def result(self, gradients: bool, message: pb.Result, arrival: Arrival) -> GradientResult | ForwardResult:
        """Return a result that has arrived."""
        arenas = arrival.arenas()
        said = message.sums
        sums = Sums(said.loss, said.weight, said.samples, dict(said.counts))
        if gradients:
            return GradientResult(arenas[0], sums, arenas[1], partial(self._session.give_back, arrival.memory))
        return ForwardResult(arenas[0]["outputs"], sums)

    async def _send(self, messages: list[Any]) -> None:
        try:
            await self._worker.link.send(messages)
        except LinkError as error:
            raise WorkerLostError(self._worker.address, str(error)) from error

    async def _send_parcels(self, parcels: Any, size: int) -> None:
        try:
            await self._worker.link.send_parcels(parcels, size, self._worker.threads)
        except LinkError as error:
            raise WorkerLostError(self._worker.address, str(error)) from error


def _arenas_of(work: GradientWork | ForwardWork) -> list[Arena]:
    if work.images.dtype != np.uint8 or not work.images.flags.c_contiguous:
        raise ValueError(
            f"images must be C-contiguous uint8, got {work.images.dtype} with strides {work.images.strides}"
        )
    arrays = {"images": work.images, "labels": work.labels, "weights": work.weights}
    return [vector_of(name, array) for name, array in arrays.items() if array is not None]


def _drop(result: GradientResult | ForwardResult) -> None:
    if isinstance(result, GradientResult):
        result.release()


class _GrpcSession:
    """One program on the executor's workers."""

    def __init__(
        self, program: Program, places: Places, crew: Crew, new_number: Callable[[], int], threads: ThreadPoolExecutor
    ) -> None:
        self.places = places
        self.crew = crew
        self.new_number = new_number  # of sessions, work and transfers
        self.number = new_number()
        text = json.dumps(program.to_json())
        if len(text) > FRAME:
            raise ValueError(f"a program must be of at most {FRAME} characters to travel, got {len(text)}")
        self.opening = pb.FromCoordinator(open=pb.Open(session=self.number, program=text))
        self.closing = pb.FromCoordinator(close=pb.Close(session=self.number))
        self._threads = threads
        self._free: list[Array] = []
        self._closed = False

    @property
    def slots(self) -> int:
        return self.crew.slots

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return self.crew.fingerprint

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        if self._closed:
            raise ClosedError(f"{self} is closed")
        loop = asyncio.get_running_loop()
        parcel = await loop.run_in_executor(self._threads, self._packed, params, model_state, version)
        await self.crew.broadcast(parcel, {}, version)

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        return await self.crew.compute(work, version)

    def memory(self, size: int) -> Array:
        """Return where a result may arrive: memory that was given back, or else new."""
        return self._free.pop() if self._free else aligned_empty((size,), np.uint8)

    def give_back(self, memory: Array) -> None:
        """Take the memory of a result that nobody reads any more."""
        if not self._closed:
            self._free.append(memory)

    def close(self) -> None:
        """Stop all work and refuse more."""
        self._closed = True
        self._free.clear()
        self.crew.close()

    def _packed(self, params: Params, model_state: Params, version: int) -> _Parcel:
        """Return the messages of one version, made once for all workers."""
        arenas = [_arena(params, self.places.params, "params")]
        if model_state:
            arenas.append(_arena(model_state, self.places.state, "model_state"))
        transfer = self.new_number()
        header = pb.Parameters(session=self.number, version=version, transfer=transfer, groups=groups_of(arenas))
        messages = [pb.FromCoordinator(parameters=header)]
        messages += [pb.FromCoordinator(frame=frame) for frame in frames(transfer, arenas)]
        return _Parcel(transfer, [message.SerializeToString() for message in messages])

    def __repr__(self) -> str:
        return f"<session {self.number} on {self.crew}>"


def _arena(arrays: Params, layout: Layout, argument: str) -> Arena:
    """Return ``arrays`` as they lie in ``layout``, copied only where they lie otherwise."""
    if isinstance(arrays, Arena) and are_alike(arrays.layout, layout):
        return arrays
    arena = layout.empty()
    write(arrays, arena, argument)
    return arena


class GrpcExecutor:
    """Computes on workers that are connected over gRPC; not a ``concurrent.futures.Executor``.

    A worker is a process of ``asynctrain worker``, on this or another machine. Either it listens and is dialled from
    here, or this listens and it dials in, at any time: it takes part from the next step on. One that is lost, frozen or
    cut off is done without, and welcome again; what it had is computed elsewhere, and the bits are the same.

        >>> async with GrpcExecutor("10.0.0.5:50052", "10.0.0.6:50052", access=Access(tls=..., token=...)) as executor:
        >>> async with GrpcExecutor(listen="127.0.0.1:50052") as executor:

    Layers of your own must be registered in the workers too: no code travels.

    Args:
        addresses: ``HOST:PORT`` of workers that listen.
        listen: ``HOST:PORT`` for workers that dial in, port 0 for any that is free.
        access: TLS, tokens, and whether addresses of other machines are permitted without TLS.
        heartbeat: seconds, at least 0.05, after which a worker that is not heard counts as gone.
        join_wait: seconds that opening a session waits for the first worker.
        worker_wait: seconds that work waits while there is no worker at all, before it fails.
        patience: how long a result is waited for before another worker computes it too.

    Cancelling the task that awaits a computation stops it there before the next layer's kernel.

    Raises:
        ValueError: an address is none, or another machine's, unencrypted, and that is not permitted.
    """

    def __init__(
        self,
        *addresses: str,
        listen: str | None = None,
        access: Access | None = None,
        heartbeat: float = HEARTBEAT,
        join_wait: float = WORKER_WAIT,
        worker_wait: float = WORKER_WAIT,
        patience: Patience = Patience(),  # noqa: B008 - it is frozen
    ) -> None:
        if not addresses and listen is None:
            raise ValueError("addresses of workers must be given, or one to listen on, got neither")
        if len(set(addresses)) != len(addresses):
            raise ValueError(f"addresses must differ, got {', '.join(addresses)}")
        if not 0.05 <= heartbeat <= 3600:
            raise ValueError(f"heartbeat must be 0.05 to 3600 seconds, got {heartbeat}")
        if not (join_wait >= 0 and worker_wait >= 0):
            raise ValueError(f"join_wait and worker_wait must be at least 0 seconds, got {join_wait}, {worker_wait}")
        self._access = access or Access()
        for address in addresses:
            self._access.require_safe(address, dials=True)
        if listen is not None:
            self._access.require_safe(listen, dials=False)
        self._addresses = addresses
        self._listen = listen
        self._heartbeat = heartbeat
        self._join_wait = join_wait
        self._worker_wait = worker_wait
        self._patience = patience
        self._address = f"grpc://{','.join([*addresses, *([] if listen is None else [f'listen:{listen}'])])}"
        self._new_number: Callable[[], int] = partial(next, count(1))
        self._threads = ThreadPoolExecutor(1, "asynctrain-frames", initializer=step_back)
        self._present: dict[_Worker, None] = {}
        self._sessions: set[_GrpcSession] = set()
        self._changed = asyncio.Event()
        self._closing = asyncio.Event()
        self._service: asyncio.Task[None] | None = None
        self._refused: ExecutorError | None = None
        self._port: asyncio.Future[int] | None = None

    async def listening(self) -> str:
        """Begin to listen, if that is yet to be done, and return the ``HOST:PORT`` for workers to dial.

        Raises:
            ValueError: this executor dials only.
            OSError: the port cannot be used.
            ClosedError: the executor is closed.
        """
        if self._listen is None:
            raise ValueError("this executor does not listen: it was given no address to listen on")
        self._start()
        assert self._port is not None  # noqa: S101 - it has been started
        return f"{parted(self._listen)[0]}:{await asyncio.shield(self._port)}"

    @asynccontextmanager
    async def open(self, program: Program, tell: Tell = nobody) -> AsyncIterator[Session]:
        """Open a session for ``program``, once there is a worker; leaving it stops its work and waits for the workers.

        Raises:
            WorkerLostError: no worker was there within ``join_wait`` seconds.
            ExecutorError: a worker refuses us for good: our token, or another release.
            FingerprintError: two workers would not give the same bits.
            ValueError: the program is none, or too large for a worker.
            OSError: the port cannot be used.
            ClosedError: the executor is closed.
        """
        self._start()
        places = await in_thread(Places, program)
        if self._port is not None:
            await asyncio.shield(self._port)
        await self._until(lambda: bool(self._able()))
        async with Crew(self._address, worker_wait=self._worker_wait, patience=self._patience, tell=tell) as crew:
            session = _GrpcSession(program, places, crew, self._new_number, self._threads)
            try:
                with first_of_several():
                    await self._admit_all(session)
                await self._until(lambda: bool(crew.addresses))  # they may have been lost while it was opened
                yield session
            finally:
                self._sessions.discard(session)
                session.close()
                await self._dismiss(session)

    async def aclose(self, grace: float = GRACE) -> None:
        """Stop all work and leave the workers, within ``grace`` seconds; may be called again."""
        self._closing.set()
        self._changed.set()
        for session in self._sessions:
            session.close()
        if self._service is not None:
            await asyncio.wait([self._service])
        await in_thread(self._threads.shutdown)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = f"{len(self._present)} workers, {len(self._sessions)} sessions"
        return f"<{type(self).__name__} {self._address}, {'closed' if self._closing.is_set() else state}>"

    # Sessions

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Wait for workers until that holds; at most ``join_wait`` seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._join_wait):
                while not holds() and (self._refused is None or self._able()):
                    self._require_open()
                    self._changed.clear()
                    await self._changed.wait()
        self._require_open()
        if holds():
            return
        if self._refused is not None:
            raise self._refused
        raise WorkerLostError(self._address, f"there was no worker within {self._join_wait:g} s")

    async def _admit_all(self, session: _GrpcSession) -> None:
        """Open the session on all workers that are there; those that come later do so themselves."""
        async with asyncio.TaskGroup() as group:
            self._sessions.add(session)
            for worker in self._able():
                group.create_task(_admit(worker, session), name=f"open-{worker.address}")

    def _able(self) -> list[_Worker]:
        return [worker for worker in self._present if not worker.is_leaving]

    async def _dismiss(self, session: _GrpcSession) -> None:
        members = [worker.members[session.number] for worker in self._present if session.number in worker.members]
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVING), asyncio.TaskGroup() as group:
                for member in members:
                    group.create_task(member.close(), name="close")
        for worker in self._present:
            worker.members.pop(session.number, None)

    def _require_open(self) -> None:
        if self._closing.is_set():
            raise ClosedError(f"the executor {self._address} is closed")

    # Workers

    def _start(self) -> None:
        self._require_open()
        if self._service is None:
            if self._listen is not None:
                self._port = asyncio.get_running_loop().create_future()
            # In no group of a caller's: it outlives the session that happens to be the first. ``aclose`` awaits it.
            self._service = asyncio.create_task(self._serve(), name=self._address)

    async def _serve(self) -> None:
        try:
            async with ServingGroup() as group:
                for address in self._addresses:
                    group.create_task(self._keep_dialling(address), name=f"dial-{address}")
                if self._listen is not None:
                    group.create_task(self._keep_listening(self._listen), name=f"listen-{self._listen}")
                await self._closing.wait()
                for worker in list(self._present):
                    worker.link.lose("the executor is closed")
        finally:
            if self._port is not None and not self._port.done():
                self._port.set_exception(ClosedError(f"the executor {self._address} is closed"))
                self._port.exception()

    async def _keep_dialling(self, address: str) -> None:
        pause = SHORTEST_PAUSE
        while True:
            try:
                async with dialled(address, "Serve", pb.FromWorker, self._access) as call:
                    hello = await first_message(call, "hello")
                    pause = SHORTEST_PAUSE
                    await self._let_work(call, hello, address)
            except BROKEN as error:
                if is_permanent(error):
                    self._refused = ExecutorError(address, told(error))
                    self._changed.set()
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _keep_listening(self, address: str) -> None:
        assert self._port is not None  # noqa: S101 - made by whoever starts this
        try:
            async with listening(address, "Join", self._welcome, pb.FromWorker, self._access) as port:
                self._port.set_result(port)
                await self._closing.wait()
        except (OSError, ValueError) as error:
            if self._port.done():
                raise
            self._port.set_exception(error)
            self._port.exception()

    async def _welcome(self, context: Any) -> None:
        """Serve a worker that has dialled in."""
        hello = await first_message(context, "hello")
        for worker in list(self._present):
            if worker.instance == hello.instance:
                worker.link.lose("it has connected once more")
        await self._let_work(context, hello, f"{hello.node} at {context.peer().partition(':')[2]}")

    async def _let_work(self, stream: Any, hello: pb.Hello, address: str) -> None:
        """Let a worker take part in all sessions until it is gone."""
        welcome = pb.Welcome(protocol=PROTOCOL, schema=SCHEMA, heartbeat_ms=round(self._heartbeat * 1000))
        await shaken(stream.write(pb.FromCoordinator(welcome=welcome)), "welcome")
        beat = pb.FromCoordinator(heartbeat=pb.Heartbeat())
        worker = _Worker(address, hello.instance, Link(stream, self._heartbeat, beat), self._threads)
        self._present[worker] = None
        self._refused = None
        self._changed.set()
        try:
            async with ServingGroup() as group:
                for session in self._sessions:
                    group.create_task(self._join(worker, session), name=f"open-{address}")
                await worker.run()
        finally:
            del self._present[worker]

    async def _join(self, worker: _Worker, session: _GrpcSession) -> None:
        try:
            await _admit(worker, session)
            self._changed.set()
        except Exception as error:  # whatever opening raises there: it did not on those before
            _logger.warning("%s does not take part: %s", worker.address, error)
            worker.link.lose(f"it could not open the session: {error}")


async def _admit(worker: _Worker, session: _GrpcSession) -> None:
    """Open the session on ``worker`` too, and let it join; one that is lost meanwhile does not."""
    with suppress(WorkerLostError, ClosedError):
        await _Member(session, worker).open()
