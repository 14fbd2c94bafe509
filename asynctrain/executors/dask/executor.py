"""The executor: its arguments, its own cluster where it has one, and its sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Self

from distributed import Client, Security

from asynctrain._aio import ServingGroup
from asynctrain.errors import ClosedError, WorkerLostError
from asynctrain.executors.base import Session, Tell, nobody
from asynctrain.executors.crew import WORKER_WAIT
from asynctrain.executors.dask.cluster import local_cluster
from asynctrain.executors.dask.link import SCHEDULER, connected
from asynctrain.executors.dask.session import DaskSession
from asynctrain.executors.ledger import Patience
from asynctrain.executors.local import GRACE, usable_cpus
from asynctrain.types import Program


class DaskExecutor:
    """Computes on the workers of a Dask cluster; not a ``concurrent.futures.Executor``.

    Dask's scheduler decides who computes what; its workers may come and go while a training runs. Each must have the
    same packages as the program: asynctrain, and what defines layers of its own. Needs the extra ``dask``.

    Args:
        address: of the scheduler of a running cluster, ``tcp://HOST:PORT`` or ``tls://HOST:PORT``.
        client: a client of a running cluster, instead of its address; it stays the caller's. Without either, the
            executor starts workers on this machine, which listen at 127.0.0.1 only.
        workers: how many it starts, by default one for each CPU; only without ``address`` and ``client``.
        security: keys and certificates for TLS, as ``distributed.Security``; only with ``address``.
        worker_wait: seconds that work waits while there is no worker, before it fails with ``WorkerLostError``.
        patience: how long a result is waited for before another worker computes it too.

    Parameters are sent to every worker once a version. A microbatch whose worker dies is computed by another one. One
    that is not back in time is computed by another worker too, and the first result counts. Cancelling stops before the
    next microbatch: one that a worker has begun is not interrupted until the session is left.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        client: Client | None = None,
        workers: int | None = None,
        security: Security | None = None,
        worker_wait: float = WORKER_WAIT,
        patience: Patience = Patience(),  # noqa: B008 - it is frozen
    ) -> None:
        if address is not None and client is not None:
            raise ValueError(f"either address or client may be given, got both: {address!r} and {client!r}")
        if workers is not None and (address is not None or client is not None):
            raise ValueError("workers counts those to start on this machine; a running cluster has workers of its own")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        if security is not None and address is None:
            raise ValueError("security is how the cluster at an address is reached, got security without address")
        if worker_wait < 0:
            raise ValueError(f"worker_wait must be at least 0 seconds, got {worker_wait}")
        self._scheduler = address
        self._client = client
        self._embeds = address is None and client is None
        self._workers = workers or usable_cpus()
        self._security = security
        self._worker_wait = worker_wait
        self._patience = patience
        self._address = f"dask:{self._workers}" if self._embeds else f"dask:{address or _address_of(client)}"
        self._cluster = AsyncExitStack()
        self._starting = asyncio.Lock()
        self._sessions: set[DaskSession] = set()
        self._closed = False

    @asynccontextmanager
    async def open(self, program: Program, tell: Tell = nobody) -> AsyncIterator[Session]:
        """Open a session for ``program``; leaving it stops what its workers compute and waits for that.

        Raises:
            FingerprintError: the workers of this cluster would not all give the same bits.
            ExecutorError: a worker lacks what the program needs.
            WorkerLostError: there is no scheduler, or there was no worker for ``worker_wait`` seconds.
        """
        self._require_open()
        async with AsyncExitStack() as stack:
            client = await self._connected(stack)
            tasks = await stack.enter_async_context(ServingGroup())
            session = DaskSession(self._address, client, program, tell, tasks, self._worker_wait, self._patience)
            self._sessions.add(session)
            stack.callback(self._sessions.discard, session)
            stack.push_async_callback(session.aclose)
            await session.begin()
            self._require_open()
            yield session

    async def _connected(self, stack: AsyncExitStack) -> Client:
        """Return a client for one session, so that all that it holds at the scheduler goes with it."""
        async with self._starting:
            self._require_open()
            if self._embeds and self._scheduler is None:
                self._scheduler = await self._cluster.enter_async_context(local_cluster(self._workers))
        try:
            return await stack.enter_async_context(connected(self._new_client()))
        except OSError as error:
            raise WorkerLostError(self._address, f"no Dask scheduler answers: {error}") from error

    def _new_client(self) -> Client:
        address, security, direct = self._scheduler, self._security, self._embeds or None
        if self._client is not None:
            address, security = _address_of(self._client), self._client.security
            direct = self._client.direct_to_workers
        return Client(
            address,
            asynchronous=True,
            security=security,
            direct_to_workers=direct,
            timeout=SCHEDULER if self._embeds else self._worker_wait,
            set_as_default=False,
            name="asynctrain",
        )

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the executor {self._address} is closed")

    async def aclose(self, grace: float = GRACE) -> None:
        """Stop the work of open sessions, and the workers that the executor started; may be called again."""
        self._closed = True
        for session in list(self._sessions):
            await session.aclose(grace)
        async with self._starting:
            await self._cluster.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self._sessions)} sessions"
        return f"<{type(self).__name__} {self._address}, {state}>"


def _address_of(client: Any) -> str:
    if client.scheduler is None:
        raise ValueError("client must be connected: await it, or use async with")
    return str(client.scheduler.address)
