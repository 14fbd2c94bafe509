"""How parameters come to the workers of a Dask cluster, and are held there.

They are scattered to each worker by itself, under one key. Dask's own broadcast would be one call, but where a worker
dies during it, it tries that one for ever, and one that is frozen keeps all others of the cluster waiting.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from distributed import Future

from asynctrain._aio import ServingGroup
from asynctrain.errors import StaleParametersError, WorkerLostError
from asynctrain.executors.dask.link import GONE, Link
from asynctrain.executors.dask.roster import Roster, Worker
from asynctrain.executors.dask.worker import Edition
from asynctrain.executors.ledger import Pace, Patience


@dataclass(eq=False, slots=True)
class Published:
    """The parameters that were broadcast last.

    Attributes:
        version: that was broadcast.
        edition: what is sent to the workers.
        key: by which Dask knows it.
        futures: what keeps it on the workers, one for each that has received it.
        holders: their addresses.
    """

    version: int
    edition: Edition
    key: str
    futures: list[Future[Any]] = field(default_factory=list)
    holders: set[str] = field(default_factory=set)

    @property
    def is_lost(self) -> bool:
        """Whether all workers that had received it are gone."""
        return bool(self.futures) and all(future.status != "finished" for future in self.futures)

    def release(self) -> None:
        """Let the workers forget it."""
        for future in self.futures:
            future.release()
        self.futures.clear()


class Parameters:
    """Sends what is published to all workers, also to those that come later."""

    def __init__(self, link: Link, roster: Roster, patience: Patience, tasks: ServingGroup) -> None:
        self._link = link
        self._roster = roster
        self._pace = Pace(patience)
        self._tasks = tasks
        self._published: Published | None = None
        self._receiving: set[Worker] = set()

    @property
    def version(self) -> int | None:
        """Which was published last."""
        return self._published.version if self._published else None

    def require(self, version: int) -> None:
        """Raise ``StaleParametersError`` where other parameters than those of ``version`` were published last."""
        self._link.require_open()
        if self.version != version:
            raise StaleParametersError(self._link.address, self.version, version)

    async def publish(self, version: int, edition: Edition) -> None:
        """Send ``edition`` to all workers; who has not taken it in time is not waited for.

        Raises ``WorkerLostError`` where no worker took it within ``worker_wait`` seconds, or the usual if that is more.
        """
        loop = asyncio.get_running_loop()
        start = loop.time()
        self._replace(version, edition)
        if await self._link.until(self._is_everywhere, self._pace.limit):
            self._pace.add(loop.time() - start)
        await self.held()

    def renew(self) -> None:
        """Send them again, under another key: workers that had them are gone, or as good as gone."""
        if self._published is not None:
            self._replace(self._published.version, self._published.edition)

    async def held(self) -> Published:
        """Return what was published last, once a worker has it; where all that had it are gone, it is sent again."""
        link = self._link
        if self._published is not None and self._published.is_lost:
            self.renew()

        await link.until(lambda: link.closed or self._held is not None, self._longest)
        link.require_open()
        if self._held is None:
            raise WorkerLostError(link.address, f"no worker took the parameters within {self._longest:g} s")
        return self._held

    @property
    def _longest(self) -> float:
        """Seconds that a worker may take to receive them before that counts as failed."""
        return max(self._link.worker_wait, self._pace.limit)

    @property
    def _held(self) -> Published | None:
        """What was published last, if a worker has it."""
        return self._published if self._published is not None and self._published.futures else None

    def release(self) -> None:
        """Let the workers forget them."""
        if self._published is not None:
            self._published.release()

    def _replace(self, version: int, edition: Edition) -> None:
        self.release()
        self._published = Published(version, edition, self._link.new_key())
        for worker in self._roster.workers.values():
            self.send_to(worker)

    def _is_everywhere(self) -> bool:
        holders = self._published.holders if self._published else set()
        return holders.issuperset(worker.address for worker in self._roster.usable())

    def send_to(self, worker: Worker) -> None:
        """Begin to send what was published last, if anything was, to a worker that is not receiving already."""
        if self._published is not None and worker not in self._receiving:
            self._receiving.add(worker)
            self._tasks.create_task(self._sent_to(worker), name=f"parameters to {worker.address}")

    async def _sent_to(self, worker: Worker) -> None:
        """Send what was published last, and again if something else is published meanwhile."""
        published = None
        try:
            while self._published not in (None, published) and self._is_reachable(worker):
                published = self._published
                await self._sent(worker, published)
        except (*GONE, KeyError, ValueError):  # the scheduler says so, if it has not done already
            self._roster.doubt(worker)
        finally:
            self._receiving.discard(worker)

    def _is_reachable(self, worker: Worker) -> bool:
        return self._link.is_up and self._roster.workers.get(worker.address) is worker

    async def _sent(self, worker: Worker, published: Published) -> None:
        link = self._link
        late = asyncio.get_running_loop().call_later(self._pace.limit, self._roster.doubt, worker)
        try:
            scattered = link.client.scatter({published.key: published.edition}, [worker.address], hash=False)
            futures = await link.asked(scattered, self._longest)
        finally:
            late.cancel()
        if published is self._published and not link.closed:
            published.futures.extend(futures.values())
            published.holders.add(worker.address)
        else:
            for future in futures.values():
                future.release()
        self._roster.trust(worker.address)
        link.notify()
