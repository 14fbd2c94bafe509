"""A home of worker processes on this machine: parameters, pixels and gradients in shared memory, messages on a socket.

Each worker is a process started as a command of its own, so nothing is forked, and neither notebooks nor scripts need
a main guard. What it and the parent say to each other is small: which block, which slot, done. Once a version, the
parent writes the parameters into a *board* that all workers read; each piece of work has a *slot* of its worker's, in
which its pixels come and its gradients go back, where the caller reads them without a copy.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Self, overload

import numpy as np

from asynctrain._aio import ServingGroup, finished, first_of_several, in_thread, step_back
from asynctrain.errors import ClosedError, ExecutorError, StaleParametersError, WorkerLostError
from asynctrain.executors.base import Session, Tell, nobody
from asynctrain.executors.crew import WORKER_WAIT, Crew
from asynctrain.executors.ledger import Patience
from asynctrain.executors.local import GRACE, usable_cpus
from asynctrain.executors.messages import Message
from asynctrain.executors.shared_memory import Block, Board, Piece, Places, SharedStopFlag, Slot, write
from asynctrain.executors.worker_process import Started, WorkerProcess, leave_interrupts_to_others, start_process
from asynctrain.nn.layers.base import modules_of
from asynctrain.types import (
    ForwardResult,
    ForwardWork,
    GradientResult,
    GradientWork,
    Params,
    Program,
    Sums,
)

HEARTBEAT = 5.0  # seconds of silence after which a worker counts as frozen
START = 60.0  # seconds that a process has to import what it needs
LEAVING = 1.0  # seconds that a process has to end when its socket closes, which it does in an instant
LONGEST_PAUSE = 5.0  # seconds between attempts to start a process that does not start

COPIED_AT_ONCE = 2**20  # bytes: more are copied in a thread, and not by the loop

HEALTHY = 1.0  # seconds that a worker must have lived for the next to be started without a pause


class _SharedBoard(Board):
    """A board as the parent knows it. readers: pieces of work under way with it, and whoever writes it."""

    def __init__(self, places: Places, number: int) -> None:
        super().__init__(places, Block.create(places.board_size))
        self.number = number
        self.readers = 0


class _OwnSlot(Slot):
    """A slot as the parent knows it."""

    def __init__(self, places: Places, number: int, size: int) -> None:
        super().__init__(places, Block.create(size))
        self.number = number


class _Outcome(asyncio.Future[GradientResult | ForwardResult]):
    """What will come of a piece of work. Cancelling it sets the work's stop flag in that very call."""

    def __init__(self, stop: SharedStopFlag) -> None:
        super().__init__()
        self._stop = stop

    def cancel(self, msg: Any | None = None) -> bool:
        if not self.done():
            self._stop.set()
        return super().cancel(msg)


class _Member:
    """One session on one worker: a member of the session's crew.

    A slot is in nobody's hands, and may be given to the next work, once the worker is through with it and the caller
    has released the result that lies in it.
    """

    slots = 1

    def __init__(self, session: _ProcessSession, worker: WorkerProcess, fingerprint: Mapping[str, str]) -> None:
        self.fingerprint = fingerprint
        self._session = session
        self._worker = worker
        self._places = session.places
        self._board: _SharedBoard | None = None
        self._has_state = False
        self._version: int | None = None
        self._slots: dict[int, _OwnSlot] = {}
        self._free: dict[int, _OwnSlot] = {}

    def broadcast(self, params: Params, model_state: Params, version: int) -> asyncio.Future[None]:
        """Take the board whose parameters these are for the present ones."""
        self._board = self._session.board_of(params)
        self._has_state = bool(model_state)
        self._version = version
        self._worker.map(self._board.number, self._board.block, writable=False)
        return finished(None)

    @overload
    def compute(self, work: GradientWork, version: int) -> Awaitable[GradientResult]: ...
    @overload
    def compute(self, work: ForwardWork, version: int) -> Awaitable[ForwardResult]: ...
    def compute(self, work: GradientWork | ForwardWork, version: int) -> Awaitable[GradientResult | ForwardResult]:
        """Begin ``work``, in this very call unless its pixels are many."""
        if self._board is None or version != self._version:
            raise StaleParametersError(self._worker.address, self._version, version)
        inputs = _Inputs(self._places, work)
        slot = self._take_slot(inputs.end)
        asked = _Asked(self._board, self._has_state, inputs, slot, _Outcome(slot.stop))
        asked.board.readers += 1
        if inputs.nbytes <= COPIED_AT_ONCE:
            inputs.write(slot.block)
            self._request(asked)
        else:
            copying = self._session.copying(partial(inputs.write, slot.block))
            copying.add_done_callback(partial(self._copied, asked))
        return asked.outcome

    def _copied(self, asked: _Asked, copying: asyncio.Future[None]) -> None:
        """Go on with what lies in its slot now, if it is still wanted."""
        error = copying.exception()
        if error is None and not asked.outcome.done():
            self._request(asked)
        else:
            self._answered(asked, error or {})

    def _request(self, asked: _Asked) -> None:
        message = {
            "session": self._session.number,
            "board": asked.board.number,
            "state": asked.has_state,
            "slot": asked.slot.number,
            **asked.inputs.to_json(),
        }
        self._worker.request(message, partial(self._answered, asked))

    def _answered(self, asked: _Asked, answer: Message | BaseException) -> None:
        """Hand on what the worker has answered, which is through with the board and the slot."""
        asked.board.readers -= 1
        slot, outcome, outputs = asked.slot, asked.outcome, asked.inputs.outputs
        if outcome.done():  # it was cancelled
            self._let_go(slot)
        elif isinstance(answer, BaseException):
            self._let_go(slot)
            outcome.set_exception(answer)
        elif outputs is None:
            release = partial(self._let_go, slot)
            outcome.set_result(GradientResult(slot.gradients, Sums(*answer["sums"]), slot.statistics, release))
        else:
            predictions = outputs.of(slot.block).copy()
            self._let_go(slot)
            outcome.set_result(ForwardResult(predictions, Sums(*answer["sums"])))

    def kill(self) -> None:
        """End the process; other sessions on it lose it too."""
        self._worker.lose("it was given up")

    def forget(self) -> None:
        """Let go of the slots."""
        for number in self._slots:
            self._worker.unmap(number)
        self._slots.clear()
        self._free.clear()

    def _take_slot(self, size: int) -> _OwnSlot:
        """Return a slot of at least ``size`` bytes that is in nobody's hands; a new one where there is none."""
        slot = next((slot for slot in self._free.values() if slot.block.size >= size), None)
        if slot is not None:
            del self._free[slot.number]
            slot.stop.clear()
            return slot
        if self._free:
            self._drop(self._free.popitem()[1])
        behind = size - self._places.inputs_offset
        roomy = self._places.inputs_offset + (1 << behind.bit_length())  # the next work may be a little larger
        slot = _OwnSlot(self._places, self._session.new_number(), roomy)
        self._slots[slot.number] = slot
        self._worker.map(slot.number, slot.block, writable=True)
        slot.block.close()
        return slot

    def _drop(self, slot: _OwnSlot) -> None:
        del self._slots[slot.number]
        self._worker.unmap(slot.number)

    def _let_go(self, slot: _OwnSlot) -> None:
        if slot.number in self._slots:
            self._free[slot.number] = slot


@dataclass(frozen=True, slots=True)
class _Asked:
    """A piece of work that is asked of a worker: with which parameters, what comes with it, where, and its outcome."""

    board: _SharedBoard
    has_state: bool
    inputs: _Inputs
    slot: _OwnSlot
    outcome: _Outcome


class _Inputs:
    """What comes with a piece of work: where its arrays go in a slot, and what is said of them."""

    def __init__(self, places: Places, work: GradientWork | ForwardWork) -> None:
        if work.images.dtype != np.uint8 or not work.images.flags.c_contiguous:
            raise ValueError(
                f"images must be C-contiguous uint8, got {work.images.dtype} with strides {work.images.strides}"
            )
        self._work = work
        self._arrays = [array for array in (work.images, work.labels, work.weights) if array is not None]
        self._pieces = places.inputs(self._arrays)
        last = self._pieces[-1]
        self.outputs = places.outputs(last, len(work.images)) if isinstance(work, ForwardWork) else None
        self.nbytes = sum(array.nbytes for array in self._arrays)
        self.end = (self.outputs or last).end

    def write(self, block: Block) -> None:
        for piece, array in zip(self._pieces, self._arrays, strict=True):
            piece.of(block)[...] = array

    def to_json(self) -> Message:
        work, pieces = self._work, iter(self._pieces)
        arrays = (work.images, work.labels, work.weights)
        inputs = [None if array is None else next(pieces).to_json() for array in arrays]
        if isinstance(work, GradientWork):
            return {
                "do": "gradients",
                "inputs": inputs,
                "step": work.step,
                "microbatch": work.microbatch,
                "of": work.of,
            }
        return {"do": "forward", "inputs": inputs, "outputs": self.outputs and self.outputs.to_json()}


class _ProcessSession:
    """One program on the executor's workers: its boards, and the crew that computes.

    There are two boards, written in turns; a third comes into being where a worker still reads the older one.
    """

    def __init__(
        self,
        program: Program,
        places: Places,
        crew: Crew,
        slots: int,
        new_number: Callable[[], int],
        copying: ThreadPoolExecutor,
    ) -> None:
        self.places = places
        self.crew = crew
        self.slots = slots
        self.new_number = new_number  # of sessions and blocks, for messages
        self.number = new_number()
        self._copying = copying
        self._modules = importable(modules_of(program.architecture))
        self._program = _Slip(self.new_number(), json.dumps(program.to_json()).encode())
        self._boards: list[_SharedBoard] = []
        self._present: _SharedBoard | None = None
        self._members: dict[WorkerProcess, _Member] = {}
        self._closed = False

    @property
    def fingerprint(self) -> Mapping[str, str]:
        return self.crew.fingerprint

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        if self._closed:
            raise ClosedError(f"{self} is closed")
        board = self._free_board()
        board.readers += 1
        try:
            await self.copied(board.block.size, partial(_write_board, board, params, model_state))
        except BaseException:  # a thread may be writing to it still
            self._drop(board)
            raise
        board.readers -= 1
        self._present = board
        await self.crew.broadcast(board.params, board.model_state if model_state else {}, version)

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        return await self.crew.compute(work, version)

    async def copied(self, nbytes: int, copy: Callable[[], None]) -> None:
        """Call ``copy``; in a thread where it copies so many bytes that the loop would feel it."""
        if nbytes <= COPIED_AT_ONCE:
            copy()
        else:
            await self.copying(copy)

    def copying(self, copy: Callable[[], None]) -> asyncio.Future[None]:
        """Have a thread call ``copy``."""
        return asyncio.get_running_loop().run_in_executor(self._copying, copy)

    def board_of(self, params: Params) -> _SharedBoard:
        """Return the board whose parameters are ``params``."""
        return next(board for board in self._boards if board.params is params)

    async def admit(self, worker: WorkerProcess) -> None:
        """Open the session on ``worker`` too, and let it join; one that is lost meanwhile does not.

        Raises whatever opening raised there, and FingerprintError.
        """
        piece = self._program.lay_before(worker)
        message = {"do": "open", "session": self.number, "modules": self._modules, **piece}
        with suppress(WorkerLostError, ClosedError):
            answer = await worker.ask(message)
            member = _Member(self, worker, answer["fingerprint"])
            self.crew.join(member, worker.address)
            self._members[worker] = member

    def lose(self, worker: WorkerProcess, reason: str) -> None:
        """Go on without ``worker``."""
        self._members.pop(worker, None)
        self.crew.lose(worker.address, reason)

    def close(self) -> None:
        """Stop all work and refuse more."""
        self._closed = True
        self.crew.close()

    async def aclose(self, workers: Sequence[WorkerProcess]) -> None:
        """Wait until nothing of the session computes any more, and have the workers forget it."""
        self.close()
        async with asyncio.TaskGroup() as group:
            for worker in workers:
                group.create_task(self._dismiss(worker), name=f"close-{worker.address}")
        self._members.clear()
        for board in self._boards:
            board.block.close()
        self._boards.clear()
        self._present = None

    async def _dismiss(self, worker: WorkerProcess) -> None:
        try:
            async with asyncio.timeout(GRACE):
                await worker.ask({"do": "close", "session": self.number})
        except WorkerLostError:
            return
        except TimeoutError:
            worker.lose(f"its work did not end within {GRACE:g} s of being stopped")
            return
        worker.unmap(self._program.number)
        for board in self._boards:
            worker.unmap(board.number)
        if worker in self._members:
            self._members[worker].forget()

    def _free_board(self) -> _SharedBoard:
        for board in self._boards:
            if board is not self._present and not board.readers:
                return board
        self._boards.append(_SharedBoard(self.places, self.new_number()))
        return self._boards[-1]

    def _drop(self, board: _SharedBoard) -> None:
        self._boards.remove(board)
        for worker in self._members:
            worker.unmap(board.number)

    def __repr__(self) -> str:
        return f"<session {self.number} on {self.crew}>"


class _Slip:
    """Some bytes in a block of their own, for workers to read once."""

    def __init__(self, number: int, content: bytes) -> None:
        self.number = number
        self._block = Block.create(len(content))
        self._piece = Piece(0, (len(content),), "|u1")
        self._piece.of(self._block)[...] = np.frombuffer(content, np.uint8)

    def lay_before(self, worker: WorkerProcess) -> Message:
        """Let ``worker`` see it, and return the part of a message that says where it is."""
        worker.map(self.number, self._block, writable=False)
        return {"block": self.number, "program": self._piece.to_json()}


def _write_board(board: Board, params: Params, model_state: Params) -> None:
    write(params, board.params, "params")
    if model_state:
        write(model_state, board.model_state, "model_state")


def importable(modules: set[str]) -> list[str]:
    """Return the names by which a worker imports ``modules``."""
    return sorted(_name_of_main() if module == "__main__" else module for module in modules)


def _name_of_main() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:
        raise ValueError(
            "layers of your own must be in a module that worker processes can import, "
            "got some that are defined in the main script or notebook"
        )
    return str(spec.name)


class ProcessExecutor:
    """Computes in worker processes of this machine; not a ``concurrent.futures.Executor``.

    Processes are the home for programs whose own threads keep the interpreter busy. The workers are started when the
    first session is opened, serve all sessions, and are gone after ``aclose()``; should this process die, whatever the
    way, they go with it. One that dies is replaced, and so is one that is frozen; what it had is computed elsewhere,
    and the bits are the same.

    Layers of your own must be in a module that a worker can import: it has this process's ``sys.path``.

    Args:
        workers: how many processes; by default one for each CPU that this process may use.
        heartbeat: seconds, above 0, after which a worker that does not answer counts as frozen, and is killed. To a
            layer of your own that keeps the interpreter to itself for so long the same happens.
        worker_wait: seconds that work waits while there is no worker at all, before it fails.
        patience: how long a result is waited for before another worker computes it too.

    Cancelling the task that awaits a computation stops it before the next layer's kernel.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        heartbeat: float = HEARTBEAT,
        worker_wait: float = WORKER_WAIT,
        patience: Patience = Patience(),  # noqa: B008 - it is frozen
    ) -> None:
        if sys.platform == "win32":
            raise ExecutorError("processes", "worker processes need a system that can hand descriptors to them")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if not heartbeat > 0:
            raise ValueError(f"heartbeat must be above 0 seconds, got {heartbeat}")
        if not worker_wait >= 0:
            raise ValueError(f"worker_wait must be at least 0 seconds, got {worker_wait}")
        self._workers = workers or usable_cpus()
        self._new_number: Callable[[], int] = partial(next, count())
        self._address = f"processes:{self._workers}"
        self._heartbeat = heartbeat
        self._worker_wait = worker_wait
        self._patience = patience
        # Linux ends a worker with the thread that started it, so that is one which lives as long as the executor.
        self._starting = ThreadPoolExecutor(1, "asynctrain-starting", initializer=leave_interrupts_to_others)
        self._copying = ThreadPoolExecutor(1, "asynctrain-copying", initializer=step_back)
        self._present: dict[WorkerProcess, None] = {}
        self._sessions: set[_ProcessSession] = set()
        self._seats: list[asyncio.Future[None]] = []  # done when a worker has said hello, or will not
        self._service: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._grace = LEAVING

    @property
    def pids(self) -> tuple[int, ...]:
        """The process numbers of the workers that are there."""
        return tuple(worker.pid for worker in self._present)

    @asynccontextmanager
    async def open(self, program: Program, tell: Tell = nobody) -> AsyncIterator[Session]:
        """Open a session for ``program``; leaving it stops its work and waits for the kernels under way.

        Raises:
            ExecutorError: a worker process does not start.
            ValueError: the program is none, or not there.
            ClosedError: the executor is closed.
        """
        self._require_open()
        places = await in_thread(Places, program)
        await self._started()
        async with Crew(self._address, worker_wait=self._worker_wait, patience=self._patience, tell=tell) as crew:
            session = _ProcessSession(program, places, crew, self._workers, self._new_number, self._copying)
            self._sessions.add(session)
            try:
                with first_of_several():
                    async with asyncio.TaskGroup() as group:
                        for worker in self._present:
                            group.create_task(session.admit(worker), name=f"open-{worker.address}")
                yield session
            finally:
                self._sessions.discard(session)
                await session.aclose(list(self._present))

    async def aclose(self, grace: float = GRACE) -> None:
        """Stop all work and end the workers; may be called again. One that is frozen is killed.

        Workers go at once when they are told, whatever they do, so ``grace`` is rarely used up.
        """
        self._grace = min(grace, LEAVING)
        self._closing.set()
        for session in self._sessions:
            session.close()
        if self._service is not None:
            await asyncio.wait([self._service])
        for threads in (self._starting, self._copying):
            await in_thread(threads.shutdown)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = f"{len(self._present)} workers, {len(self._sessions)} sessions"
        return f"<{type(self).__name__} {self._address}, {'closed' if self._closing.is_set() else state}>"

    def _require_open(self) -> None:
        if self._closing.is_set():
            raise self._closed_error()

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the executor {self._address} is closed")

    async def _started(self) -> None:
        """Start the workers, if that is yet to be done, and wait for those that are starting."""
        if self._service is None:
            loop = asyncio.get_running_loop()
            self._seats = [loop.create_future() for _ in range(self._workers)]
            # In no group of a caller's: it outlives the session that happens to be the first. ``aclose`` awaits it.
            self._service = asyncio.create_task(self._serve(), name=self._address)
        seats = list(self._seats)
        await asyncio.wait(seats)
        for seat in seats:
            seat.result()
        self._require_open()

    async def _serve(self) -> None:
        try:
            async with ServingGroup() as group:
                for seat in range(self._workers):
                    group.create_task(self._keep(seat), name=f"{self._address}-{seat}")
                await self._closing.wait()
        finally:
            for future in self._seats:
                _settle(future, self._closed_error())

    async def _keep(self, seat: int) -> None:
        """Keep a worker in this seat: whenever one is lost, start another."""
        pause = 0.0
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                async with self._worker() as worker:
                    _settle(self._seats[seat])
                    await self._let_work(worker)
            except (ExecutorError, OSError) as error:
                _settle(self._seats[seat], error)
            self._seats[seat] = loop.create_future()
            pause = 0.0 if loop.time() > began + HEALTHY else min(2 * pause + 0.1, LONGEST_PAUSE)
            await asyncio.sleep(pause)

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[WorkerProcess]:
        """Own a worker that has said hello; at the end its process is no more."""
        started = await self._start_process()
        worker = WorkerProcess(started, self._heartbeat)
        try:
            try:
                async with asyncio.timeout(START):
                    await worker.ready
            except TimeoutError:
                raise WorkerLostError(worker.address, f"it did not start within {START:g} s") from None
            yield worker
        finally:
            worker.leave("the executor is closed")
            await in_thread(started.end, self._grace)

    async def _start_process(self) -> Started:
        starting = self._starting.submit(start_process)
        try:
            return await asyncio.shield(asyncio.wrap_future(starting))
        except asyncio.CancelledError:
            if not starting.cancel():
                started = await asyncio.wrap_future(starting)
                await in_thread(started.end, self._grace)
            raise

    async def _let_work(self, worker: WorkerProcess) -> None:
        """Let ``worker`` take part in all sessions until it is gone."""
        self._present[worker] = None
        try:
            async with asyncio.TaskGroup() as group:
                for session in self._sessions:
                    group.create_task(self._join(worker, session), name=f"open-{worker.address}")
            await asyncio.wait([worker.gone])
        finally:
            del self._present[worker]
            for session in list(self._sessions):
                session.lose(worker, worker.gone.result() if worker.gone.done() else "the executor is closed")

    async def _join(self, worker: WorkerProcess, session: _ProcessSession) -> None:
        try:
            await session.admit(worker)
        except Exception as error:  # whatever opening raises there: it did not on those before
            worker.lose(f"it could not open the session: {error}")


def _settle(seat: asyncio.Future[None], error: Exception | None = None) -> None:
    if seat.done():
        return
    if error is None:
        seat.set_result(None)
    else:
        seat.set_exception(error)
        seat.exception()  # it may be that nobody awaits it
