"""One piece of work on a Dask cluster, attempted by as many workers as it takes until the first has a result."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import CancelledError as Withdrawn
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import dask.config
from distributed import Future
from distributed.utils_comm import gather_from_workers

from asynctrain._aio import ServingGroup, first_of_several
from asynctrain.errors import ExecutorError
from asynctrain.executors.base import Tell
from asynctrain.executors.dask import worker as remote_side
from asynctrain.executors.dask.link import LOST, Link
from asynctrain.executors.dask.parameters import Parameters
from asynctrain.executors.dask.roster import ANSWER, Roster
from asynctrain.executors.dask.worker import Foreign, Outcome
from asynctrain.executors.ledger import FATAL, Pace, Patience
from asynctrain.types import ForwardWork, GradientWork, Speculated

PAUSE = 0.05  # seconds before a result is asked for again that was not where Dask thought
PIXELS_GO_ALONG = {"distributed.admin.large-graph-warning-threshold": "1TB"}  # with the task, so that none are lost

Work = GradientWork | ForwardWork


class Errands:
    """Gives work to Dask's scheduler, and again where that comes to nothing."""

    def __init__(self, link: Link, roster: Roster, parameters: Parameters, patience: Patience, tell: Tell) -> None:
        self.link = link
        self.roster = roster
        self.parameters = parameters
        self.pace = Pace(patience)
        self.tell = tell
        self._at_work: set[Future[Any]] = set()  # whose results are awaited

    async def outcome(self, work: Work, version: int) -> Outcome:
        """Return the first result of ``work``; what others compute of the same is released."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        with first_of_several():
            async with ServingGroup() as tasks:
                outcome = await _Errand(self, work, version, tasks).outcome()
        self.pace.add(loop.time() - start)
        return outcome

    def submit(self, work: Work, edition: Future[Any], workers: list[str] | None) -> Future[Any]:
        """Give ``work`` to Dask, for any of ``workers``, or of all it has."""
        with dask.config.set(PIXELS_GO_ALONG):
            future = self.link.client.submit(
                remote_side.compute, edition, work, key=self.link.new_key(), workers=workers, pure=False
            )
        self._at_work.add(future)
        return future

    def let_go(self, future: Future[Any]) -> None:
        """Have no more use for a result: where it is not begun it will not be, where it is there it is forgotten."""
        self._at_work.discard(future)
        future.release()

    async def cancel(self, grace: float) -> None:
        """Begin nothing more of what was submitted."""
        with suppress(*LOST):
            await self.link.asked(self.link.client.cancel(list(self._at_work)), grace)


@dataclass(frozen=True, eq=False, slots=True)
class _Attempt:
    """A go at a piece of work. permitted: the workers that may take it; None for all of Dask's."""

    future: Future[Any]
    permitted: list[str] | None


class _Errand:
    """What is under way for one piece of work."""

    def __init__(self, office: Errands, work: Work, version: int, tasks: ServingGroup) -> None:
        self._office = office
        self._link = office.link
        self._roster = office.roster
        self._parameters = office.parameters
        self._work = work
        self._version = version
        self._tasks = tasks
        self._attempts: dict[asyncio.Task[Outcome | None], _Attempt] = {}
        self._avoided: set[str] = set()  # who has let this work wait
        self._losses = 0

    async def outcome(self) -> Outcome:
        while True:
            if not self._attempts:
                await self._begin()
            limit = self._office.pace.limit
            done, _ = await asyncio.wait(self._attempts, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del self._attempts[task]
                if (outcome := task.result()) is not None:
                    return outcome
            if not done:
                await self._begin_elsewhere()

    async def _begin(self) -> None:
        await self._roster.somebody()
        published = await self._parameters.held()
        self._require_use()
        if self._roster.permitted(self._avoided) == []:
            self._avoided.clear()
        permitted = self._roster.permitted(self._avoided) or None
        future = self._office.submit(self._work, published.futures[0], permitted)
        task = self._tasks.create_task(self._attempt(future), name=f"attempt {future.key}")
        task.add_done_callback(lambda _: self._office.let_go(future))
        self._attempts[task] = _Attempt(future, permitted)

    def _require_use(self) -> None:
        """Raise where nobody can have any use of the result."""
        self._parameters.require(self._version)
        self._link.require_connection()

    async def _attempt(self, future: Future[Any]) -> Outcome | None:
        """Return what came of ``future``; None where it was lost and is to be attempted again."""
        try:
            outcome = await self._fetched(future)
        except Exception as error:
            self._lost(error)
            return None
        if isinstance(outcome.value, Foreign):
            self._roster.refuse(outcome.address, outcome.value.error)
            return None
        self._roster.trust(outcome.address)
        return outcome

    def _lost(self, error: Exception) -> None:
        self._require_use()
        if not isinstance(error, LOST):
            raise ExecutorError(self._link.address, f"Dask could not run the work: {error!r}") from error
        self._losses += 1
        if self._losses >= FATAL:
            raise ExecutorError(self._link.address, f"the work was lost {FATAL} times with its worker") from error

    # The result

    async def _fetched(self, future: Future[Any]) -> Outcome:
        """Return the result of ``future``, as soon as one of those that may have it hands it over.

        Not by Dask's ``gather``: that asks for several keys at once, so that all wait for a worker that is frozen, and
        are cancelled where one is; and it allows five of such waits.
        """
        patience = self._office.pace.limit
        while True:
            if (error := await future.exception()) is not None:  # it waits until something has come of it
                raise error
            if future.cancelled():
                raise Withdrawn
            with suppress(TimeoutError):  # its worker died, perhaps: Dask computes it again
                if (outcome := await self._link.asked(self._handed_over(future.key), patience)) is not None:
                    return outcome
                await asyncio.sleep(PAUSE)
            patience *= 2  # or its way is long

    async def _handed_over(self, key: Any) -> Outcome | None:
        """Return the result that Dask knows by ``key``; None where nobody has it."""
        client, scheduler = self._link.client, self._link.scheduler
        data: Any
        if client.direct_to_workers:
            data, *_ = await gather_from_workers(await scheduler.who_has(keys=[key]), client.rpc)
        else:
            data = (await scheduler.gather(keys=[key])).get("data", {})
        outcome: Outcome | None = data.get(key)
        return outcome

    # What is late

    async def _begin_elsewhere(self) -> None:
        """Give the work, which is late, to a worker that has not let it wait, if there is one."""
        self._link.require_connection()
        await self._roster.somebody()
        with suppress(*LOST):
            places = await self._link.asked(self._whereabouts(), ANSWER)
            late = set(places.values())
            if await self._roster.examine(late - self._avoided, self._office.pace.limit):
                self._parameters.renew()  # lest Dask lets another worker fetch them from one that is silent
            self._avoided |= late
            if self._roster.permitted(self._avoided) == [] or self._is_awaited_elsewhere(places):
                return
            for address in sorted(late):
                self._office.tell(self._speculated(address))
            await self._begin()

    def _is_awaited_elsewhere(self, places: Mapping[Any, str]) -> bool:
        """Return whether an attempt that is at none of the ``places`` yet may still come to one."""
        return any(
            attempt.future.key not in places
            and attempt.future.status in ("pending", "finished")
            and (attempt.permitted is None or not self._roster.workers.keys().isdisjoint(attempt.permitted))
            for attempt in self._attempts.values()
        )

    async def _whereabouts(self) -> dict[str, str]:
        """Return the address of the worker that computes each attempt, or has its result."""
        client, futures = self._link.client, [attempt.future for attempt in self._attempts.values()]
        keys = {future.key for future in futures}
        places = {key: holders[0] for key, holders in (await client.who_has(futures)).items() if holders}
        for address, at_work in (await client.processing()).items():
            places.update(dict.fromkeys(keys.intersection(at_work), address))
        return places

    def _speculated(self, late: str) -> Speculated:
        microbatch = self._work.microbatch if isinstance(self._work, GradientWork) else None
        return Speculated(self._link.address, late, self._version, microbatch)
