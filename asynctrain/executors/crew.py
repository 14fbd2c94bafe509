"""A crew: several sessions that work as one, any of which may come, go, freeze or fail while a step is under way.

The ledger decides; this module does. It knows the members, lets them begin what they are to do, and hands results on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, overload

from asynctrain._aio import ServingGroup, finished
from asynctrain.errors import ClosedError, ExecutorError, StaleParametersError, WorkerLostError
from asynctrain.executors.base import Tell, nobody
from asynctrain.executors.fingerprint import require_same
from asynctrain.executors.ledger import (
    FATAL,
    Decision,
    Fail,
    GiveUp,
    Ledger,
    Patience,
    Send,
    Start,
    Statistics,
    Stop,
)
from asynctrain.types import (
    ForwardResult,
    ForwardWork,
    GradientResult,
    GradientWork,
    Params,
    Speculated,
    WorkerJoined,
    WorkerLost,
)

T = TypeVar("T")

WORKER_WAIT = 30.0  # seconds

_Result = GradientResult | ForwardResult

ELSEWHERE = WorkerLostError, ClosedError, StaleParametersError  # the home has failed, not the work


class MemberSession(Protocol):
    """What takes part in a crew: a ``Session``, or what is one but for futures in the place of coroutines.

    Of those no task has to be made: what is asked for is begun in that very call. One that owns something which can be
    killed has a method ``kill()``, called when it is given up.
    """

    @property
    def slots(self) -> int:
        """As a ``Session`` has it."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """As a ``Session`` has it."""
        ...

    def broadcast(self, params: Params, model_state: Params, version: int) -> Awaitable[None]:
        """As a ``Session`` does."""
        ...

    @overload
    def compute(self, work: GradientWork, version: int) -> Awaitable[GradientResult]: ...
    @overload
    def compute(self, work: ForwardWork, version: int) -> Awaitable[ForwardResult]: ...
    def compute(self, work: GradientWork | ForwardWork, version: int) -> Awaitable[GradientResult | ForwardResult]:
        """As a ``Session`` does."""
        ...


@dataclass(frozen=True, slots=True)
class _Parameters:
    """What was broadcast last."""

    params: Params
    model_state: Params
    version: int


@dataclass(slots=True, eq=False)
class _Member:
    """A session that takes part; ``sending`` gives it the parameters."""

    address: str
    session: MemberSession
    sending: asyncio.Future[Any] | None = None


@dataclass(slots=True, eq=False)
class _Job:
    """A piece of work whose result is awaited."""

    work: GradientWork | ForwardWork
    version: int
    outcome: _Outcome


class _Outcome(asyncio.Future[_Result]):
    """What a caller of ``compute`` awaits. Cancelling it stops the attempts in that very call.

    A task that is cancelled passes the call on, synchronously, to what it awaits; so from the task that trains down to
    the kernels' stop flags no turn of the loop goes by.
    """

    def __init__(self, crew: Crew) -> None:
        super().__init__()
        self._crew = crew
        self.task = 0  # its number in the ledger

    def cancel(self, msg: Any | None = None) -> bool:
        if not self.done():
            self._crew.withdraw(self.task)
        return super().cancel(msg)


class Crew:
    """Members that work as one session; itself a session, so crews nest.

    Args:
        address: of the whole, for messages.
        worker_wait: seconds that work waits while there is no member, before it fails with ``WorkerLostError``.
        patience: how long a result is waited for before another member computes it too.
        tell: hears of members that come and go, and of work that is computed twice.

    It is opened with ``async with``; leaving that stops everything and waits for it. Members stay their owner's to
    close.
    """

    def __init__(
        self,
        address: str,
        *,
        worker_wait: float = WORKER_WAIT,
        patience: Patience = Patience(),  # noqa: B008 - it is frozen
        tell: Tell = nobody,
    ) -> None:
        if worker_wait < 0:
            raise ValueError(f"worker_wait must be at least 0 seconds, got {worker_wait}")
        self._address = address
        self._worker_wait = worker_wait
        self._tell = tell
        self._ledger = Ledger(worker_wait, patience)
        self._tasks = ServingGroup()
        self._members: dict[str, _Member] = {}
        self._jobs: dict[int, _Job] = {}
        self._attempts: dict[int, asyncio.Future[_Result | Exception]] = {}  # those that nobody has stopped
        self._parameters: _Parameters | None = None
        self._fingerprint: Mapping[str, str] | None = None
        self._lost: WorkerLost | None = None  # the last
        self._changed = asyncio.Event()  # a member has less to do than before
        self._timer: asyncio.TimerHandle | None = None
        self._acting = self._again = False
        self._closed = False

    # What is so

    @property
    def slots(self) -> int:
        """How many pieces of work all members compute at once."""
        return self._ledger.slots

    @property
    def statistics(self) -> Statistics:
        """What became of results and members so far."""
        return self._ledger.statistics

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The numeric fingerprint that all members have in common; ``WorkerLostError`` before the first has joined."""
        if self._fingerprint is None:
            raise WorkerLostError(self._address, "no worker has joined yet")
        return self._fingerprint

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where its members are, the oldest first."""
        return tuple(self._members)

    # Members

    def join(self, member: MemberSession, address: str) -> None:
        """Let ``member`` take part from now on; it gets the present parameters before its first work.

        Raises:
            FingerprintError: it would not give the bits of those before it.
            ValueError: there is a member at ``address``.
            ClosedError: the crew is closed.
        """
        self._require_open()
        require_same(self._fingerprint or member.fingerprint, member.fingerprint)
        self._ledger.join(address, member.slots)
        self._fingerprint = dict(member.fingerprint)
        self._members[address] = _Member(address, member)
        self._tell(WorkerJoined(address, member.slots))
        self._act()

    def resize(self, address: str) -> None:
        """Read again how many ``slots`` the member at ``address`` has, if it is there."""
        if address in self._members:
            self._ledger.resize(address, self._members[address].session.slots)
            self._act()

    async def leave(self, address: str) -> None:
        """Give the member at ``address``, if it is there, no more work, and wait until it has done what it has."""
        member = self._members.get(address)
        self._ledger.leave(address)
        self._act()
        while not self._ledger.is_idle(address):
            await self._change()
        if member is not None and self._members.get(address) is member:
            self._ledger.left(address)
            self._part(member, "it left, as it was asked to", kill=False)
            self._act()

    def lose(self, address: str, reason: str) -> None:
        """Give up the member at ``address``, if it is there: others do what it has, and what it returns is dropped."""
        member = self._members.get(address)
        if member is not None and not self._closed:
            self._ledger.lose(address)
            self._part(member, reason)
            self._act()

    # The session

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        """Begin to send the parameters to all members; those that are slow to take the ones before are waited for.

        A member that has not taken those within the patience that results have is given up: it is more than one version
        behind.
        """
        self._require_open()
        if self._ledger.receiving:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._ledger.patience):
                    while self._ledger.receiving:
                        await self._change()
        self._require_open()
        self._parameters = _Parameters(params, model_state, version)
        self._ledger.publish()
        self._act()

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        """Return the result of ``work``, whichever member has it first.

        Raises:
            StaleParametersError: other parameters were broadcast last.
            WorkerLostError: there was no member for ``worker_wait`` seconds.
            ClosedError: the crew is closed.
            ExecutorError: the work was the end of too many members.
        """
        self._require_open()
        have = self._parameters.version if self._parameters else None
        if have != version:
            raise StaleParametersError(self._address, have, version)
        outcome = _Outcome(self)
        outcome.task = self._ledger.submit()
        self._jobs[outcome.task] = _Job(work, version, outcome)
        self._act()
        try:
            return await outcome
        except asyncio.CancelledError:
            if outcome.done() and not outcome.cancelled() and outcome.exception() is None:
                _drop(outcome.result())  # it came in the very turn in which the caller was cancelled
            raise

    def withdraw(self, task: int) -> None:
        """Stop what is computed for ``task``; for the outcome that was cancelled."""
        self._jobs.pop(task, None)
        if not self._closed:
            self._ledger.withdraw(task)
            self._act()

    # Its life

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        try:
            await self._tasks.__aexit__(kind, error, traceback)
        finally:
            self._members.clear()  # whoever still refers to the session keeps no worker, nor a connection to one

    def close(self) -> None:
        """Stop everything at once: what is awaited fails with ``ClosedError``, and so does what is asked later."""
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for job in self._jobs.values():
            if not job.outcome.done():
                job.outcome.set_exception(self._closed_error())
        self._jobs.clear()
        self._parameters = None  # they may be large, and others may still refer to the session
        for attempt in self._attempts.values():
            attempt.cancel()
        for member in self._members.values():
            if member.sending is not None:
                member.sending.cancel()
        self._changed.set()

    def _require_open(self) -> None:
        if self._closed:
            raise self._closed_error()

    def _closed_error(self) -> ClosedError:
        return ClosedError(f"the session on {self._address} is closed")

    # What it does

    def _act(self) -> None:
        """Do what the ledger has decided, and come back at its deadline."""
        if self._acting or self._closed:
            self._again = True  # what is done here tells others, who may ask for more: that comes after it
            return
        self._acting = self._again = True
        try:
            while self._again:
                self._again = False
                for decision in self._ledger.decide(asyncio.get_running_loop().time()):
                    self._do(decision)
        finally:
            self._acting = False
        self._arm()

    def _arm(self) -> None:
        """Have one timer for the nearest deadline; one that is too early stays, as deadlines mostly move away."""
        deadline = self._ledger.deadline()
        if self._timer is not None:
            if deadline is not None and self._timer.when() <= deadline:
                return
            self._timer.cancel()
            self._timer = None
        if deadline is not None and not self._closed:
            self._timer = asyncio.get_running_loop().call_at(deadline, self._time_out)

    def _time_out(self) -> None:
        self._timer = None
        self._act()

    def _do(self, decision: Decision) -> None:
        match decision:
            case Send(address):
                self._send(address)
            case Start():
                self._start(decision)
            case Stop(number):
                attempt = self._attempts.pop(number, None)
                if attempt is not None:
                    attempt.cancel()
            case GiveUp(address, reason):
                if address in self._members:
                    self._part(self._members[address], reason)
            case Fail():
                self._fail(decision)

    def _send(self, address: str) -> None:
        member, sent = self._members.get(address), self._parameters
        if member is None or sent is None:
            return
        broadcast = partial(member.session.broadcast, sent.params, sent.model_state, sent.version)
        member.sending = self._begun(broadcast, f"broadcast-{address}")
        if member.sending.done():
            self._sent(member, member.sending)
        else:
            member.sending.add_done_callback(partial(self._sent, member))

    def _sent(self, member: _Member, sending: asyncio.Future[Exception | None]) -> None:
        """Enter that a member has taken the parameters, or give it up."""
        if sending.cancelled() or not self._is_here(member):
            return
        if (error := _outcome(sending)) is not None:
            self.lose(member.address, f"it did not take the parameters: {error}")
            return
        self._ledger.received(member.address)
        self._changed.set()
        self._act()

    def _start(self, start: Start) -> None:
        job, member = self._jobs.get(start.task), self._members.get(start.address)
        if job is None or member is None:  # both were there when this was decided, in this very call
            self._ledger.ended(start.attempt)
            return
        compute: Callable[[], Awaitable[_Result]] = partial(member.session.compute, job.work, job.version)
        attempt = self._begun(compute, f"attempt-{start.attempt}-{start.address}")
        self._attempts[start.attempt] = attempt
        attempt.add_done_callback(partial(self._ended, start, member))
        if start.instead_of is not None:
            microbatch = job.work.microbatch if isinstance(job.work, GradientWork) else None
            self._tell(Speculated(start.address, start.instead_of, job.version, microbatch))

    def _begun(self, method: Callable[[], Awaitable[T]], name: str) -> asyncio.Future[T | Exception]:
        """Call a method of a member, and return what will come of it, be it an error as ``_outcome`` finds it."""
        try:
            begun = method()
        except Exception as error:
            return finished(error)
        if isinstance(begun, asyncio.Future):
            return begun
        task = self._tasks.create_task(_tried(begun), name=name)
        if isinstance(begun, Coroutine):
            task.add_done_callback(lambda _: begun.close())  # where it was stopped before it began
        return task

    def _ended(self, start: Start, member: _Member, attempt: asyncio.Future[_Result | Exception]) -> None:
        """Enter that an attempt is over, be it that it was stopped before it began."""
        stopped = self._attempts.pop(start.attempt, None) is None
        if attempt.cancelled():
            if not stopped:
                self._lose(member, "its work was cancelled there")
        elif isinstance(outcome := _outcome(attempt), ELSEWHERE):
            self._lose(member, outcome.reason if isinstance(outcome, ExecutorError) else str(outcome))
        else:
            self._returned(start, outcome)
            return
        self._ledger.ended(start.attempt)
        self._changed.set()
        self._act()

    def _returned(self, start: Start, outcome: _Result | Exception) -> None:
        """Enter what an attempt has returned, and hand it on if it is what counts."""
        counts = self._ledger.returned(start.attempt, asyncio.get_running_loop().time())
        self._changed.set()
        self._act()
        job = self._jobs.pop(start.task, None) if counts else None
        if job is None:
            _drop(outcome)
        elif isinstance(outcome, Exception):
            job.outcome.set_exception(outcome)
        else:
            job.outcome.set_result(outcome)

    def _fail(self, fail: Fail) -> None:
        job = self._jobs.pop(fail.task, None)
        if job is None:
            return
        have = self._parameters.version if self._parameters else None
        errors: dict[str, ExecutorError] = {
            "outdated": StaleParametersError(self._address, have, job.version),
            "alone": WorkerLostError(self._address, f"there was no worker for {self._worker_wait:g} s{self._last()}"),
            "fatal": ExecutorError(self._address, f"{FATAL} workers were lost at the same work{self._last()}"),
        }
        job.outcome.set_exception(errors[fail.trouble])

    def _last(self) -> str:
        return "" if self._lost is None else f"; the last one lost was {self._lost.address}: {self._lost.reason}"

    def _lose(self, member: _Member, reason: str) -> None:
        if self._is_here(member):
            self.lose(member.address, reason)

    def _part(self, member: _Member, reason: str, *, kill: bool = True) -> None:
        """Let a member go that is off the ledger."""
        del self._members[member.address]
        if member.sending is not None:
            member.sending.cancel()
        killing = getattr(member.session, "kill", None)
        if kill and killing is not None:
            killing()
        self._lost = WorkerLost(member.address, reason)
        self._changed.set()
        self._tell(self._lost)

    def _is_here(self, member: _Member) -> bool:
        return self._members.get(member.address) is member

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._members)} members, {len(self._jobs)} pieces of work"
        return f"<Crew {self._address}, {state}>"


async def _tried(method: Awaitable[T]) -> T | Exception:
    """Return what ``method`` does, an error too: raised in a task of a group, that would end all the others."""
    try:
        return await method
    except Exception as error:
        return error


def _outcome(future: asyncio.Future[T]) -> T | Exception:
    """Return what has come of a future, be it an error that it raises or one that it returns."""
    error = future.exception()
    return error if isinstance(error, Exception) else future.result()


def _drop(outcome: _Result | Exception) -> None:
    """Give back the arrays of a result that nobody takes."""
    if isinstance(outcome, GradientResult):
        outcome.release()
