"""Several homes as one: a crew of their sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Self

from asynctrain._aio import ServingGroup
from asynctrain.errors import ClosedError
from asynctrain.executors.base import Executor, Session, Tell, nobody
from asynctrain.executors.crew import WORKER_WAIT, Crew
from asynctrain.executors.ledger import Patience
from asynctrain.types import Notice, Program, Speculated

GRACE = 10.0  # seconds


@dataclass(frozen=True, slots=True, eq=False)
class _Home:
    """An executor of a group, and its name there."""

    address: str
    executor: Executor


@dataclass(slots=True, eq=False)
class _Stay:
    """One home's part in one session: until it is told to leave, or the session ends."""

    task: asyncio.Task[None]
    leave: asyncio.Event


@dataclass(slots=True, eq=False)
class _Opened:
    """A session of a group: its crew, and the tasks that keep the homes' sessions open."""

    program: Program
    tell: Tell
    crew: Crew
    tasks: ServingGroup
    stays: dict[str, _Stay] = field(default_factory=dict)

    async def enter(self, homes: Sequence[_Home]) -> None:
        """Open a session on each of ``homes``, side by side, and let them join in their order."""
        loop = asyncio.get_running_loop()
        opened: list[asyncio.Future[Session]] = []
        for home in homes:
            opened.append(loop.create_future())
            leave = asyncio.Event()
            task = self.tasks.create_task(self._stay(home, opened[-1], leave), name=f"home-{home.address}")
            self.stays[home.address] = _Stay(task, leave)
        try:
            for home, session in zip(homes, await asyncio.gather(*opened), strict=True):
                self.crew.join(session, home.address)
        except BaseException:
            for home in homes:
                self.stays.pop(home.address).leave.set()
            raise

    async def leave(self, home: _Home) -> None:
        """Wait until ``home`` has done what it computes, and close its session."""
        stay = self.stays.pop(home.address)
        stay.leave.set()
        await asyncio.wait([stay.task])

    async def _stay(self, home: _Home, opened: asyncio.Future[Session], leave: asyncio.Event) -> None:
        """Keep a session on ``home`` open; what prevents that is raised by who waits for ``opened``."""

        def hear(notice: Notice) -> None:
            self.tell(notice)
            if not isinstance(notice, Speculated):
                self.crew.resize(home.address)

        try:
            async with home.executor.open(self.program, hear) as session:
                opened.set_result(session)
                await leave.wait()
                await self.crew.leave(home.address)
        except Exception as error:
            if opened.done():
                raise
            opened.set_exception(error)


class ExecutorGroup:
    """Several executors as one; not a ``concurrent.futures.Executor``.

    Work goes to the least busy home. What a home loses, or does not return in time, is computed by another, with the
    same bits: only homes with equal numeric fingerprints may be together. A group is an executor itself, and may be in
    another one. It owns its executors, and closes them when it is closed.

        >>> async with at.ExecutorGroup(at.ThreadExecutor(2), at.ProcessExecutor(6)) as executor:
        ...     trainer = at.Trainer(model, optimizer=optimizer, executor=executor)

    Args:
        executors: the homes, at least one; further ones may ``join``.
        worker_wait: seconds that a step waits while there is no home with a worker, before it fails.
        patience: how long a result is waited for before another home computes it too.
    """

    def __init__(
        self,
        *executors: Executor,
        worker_wait: float = WORKER_WAIT,
        patience: Patience = Patience(),  # noqa: B008 - it is frozen
    ) -> None:
        if not executors:
            raise ValueError("executors must be at least one, got none")
        self._worker_wait = worker_wait
        self._patience = patience
        self._numbers = count()
        self._homes = [self._named(executor) for executor in executors]
        self._sessions: set[_Opened] = set()
        self._closed = False

    def _named(self, executor: Executor) -> _Home:
        return _Home(f"{type(executor).__name__}-{next(self._numbers)}", executor)

    @asynccontextmanager
    async def open(self, program: Program, tell: Tell = nobody) -> AsyncIterator[Session]:
        """Open a session on every home; leaving it waits until nothing of it computes any more.

        Raises:
            FingerprintError: two homes would not give the same bits.
            ClosedError: the group is closed.
        """
        self._require_open()
        async with (
            ServingGroup() as tasks,
            Crew(self._address, worker_wait=self._worker_wait, patience=self._patience, tell=tell) as crew,
        ):
            opened = _Opened(program, tell, crew, tasks)
            self._sessions.add(opened)
            try:
                await opened.enter(tuple(self._homes))
                yield crew
            finally:
                self._sessions.discard(opened)

    async def join(self, executor: Executor) -> None:
        """Let ``executor`` take part from now on, in the sessions that are open too.

        Raises:
            FingerprintError: it would not give the bits of the others; then it does not take part.
            ClosedError: the group is closed.
        """
        self._require_open()
        home = self._named(executor)
        self._homes.append(home)  # first, for sessions that are opened meanwhile
        try:
            for session in list(self._sessions):
                await session.enter([home])
        except BaseException:
            self._homes.remove(home)
            raise

    async def leave(self, executor: Executor) -> None:
        """Give ``executor`` no more work and wait until it has done what it has; it is the caller's to close then.

        Raises:
            ValueError: it is not in the group, or is the only one.
        """
        home = next((home for home in self._homes if home.executor is executor), None)
        if home is None or len(self._homes) == 1:
            raise ValueError(
                f"executor must be one of {len(self._homes)} in the group, and not the last, got {executor}"
            )
        self._homes.remove(home)
        for session in list(self._sessions):
            await session.leave(home)

    async def aclose(self, grace: float = GRACE) -> None:
        """Refuse further sessions, stop all work, and close the executors, each within ``grace`` seconds."""
        self._closed = True
        for session in list(self._sessions):
            session.crew.close()
        closing = (home.executor.aclose(grace) for home in self._homes)
        for error in await asyncio.gather(*closing, return_exceptions=True):
            if error is not None:
                raise error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the executor {self._address} is closed")

    @property
    def _address(self) -> str:
        return f"group of {', '.join(home.address for home in self._homes)}"

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._sessions)} sessions"
        return f"<ExecutorGroup, {self._address}, {state}>"
