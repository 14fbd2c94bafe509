"""A home of workers on other machines: parameters, pixels and gradients in frames on one stream for each worker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count
from typing import Any, Self

from asynctrain._aio import ServingGroup, first_of_several, in_thread
from asynctrain.errors import ClosedError, ExecutorError, WorkerLostError
from asynctrain.executors.base import Session, Tell, nobody
from asynctrain.executors.crew import WORKER_WAIT, Crew
from asynctrain.executors.ledger import Patience
from asynctrain.executors.local import GRACE
from asynctrain.executors.shared_memory import Places
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.link import BROKEN, PROTOCOL, SCHEMA, Link, first_message, shaken, told
from asynctrain.rpc.member import ConnectedWorker, Member
from asynctrain.rpc.session import GrpcSession
from asynctrain.rpc.wire import Access, Pauses, dialled, is_permanent, listening, parted
from asynctrain.types import Program

HEARTBEAT = 5.0  # seconds of silence after which a worker counts as gone
NAME = 64  # characters that count of what a worker calls itself
LEAVING = 5.0  # seconds that workers have to close a session

_logger = logging.getLogger(__name__)


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
        self._present: dict[ConnectedWorker, None] = {}
        self._sessions: set[GrpcSession] = set()
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
            session = GrpcSession(program, places, crew, self._new_number)
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
            _, late = await asyncio.wait([self._service], timeout=grace)
            if late:
                self._service.cancel()
                await asyncio.wait(late)
            if not self._service.cancelled():
                self._service.result()

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

    async def _admit_all(self, session: GrpcSession) -> None:
        """Open the session on all workers that are there; those that come later do so themselves."""
        async with asyncio.TaskGroup() as group:
            self._sessions.add(session)
            for worker in self._able():
                group.create_task(_admit(worker, session), name=f"open-{worker.address}")

    def _able(self) -> list[ConnectedWorker]:
        return [worker for worker in self._present if not worker.is_leaving]

    async def _dismiss(self, session: GrpcSession) -> None:
        """Wait until nothing of the session computes any more."""
        members = [worker.members[session.number] for worker in self._present if session.number in worker.members]
        async with asyncio.TaskGroup() as group:
            for member in members:
                group.create_task(member.close(LEAVING), name="close")
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
        pauses = Pauses()
        while True:
            began = asyncio.get_running_loop().time()
            try:
                async with dialled(address, "Serve", self._access) as call:
                    hello = await first_message(call, pb.FromWorker, "hello")
                    await self._let_work(call, hello, address)
            except BROKEN as error:
                if is_permanent(error):
                    self._refused = ExecutorError(address, told(error))
                    self._changed.set()
            await asyncio.sleep(pauses.after(asyncio.get_running_loop().time() - began))

    async def _keep_listening(self, address: str) -> None:
        assert self._port is not None  # noqa: S101 - made by whoever starts this
        try:
            async with listening(address, "Join", self._welcome, self._access) as port:
                self._port.set_result(port)
                await self._closing.wait()
        except (OSError, ValueError) as error:
            if self._port.done():
                raise
            self._port.set_exception(error)
            self._port.exception()

    async def _welcome(self, context: Any) -> None:
        """Serve a worker that has dialled in."""
        hello = await first_message(context, pb.FromWorker, "hello")
        for worker in list(self._present):
            if worker.instance == hello.instance:
                worker.link.lose("it has connected once more")
        await self._let_work(context, hello, f"{hello.node[:NAME]} at {context.peer().partition(':')[2]}")

    async def _let_work(self, stream: Any, hello: pb.Hello, address: str) -> None:
        """Let a worker take part in all sessions until it is gone."""
        welcome = pb.Welcome(protocol=PROTOCOL, schema=SCHEMA, heartbeat_ms=round(self._heartbeat * 1000))
        await shaken(stream.write(pb.FromCoordinator(welcome=welcome).SerializeToString()), "welcome")
        beat = pb.FromCoordinator(heartbeat=pb.Heartbeat())
        link = Link(stream, pb.FromWorker, beat, self._heartbeat)
        worker = ConnectedWorker(address, hello.instance, link)
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

    async def _join(self, worker: ConnectedWorker, session: GrpcSession) -> None:
        try:
            await _admit(worker, session)
            self._changed.set()
        except Exception as error:  # whatever opening raises there: it did not on those before
            _logger.warning("%s does not take part: %s", worker.address, str(error))
            worker.link.lose(f"it could not open the session: {error}")


async def _admit(worker: ConnectedWorker, session: GrpcSession) -> None:
    """Open the session on ``worker`` too, and let it join; one that is lost meanwhile does not."""
    with suppress(WorkerLostError, ClosedError):
        await Member(session, worker).open()
