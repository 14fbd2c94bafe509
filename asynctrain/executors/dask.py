"""A home on Dask: the caller's own cluster, or one that is started on this machine."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Set
from concurrent.futures import CancelledError as Withdrawn
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from statistics import median
from typing import Any, Self, TypeVar, overload
from uuid import uuid4

import dask.config
from distributed import Client, Future, Security
from distributed.scheduler import KilledWorker
from distributed.utils_comm import gather_from_workers

from asynctrain._aio import ServingGroup, first_of_several, in_thread
from asynctrain.arena import Arena, Array
from asynctrain.errors import (
    ClosedError,
    ExecutorError,
    FingerprintError,
    StaleParametersError,
    WorkerLostError,
)
from asynctrain.executors import dask_worker, remote
from asynctrain.executors.base import Session, Tell, nobody
from asynctrain.executors.dask_cluster import local_cluster
from asynctrain.executors.dask_worker import Edition, Failed, Foreign, Introduction, Outcome, Packed, Summed, aligned
from asynctrain.executors.fingerprint import require_same
from asynctrain.executors.ledger import Patience
from asynctrain.executors.local import GRACE, usable_cpus
from asynctrain.executors.process import importable
from asynctrain.nn.layers.base import modules_of
from asynctrain.nn.model import Model
from asynctrain.types import (
    ForwardResult,
    ForwardWork,
    GradientResult,
    GradientWork,
    Params,
    Program,
    Speculated,
    WorkerJoined,
    WorkerLost,
)

T = TypeVar("T")
Work = GradientWork | ForwardWork

WORKER_WAIT = 30.0  # seconds
GONE = (OSError,)  # what a connection raises, broken or silent for too long
LOST = (Withdrawn, KilledWorker, OSError)  # what Dask raises for work that may be attempted again

PIXELS_GO_ALONG = {"distributed.admin.large-graph-warning-threshold": "1TB"}  # with the task, so that none are lost

ANSWER = 1.0  # seconds, at most, in which a worker that lives answers a ping
FATAL = 8  # times that the same work was lost with its worker: then it is the work that kills them
PREPARATION = 120.0  # seconds in which a worker must have imported and compiled what a program needs
PAUSE = 0.05  # seconds before a result is asked for again that was not where Dask thought
QUICK = 2**20  # bytes: what is larger is copied off the loop
RECENT = 31  # durations, the median of which tells what a piece of work takes


class DaskExecutor:
    """Computes on the workers of a Dask cluster; not a ``concurrent.futures.Executor``.

    Dask's scheduler decides who computes what; its workers may come and go while a training runs. Each must have the
    same packages as the program: asynctrain, and what defines layers of its own. Needs the extra ``dask``.

    Args:
        address: of the scheduler of a running cluster, ``tcp://HOST:PORT`` or ``tls://HOST:PORT``.
        client: a client of a running cluster, instead of its address; it stays the caller's. Without either, the
            executor starts workers on this machine, which listen at 127.0.0.1 only.
        workers: how many it starts, by default one for each CPU; only without ``address`` and ``client``.
        security: keys and certificates for TLS, as ``distributed.Security``.
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
        self._resources = AsyncExitStack()
        self._starting = asyncio.Lock()
        self._sessions: set[_DaskSession] = set()
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
            client = await stack.enter_async_context(self._connected())
            tasks = await stack.enter_async_context(ServingGroup())
            session = _DaskSession(self._address, client, program, tell, tasks, self._worker_wait, self._patience)
            self._sessions.add(session)
            stack.callback(self._sessions.discard, session)
            stack.push_async_callback(session.aclose, GRACE)
            await session.begin()
            self._require_open()
            yield session

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Client]:
        """Own a client: each session has one, so that all it holds at the scheduler goes with it."""
        async with self._starting:
            if self._embeds and self._scheduler is None:
                cluster = await self._resources.enter_async_context(local_cluster(self._workers))
                self._scheduler = cluster.scheduler_address
        client = self._new_client()
        try:
            try:
                await client
            except OSError as error:
                raise WorkerLostError(self._address, f"no Dask scheduler answers: {error}") from error
            yield client
        finally:
            await client.close(GRACE)

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
            timeout=self._worker_wait,
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
        await self._resources.aclose()

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


def _own(vector: Array) -> Array:
    """Return ``vector``, copied where it may not be written, as a step adds to it, or begins where kernels are slow."""
    return aligned(vector if vector.flags.writeable else vector.copy())


class _Usual:
    """How long something takes as a rule, and how long to wait for it."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._seconds: deque[float] = deque(maxlen=RECENT)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    @property
    def limit(self) -> float:
        """Seconds after which it is late."""
        usual = median(self._seconds) if self._seconds else 0.0
        return max(self._patience.floor, self._patience.factor * usual)


@dataclass(eq=False, slots=True)
class _Worker:
    """One that computes for the session.

    Attributes:
        address: by which Dask knows it.
        slots: how many microbatches it computes at once.
        doubted: it did not answer in time; while there are others it gets no work, until it is heard of again.
        sending: parameters are on their way to it.
    """

    address: str
    slots: int
    doubted: bool = False
    sending: bool = False


@dataclass(eq=False, slots=True)
class _Published:
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

    def release(self) -> None:
        """Let the workers forget it."""
        for future in self.futures:
            future.release()
        self.futures.clear()


class _DaskSession:
    """Gives work to Dask's scheduler, and looks after what that does not: parameters, frozen workers, fingerprints.

    Parameters are scattered to each worker by itself, under one key. Dask's own broadcast would be one call, but where
    a worker dies during it, it tries that one for ever, and one that is frozen keeps all others of the cluster waiting.
    """

    def __init__(
        self,
        address: str,
        client: Client,
        program: Program,
        tell: Tell,
        tasks: ServingGroup,
        worker_wait: float,
        patience: Patience,
    ) -> None:
        self.address = address
        self.client = client
        self.tell = tell
        self.name = f"asynctrain-{uuid4().hex[:12]}"
        self.numbers = count()
        self.workers: dict[str, _Worker] = {}
        self.at_work: set[Future[Any]] = set()  # whose results are awaited
        self.computing = _Usual(patience)
        self.fingerprint: Mapping[str, str] = {}
        self._sending = _Usual(patience)
        modules = importable(modules_of(program.architecture))
        self._program = json.dumps({"modules": modules, "program": program.to_json()})
        model = Model.from_json(program.architecture)
        self._layouts = model.layout(program.dtype), model.statistics_layout
        self._tasks = tasks
        self._worker_wait = worker_wait
        self._expected: set[str] = set()  # that are asked who they are
        self._refused: dict[str, Exception] = {}
        self._published: _Published | None = None
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def slots(self) -> int:
        return sum(worker.slots for worker in self.usable())

    # The workers

    async def begin(self) -> None:
        """Learn which workers there are, and hear of all changes from now on."""
        self.client.subscribe_topic("all", self._hear)
        try:
            addresses = await self.asked(self.client.nthreads(), self._worker_wait)
        except GONE as error:
            raise WorkerLostError(self.address, f"the Dask scheduler does not answer: {error}") from error
        for address in addresses:
            self._meet(address)
        await self._until(lambda: bool(self._refused or self.workers) and not self._expected, self._worker_wait)
        if self._expected and not self.workers:  # they are there, and compile
            await self._until(lambda: bool(self.workers) or not self._expected, PREPARATION)
        for refusal in self._refused.values():
            raise refusal
        if not self.workers:
            raise self._alone()

    def _hear(self, event: tuple[float, Any]) -> None:
        """Take what the scheduler tells of its workers; called by Dask on the loop."""
        _, told = event
        if self._closed or not isinstance(told, Mapping):
            return
        if told.get("action") == "add-worker":
            self._meet(told["worker"])
        elif told.get("action") == "remove-worker":
            self._part(told["worker"], "Dask took it away" if told.get("expected") else "its connection broke")

    def _meet(self, address: str) -> None:
        if address not in self.workers.keys() | self._refused.keys() | self._expected:
            self._expected.add(address)
            self._tasks.create_task(self._introduced(address), name=f"introduction of {address}")

    def _part(self, address: str, reason: str) -> None:
        self._expected.discard(address)
        self._refused.pop(address, None)
        if self.workers.pop(address, None) is not None:
            self.tell(WorkerLost(address, reason))
        self._notify()

    async def _introduced(self, address: str) -> None:
        """Let the worker take part, if it gives the same bits as the others."""
        try:
            introduction = await self.run_at(address, PREPARATION, dask_worker.introduce, self.name, self._program)
            if address not in self._expected:  # it has gone meanwhile
                return
            require_same(self.fingerprint or introduction.fingerprint, introduction.fingerprint)
        except GONE:
            self._expected.discard(address)
        except (FingerprintError, ExecutorError) as error:
            self.refuse(address, error)
        else:
            self._welcome(address, introduction)
        self._notify()

    def _welcome(self, address: str, introduction: Introduction) -> None:
        self._expected.discard(address)
        self.fingerprint = introduction.fingerprint
        self.workers[address] = worker = _Worker(address, introduction.slots)
        self.tell(WorkerJoined(address, worker.slots))
        self._send_to(worker)

    def refuse(self, address: str, error: Exception) -> None:
        """Let the worker have no part, or no longer."""
        self._expected.discard(address)
        self.workers.pop(address, None)
        if address not in self._refused:
            self._refused[address] = error
            self.tell(WorkerLost(address, f"refused: {error}"))
        self._notify()

    def usable(self) -> list[_Worker]:
        """Return the workers that are not in doubt, or all where all are."""
        trusted = [worker for worker in self.workers.values() if not worker.doubted]
        return trusted or list(self.workers.values())

    def permitted(self, avoided: Collection[str]) -> list[str] | None:
        """Return who may compute, those ``avoided`` left out; None where Dask may choose among all it has."""
        usable = [worker.address for worker in self.usable() if worker.address not in avoided]
        everyone = not self._refused and not self._expected and len(usable) == len(self.workers)
        return None if everyone else usable

    async def examine(self, addresses: Set[str]) -> None:
        """Ask the workers at ``addresses`` for a sign of life; doubt those that give none."""
        async with asyncio.TaskGroup() as tasks:
            for address in addresses & self.workers.keys():
                if not self.workers[address].doubted:
                    tasks.create_task(self._examine(self.workers[address]), name=f"ping of {address}")

    async def _examine(self, worker: _Worker) -> None:
        try:
            await self.run_at(worker.address, min(ANSWER, self.computing.limit), dask_worker.ping)
        except GONE:
            if not worker.doubted:
                self._doubt(worker)
                self.renew(self._published)  # lest Dask lets another worker fetch the parameters from this one

    def _doubt(self, worker: _Worker) -> None:
        worker.doubted = True
        self._notify()

    def trust(self, address: str) -> None:
        """Take note of a sign of life."""
        if address in self.workers:
            self.workers[address].doubted = False
        else:
            self._meet(address)

    async def somebody(self) -> None:
        """Wait until there is a worker."""
        if not await self._until(lambda: self._closed or bool(self.workers), self._worker_wait):
            raise self._alone()
        self._require_open()

    def _alone(self) -> WorkerLostError:
        return WorkerLostError(self.address, f"there was no worker for {self._worker_wait:g} s")

    # Parameters

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        """Send the parameters to all workers; who has not taken them in time is not waited for.

        Raises ``WorkerLostError`` where no worker took them for ``worker_wait`` seconds.
        """
        self._require_open()
        self.require_connection()
        await self.somebody()
        edition = Edition(self.name, self._program, self.fingerprint, Packed.of(params), Packed.of(model_state))
        self._publish(version, edition)
        start = self.now()
        if await self._until(self._is_everywhere, self._sending.limit):
            self._sending.add(self.now() - start)
        await self.held()

    def _publish(self, version: int, edition: Edition) -> None:
        if self._published is not None:
            self._published.release()
        self._published = _Published(version, edition, f"{self.name}-{next(self.numbers)}")
        for worker in self.workers.values():
            self._send_to(worker)

    def renew(self, lost: _Published | None) -> None:
        """Send the parameters again, under another key: those workers that had them are gone, or as good as gone."""
        if lost is not None and lost is self._published:
            self._publish(lost.version, lost.edition)

    def _is_everywhere(self) -> bool:
        holders = self._published.holders if self._published else set()
        return holders.issuperset(worker.address for worker in self.usable())

    async def held(self) -> _Published:
        """Return what was published last, once a worker has it; where all that had it are gone, it is sent again."""
        lost = self._published
        if lost is not None and lost.futures and all(future.status != "finished" for future in lost.futures):
            self.renew(lost)

        def is_held() -> bool:
            return self._closed or (self._published is not None and bool(self._published.futures))

        if not await self._until(is_held, self._worker_wait):
            raise WorkerLostError(self.address, f"no worker took the parameters within {self._worker_wait:g} s")
        self._require_open()
        if self._published is None:
            raise StaleParametersError(self.address, None, 0)
        return self._published

    def _send_to(self, worker: _Worker) -> None:
        if self._published is not None and not worker.sending:
            worker.sending = True
            self._tasks.create_task(self._sent_to(worker), name=f"parameters to {worker.address}")

    async def _sent_to(self, worker: _Worker) -> None:
        """Send the present parameters, and again if others are published meanwhile."""
        published = None
        try:
            while self._published not in (None, published) and self._is_reachable(worker):
                published = self._published
                await self._sent(worker, published)
        except (*GONE, KeyError, ValueError):  # the scheduler says so, if it has not done already
            self._doubt(worker)
        finally:
            worker.sending = False

    def _is_reachable(self, worker: _Worker) -> bool:
        return self.client.status == "running" and self.workers.get(worker.address) is worker

    async def _sent(self, worker: _Worker, published: _Published) -> None:
        late = asyncio.get_running_loop().call_later(self._sending.limit, self._doubt, worker)
        try:
            scattered = self.client.scatter({published.key: published.edition}, [worker.address], hash=False)
            futures = await self.asked(scattered, self._worker_wait)
        finally:
            late.cancel()
        if published is self._published and not self._closed:
            published.futures.extend(futures.values())
            published.holders.add(worker.address)
        else:
            for future in futures.values():
                future.release()
        self.trust(worker.address)
        self._notify()

    # Work

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        self.require(version)
        start = self.now()
        outcome = await _Errand(self, work, version).outcome()
        self.computing.add(self.now() - start)
        match outcome.value:
            case Failed(telling):
                raise remote.rebuilt(telling, outcome.address)
            case Summed() as summed if summed.gradients.nbytes > QUICK:
                return await in_thread(self._gradients, summed)
            case Summed() as summed:
                return self._gradients(summed)
            case ForwardResult() as result:
                return result
        raise ClosedError(f"the session on {self.address} was closed while this was computed")

    def let_go(self, future: Future[Any]) -> None:
        """Have no more use for a result: where it is not begun it will not be, where it is there it is forgotten."""
        self.at_work.discard(future)
        future.release()

    def _gradients(self, summed: Summed) -> GradientResult:
        gradients, statistics = self._layouts
        return GradientResult(
            Arena(gradients, _own(summed.gradients)), summed.sums, Arena(statistics, _own(summed.statistics))
        )

    def require(self, version: int) -> None:
        """Raise ``StaleParametersError`` where other parameters than those of ``version`` were broadcast last."""
        self._require_open()
        have = self._published.version if self._published else None
        if have != version:
            raise StaleParametersError(self.address, have, version)

    # Its life

    async def aclose(self, grace: float) -> None:
        """Stop what the workers compute for it and wait for that, at most ``grace`` seconds."""
        if self._closed:
            return
        self._closed = True
        self._notify()
        if self.client.status == "running":
            await self._leave(grace)
        if self._published is not None:
            self._published.release()

    async def _leave(self, grace: float) -> None:
        with suppress(ValueError):  # it has not begun
            self.client.unsubscribe_topic("all")  # or the scheduler would tell a closed client that it has gone
        with suppress(*LOST):
            await self.asked(self.client.cancel(list(self.at_work)), grace)
        async with asyncio.TaskGroup() as tasks:
            for worker in self.workers.values():
                if not worker.doubted:
                    tasks.create_task(self._left(worker, grace), name=f"leave-taking of {worker.address}")

    async def _left(self, worker: _Worker, grace: float) -> None:
        with suppress(*GONE, ExecutorError):
            await self.run_at(worker.address, grace, dask_worker.leave, self.name, self._program, grace)

    def require_connection(self) -> None:
        """Raise ``WorkerLostError`` where the scheduler is gone."""
        if self.client.status != "running":
            raise WorkerLostError(self.address, "the connection to Dask's scheduler broke")

    @property
    def scheduler(self) -> Any:
        """Dask's, for questions to it; ``WorkerLostError`` where it is gone."""
        self.require_connection()
        return self.client.scheduler

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the session on {self.address} is closed")

    def _notify(self) -> None:
        self._changed.set()

    async def _until(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Wait until ``holds()``, at most so many seconds; return whether it does."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not holds():
                    self._changed.clear()
                    await self._changed.wait()
        return holds()

    async def run_at(self, address: str, seconds: float, function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``, run on the loop of the worker at ``address``."""
        answers = await self.asked(self.client.run(function, *args, workers=[address], on_error="return"), seconds)
        answer = answers[address]
        if isinstance(answer, OSError):
            raise answer
        if isinstance(answer, Exception):
            raise ExecutorError(address, f"cannot compute this program: {answer!r}") from answer
        return answer

    async def asked(self, answer: Awaitable[T], seconds: float) -> T:
        """Return what Dask answers, within so many seconds."""
        async with asyncio.timeout(seconds):
            return await answer

    def now(self) -> float:
        """Return the loop's time, in seconds."""
        return asyncio.get_running_loop().time()

    def __repr__(self) -> str:
        version = self._published.version if self._published else None
        return f"<{type(self).__name__} on {self.address}, {len(self.workers)} workers, version {version}>"


@dataclass(frozen=True, eq=False, slots=True)
class _Attempt:
    """A go at a piece of work. permitted: the workers that may take it; None for all of Dask's."""

    future: Future[Any]
    permitted: list[str] | None


class _Errand:
    """One piece of work, attempted by as many workers as it takes until the first has a result."""

    def __init__(self, session: _DaskSession, work: Work, version: int) -> None:
        self._session = session
        self._work = work
        self._version = version
        self._attempts: dict[asyncio.Task[Outcome | None], _Attempt] = {}
        self._avoided: set[str] = set()  # who has let this work wait
        self._losses = 0

    async def outcome(self) -> Outcome:
        """Return the first result; what others compute of the same is released."""
        with first_of_several():
            async with ServingGroup() as tasks:
                return await self._outcome(tasks)

    async def _outcome(self, tasks: ServingGroup) -> Outcome:
        while True:
            if not self._attempts:
                await self._begin(tasks)
            limit = self._session.computing.limit
            done, _ = await asyncio.wait(self._attempts, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                del self._attempts[task]
                if (outcome := task.result()) is not None:
                    return outcome
            if not done:
                await self._begin_elsewhere(tasks)

    async def _begin(self, tasks: ServingGroup) -> None:
        session = self._session
        await session.somebody()
        published = await session.held()
        session.require(self._version)
        session.require_connection()
        if session.permitted(self._avoided) == []:
            self._avoided.clear()
        permitted = session.permitted(self._avoided) or None
        with dask.config.set(PIXELS_GO_ALONG):
            future = session.client.submit(
                dask_worker.compute,
                published.futures[0],
                self._work,
                key=f"{session.name}-{next(session.numbers)}",
                workers=permitted,
                pure=False,
            )
        session.at_work.add(future)
        task = tasks.create_task(self._attempt(future), name=f"attempt {future.key}")
        task.add_done_callback(lambda _: session.let_go(future))
        self._attempts[task] = _Attempt(future, permitted)

    async def _attempt(self, future: Future[Any]) -> Outcome | None:
        """Return what came of ``future``; None where it was lost and is to be attempted again."""
        session = self._session
        try:
            outcome = await self._fetched(future)
        except Exception as error:
            await self._lost(error)
            return None
        if isinstance(outcome.value, Foreign):
            session.refuse(outcome.address, outcome.value.error)
            return None
        session.trust(outcome.address)
        return outcome

    async def _fetched(self, future: Future[Any]) -> Outcome:
        """Return the result of ``future``, as soon as one of those that may have it hands it over.

        Not by Dask's ``gather``: that asks for several keys at once, so that all wait for a worker that is frozen, and
        are cancelled where one is; and it allows five of such waits.
        """
        patience = self._session.computing.limit
        while True:
            if (error := await future.exception()) is not None:  # it waits until something has come of it
                raise error
            if future.cancelled():
                raise Withdrawn
            with suppress(TimeoutError):  # its worker died, perhaps: Dask computes it again
                if (outcome := await self._session.asked(self._handed_over(future.key), patience)) is not None:
                    return outcome
                await asyncio.sleep(PAUSE)
            patience *= 2  # or its way is long

    async def _handed_over(self, key: Any) -> Outcome | None:
        """Return the result that Dask knows by ``key``; None where nobody has it."""
        client, scheduler = self._session.client, self._session.scheduler
        data: Any
        if client.direct_to_workers:
            data, *_ = await gather_from_workers(await scheduler.who_has(keys=[key]), client.rpc)
        else:
            data = (await scheduler.gather(keys=[key])).get("data", {})
        outcome: Outcome | None = data.get(key)
        return outcome

    async def _lost(self, error: Exception) -> None:
        session = self._session
        session.require(self._version)
        session.require_connection()
        if not isinstance(error, LOST):
            raise ExecutorError(session.address, f"Dask could not run the work: {error!r}") from error
        self._losses += 1
        if self._losses >= FATAL:
            raise ExecutorError(session.address, f"the work was lost {FATAL} times with its worker") from error

    async def _begin_elsewhere(self, tasks: ServingGroup) -> None:
        """Give the work, which is late, to a worker that has not let it wait, if there is one."""
        session = self._session
        session.require_connection()
        await session.somebody()
        with suppress(*LOST):
            places = await session.asked(self._whereabouts(), ANSWER)
            late = set(places.values())
            await session.examine(late - self._avoided)
            self._avoided |= late
            if session.permitted(self._avoided) == [] or self._is_awaited_elsewhere(places):
                return
            for address in sorted(late):
                session.tell(self._speculated(address))
            await self._begin(tasks)

    def _is_awaited_elsewhere(self, places: Mapping[Any, str]) -> bool:
        """Return whether an attempt that is at none of the ``places`` yet may still come to one."""
        return any(
            attempt.future.key not in places
            and attempt.future.status in ("pending", "finished")
            and (attempt.permitted is None or not self._session.workers.keys().isdisjoint(attempt.permitted))
            for attempt in self._attempts.values()
        )

    async def _whereabouts(self) -> dict[str, str]:
        """Return the address of the worker that computes each attempt, or has its result."""
        client, futures = self._session.client, [attempt.future for attempt in self._attempts.values()]
        keys = {future.key for future in futures}
        places = {key: holders[0] for key, holders in (await client.who_has(futures)).items() if holders}
        for address, at_work in (await client.processing()).items():
            places.update(dict.fromkeys(keys.intersection(at_work), address))
        return places

    def _speculated(self, late: str) -> Speculated:
        microbatch = self._work.microbatch if isinstance(self._work, GradientWork) else None
        return Speculated(self._session.address, late, self._version, microbatch)
