"""The bookkeeping of a crew, as a pure state machine: who computes what, what is accepted, who is given up.

What happens is told by calling its methods; what is to be done about it is what ``decide`` returns. It reads no clock
(each moment is handed in, in seconds of any clock that does not run backwards), awaits nothing and computes nothing, so
whatever workers do to each other can be tried out here.

A *task* is a piece of work whose result is wanted once. An *attempt* is one worker's go at it. Of all attempts at a
task one result is accepted, the first; since work is pure it does not matter whose.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from statistics import median
from typing import Literal

RECENT = 31  # durations, the median of which tells what a piece of work takes
FATAL = 8  # workers lost at one task: then it is the task that kills them


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a result is waited for before another worker computes it too: ``max(floor, factor * median)`` seconds.

    The median is that of the last durations; before the first of them the floor alone counts.
    """

    floor: float = 2.0
    factor: float = 4.0

    def __post_init__(self) -> None:
        if self.floor <= 0 or self.factor < 1:
            raise ValueError(f"floor must be above 0 and factor at least 1, got {self.floor} and {self.factor}")


class Pace:
    """How long something takes as a rule, and how long to wait for it."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._seconds: deque[float] = deque(maxlen=RECENT)

    def add(self, seconds: float) -> None:
        """Take note of what it took this time."""
        self._seconds.append(seconds)

    @property
    def limit(self) -> float:
        """Seconds after which it is late."""
        usual = median(self._seconds) if self._seconds else 0.0
        return max(self._patience.floor, self._patience.factor * usual)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What became of results and workers.

    Attributes:
        accepted: results that were taken, one for each task.
        late: results dropped because nobody wanted them any longer, or the worker had been given up.
        duplicates: results dropped because another worker's had been accepted before.
        speculated: attempts begun because an earlier one was not back in time.
        lost: workers that were given up.
    """

    accepted: int = 0
    late: int = 0
    duplicates: int = 0
    speculated: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Send:
    """Let the worker at ``address`` have the parameters that were published last."""

    address: str


@dataclass(frozen=True, slots=True)
class Start:
    """Let the worker at ``address`` begin ``attempt`` at ``task``, which ``instead_of`` has not returned in time."""

    attempt: int
    task: int
    address: str
    instead_of: str | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """The result of ``attempt`` is no longer wanted."""

    attempt: int


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The worker at ``address`` has been struck off, for ``reason``."""

    address: str
    reason: str


Trouble = Literal["outdated", "alone", "fatal"]


@dataclass(frozen=True, slots=True)
class Fail:
    """Nobody will compute ``task``.

    ``outdated``: other parameters were published. ``alone``: there was no worker for too long. ``fatal``: too many
    workers were lost at it.
    """

    task: int
    trouble: Trouble


Decision = Send | Start | Stop | GiveUp | Fail


@dataclass(slots=True, eq=False)
class _Worker:
    """One that computes.

    Attributes:
        address: by which it is known while it is there.
        number: counted as they join; settles whose turn it is among equals.
        slots: how many attempts it takes at once.
        edition: of the parameters it holds; 0 for none.
        sent: since when it has been receiving the present ones; None where it is not.
        attempts: that it has begun and not ended.
        leaving: it gets no more work.
        gone: what it still returns is dropped.
        strikes: deadlines that it let pass since it last returned something.
        benched: the edition from which on it gets work again.
    """

    address: str
    number: int
    slots: int
    edition: int = 0
    sent: float | None = None
    attempts: set[int] = field(default_factory=set)
    leaving: bool = False
    gone: bool = False
    strikes: int = 0
    benched: int = 0

    @property
    def is_able(self) -> bool:
        return self.slots > 0 and not self.leaving

    @property
    def load(self) -> tuple[float, int]:
        """Sorts first who is to have the next attempt: the least busy, the oldest."""
        return len(self.attempts) / self.slots, self.number


@dataclass(slots=True)
class _Task:
    """A piece of work that is wanted.

    Attributes:
        edition: of the parameters it is wanted with.
        attempts: under way, the newest last.
        due: when the newest should be back.
        overdue: it is not, and another is to be made as soon as somebody is free.
        losses: workers that were lost at it.
    """

    edition: int
    attempts: list[int] = field(default_factory=list)
    due: float = 0.0
    overdue: bool = False
    losses: int = 0


@dataclass(slots=True)
class _Attempt:
    """One worker's go at a task. superseded: another's result was accepted."""

    task: int
    worker: _Worker
    started: float
    superseded: bool = False


class Ledger:
    """Decides for a crew of workers.

    Whoever has the parameters and a free slot gets the oldest waiting task, the least busy worker first. A task that is
    not back in time is given to another worker too. A worker that lets a deadline pass sits out 2, 4, 8, ... editions,
    unless there is nobody else, until it returns something in time to be accepted.

    Args:
        worker_wait: seconds that tasks wait while there is no worker at all, and that a worker may take to receive
            parameters.
        patience: how long a result is waited for.
    """

    def __init__(self, worker_wait: float, patience: Patience) -> None:
        self._worker_wait = worker_wait
        self._pace = Pace(patience)
        self._numbers = count(1)
        self._edition = 0
        self._workers: dict[str, _Worker] = {}
        self._tasks: dict[int, _Task] = {}
        self._waiting: list[int] = []  # tasks without an attempt, the oldest first
        self._attempts: dict[int, _Attempt] = {}
        self._alone_since: float | None = None
        self._decided: list[Decision] = []
        self._counts: Counter[str] = Counter()

    # What is so

    @property
    def statistics(self) -> Statistics:
        """What became of results and workers so far."""
        return Statistics(**self._counts)

    @property
    def slots(self) -> int:
        """How many attempts all workers take at once."""
        return sum(worker.slots for worker in self._workers.values() if worker.is_able)

    @property
    def receiving(self) -> bool:
        """Whether a worker has yet to receive the parameters that were published last."""
        return any(worker.sent is not None for worker in self._workers.values())

    @property
    def patience(self) -> float:
        """Seconds that an attempt may take."""
        return self._pace.limit

    def is_idle(self, address: str) -> bool:
        """Return whether the worker at ``address`` computes nothing, or is not there."""
        return address not in self._workers or not self._workers[address].attempts

    def deadline(self) -> float | None:
        """Return the next moment at which ``decide`` has something new to say even if nothing happens until then."""
        return min(self._deadlines(), default=None)

    def _deadlines(self) -> Iterator[float]:
        for worker in self._workers.values():
            if worker.sent is not None:
                yield worker.sent + self._worker_wait
        for task in self._tasks.values():
            if task.attempts and not task.overdue:
                yield task.due
        if self._alone_since is not None:
            yield self._alone_since + self._worker_wait

    # What happens

    def join(self, address: str, slots: int) -> None:
        """A worker is there, and has no parameters yet.

        Raises:
            ValueError: there is one at that address.
        """
        if address in self._workers:
            raise ValueError(f"address must be a new one for a worker that joins, there is one at {address}")
        self._workers[address] = _Worker(address, next(self._numbers), slots)

    def resize(self, address: str, slots: int) -> None:
        """The worker at ``address``, if it is there, takes ``slots`` attempts at once from now on, perhaps none."""
        if address in self._workers:
            self._workers[address].slots = slots

    def leave(self, address: str) -> None:
        """The worker at ``address``, if it is there, gets no more work."""
        if address in self._workers:
            self._workers[address].leaving = True

    def lose(self, address: str) -> None:
        """The worker at ``address``, if it is there, is gone, with what it computed."""
        if address in self._workers:
            self._strike_off(self._workers[address])

    def left(self, address: str) -> None:
        """The worker at ``address``, if it is there, has left; it was idle."""
        if address in self._workers:
            self._workers.pop(address).gone = True

    def publish(self) -> None:
        """There are new parameters; whoever has not received the last ones by now is a version too far behind."""
        for worker in [worker for worker in self._workers.values() if worker.sent is not None]:
            self._give_up(worker, "it is more than one version of the parameters behind")
        self._edition += 1

    def received(self, address: str) -> None:
        """The worker at ``address`` has what it was sent."""
        if address in self._workers:
            self._workers[address].sent = None
            self._workers[address].edition = self._edition

    def submit(self) -> int:
        """A result is wanted, with the parameters that were published last; return the number of the task."""
        number = next(self._numbers)
        self._tasks[number] = _Task(self._edition)
        self._waiting.append(number)
        return number

    def withdraw(self, task: int) -> None:
        """The result of ``task`` is no longer wanted, if it was."""
        if self._tasks.get(task) is not None:
            self._settle(task)

    def returned(self, attempt: int, now: float) -> bool:
        """An attempt has an outcome, be it an error of the work itself; return whether it is the one that counts."""
        ended = self._attempts.pop(attempt)
        ended.worker.attempts.discard(attempt)
        if ended.worker.gone or ended.task not in self._tasks:
            self._counts["duplicates" if ended.superseded else "late"] += 1
            return False
        ended.worker.strikes = ended.worker.benched = 0
        self._pace.add(now - ended.started)
        self._counts["accepted"] += 1
        self._tasks[ended.task].attempts.remove(attempt)
        for other in self._tasks[ended.task].attempts:
            self._attempts[other].superseded = True
        self._settle(ended.task)
        return True

    def ended(self, attempt: int) -> None:
        """An attempt is over, if it was not yet, without an outcome: it was stopped, or came to nothing."""
        ended = self._attempts.pop(attempt, None)
        if ended is None:
            return
        ended.worker.attempts.discard(attempt)
        if not ended.worker.gone and ended.task in self._tasks:
            self._detach(ended.task, attempt)

    # What is to be done

    def decide(self, now: float) -> list[Decision]:
        """Return what is to be done, in this order. To be called after whatever happened, and at the ``deadline``."""
        self._give_up_those_that_do_not_receive(now)
        self._send(now)
        self._fail_what_is_hopeless(now)
        self._notice_what_is_overdue(now)
        self._start(now)
        decided, self._decided = self._decided, []
        return decided

    def _give_up_those_that_do_not_receive(self, now: float) -> None:
        for worker in list(self._workers.values()):
            if worker.sent is not None and now >= worker.sent + self._worker_wait:
                self._give_up(worker, f"it did not receive the parameters within {self._worker_wait:g} s")

    def _send(self, now: float) -> None:
        for worker in self._workers.values():
            if worker.edition < self._edition and worker.sent is None and not worker.leaving:
                worker.sent = now
                self._decided.append(Send(worker.address))

    def _fail_what_is_hopeless(self, now: float) -> None:
        for task in list(self._waiting):
            if self._tasks[task].edition != self._edition:
                self._fail(task, "outdated")
            elif self._tasks[task].losses >= FATAL:
                self._fail(task, "fatal")
        if not self._waiting or any(worker.is_able for worker in self._workers.values()):
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now >= self._alone_since + self._worker_wait:
            for task in list(self._waiting):
                self._fail(task, "alone")
            self._alone_since = None

    def _notice_what_is_overdue(self, now: float) -> None:
        for task in self._tasks.values():
            if not task.attempts or task.overdue:
                continue
            worker = self._attempts[task.attempts[-1]].worker
            if now >= task.due:
                worker.strikes += 1
                worker.benched = self._edition + 2**worker.strikes
            task.overdue = now >= task.due or not worker.slots

    def _start(self, now: float) -> None:
        while self._waiting and (worker := self._free_worker()):
            self._begin(self._waiting.pop(0), worker, now)
        for number, task in self._tasks.items():
            if task.overdue and task.edition == self._edition and (worker := self._free_worker(task)):
                self._counts["speculated"] += 1
                self._begin(number, worker, now, self._attempts[task.attempts[-1]].worker.address)

    def _free_worker(self, task: _Task | None = None) -> _Worker | None:
        """Return who is to have the next attempt, one that has none at ``task``."""
        able = [worker for worker in self._workers.values() if worker.is_able]
        prompt = [worker for worker in able if worker.benched <= self._edition] or able
        busy = set() if task is None else {self._attempts[attempt].worker.number for attempt in task.attempts}
        free = [
            worker
            for worker in prompt
            if worker.edition == self._edition and len(worker.attempts) < worker.slots and worker.number not in busy
        ]
        return min(free, key=lambda worker: worker.load, default=None)

    def _begin(self, number: int, worker: _Worker, now: float, instead_of: str | None = None) -> None:
        attempt = next(self._numbers)
        self._attempts[attempt] = _Attempt(number, worker, now)
        worker.attempts.add(attempt)
        task = self._tasks[number]
        task.attempts.append(attempt)
        task.due = now + self.patience
        task.overdue = False
        self._decided.append(Start(attempt, number, worker.address, instead_of))

    # How it is written down

    def _settle(self, task: int) -> None:
        """Take a task off the ledger and stop what is under way for it."""
        for attempt in self._tasks.pop(task).attempts:
            self._decided.append(Stop(attempt))
        if task in self._waiting:
            self._waiting.remove(task)

    def _fail(self, task: int, trouble: Trouble) -> None:
        self._settle(task)
        self._decided.append(Fail(task, trouble))

    def _give_up(self, worker: _Worker, reason: str) -> None:
        self._decided.append(GiveUp(worker.address, reason))
        self._strike_off(worker)

    def _strike_off(self, worker: _Worker) -> None:
        """Take a worker off the ledger; what it computes is to be computed by others."""
        del self._workers[worker.address]
        worker.gone = True
        self._counts["lost"] += 1
        for attempt in sorted(worker.attempts):
            self._decided.append(Stop(attempt))
            task = self._tasks.get(self._attempts[attempt].task)
            if task is not None and attempt in task.attempts:
                task.losses += 1
                self._detach(self._attempts[attempt].task, attempt)

    def _detach(self, number: int, attempt: int) -> None:
        """Let a task go on without ``attempt``: with the others that are under way, or back in the row."""
        task = self._tasks[number]
        task.attempts.remove(attempt)
        if not task.attempts:
            task.overdue = False
            insort(self._waiting, number)
