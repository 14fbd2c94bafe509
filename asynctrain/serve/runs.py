"""The runs of the service: they take data in, wait for their turn, train, end, and outlive the server."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

from grpc import StatusCode

from asynctrain._aio import ServingGroup, ended, in_thread, thread_pool
from asynctrain.errors import DataError, DivergenceError, ExecutorError, WeightlessBatchError
from asynctrain.executors.base import Executor
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve.limits import Limits
from asynctrain.serve.plan import Plan, canonical, parse_start, require_key, restored
from asynctrain.serve.records import End, Outcome, Record, Records
from asynctrain.serve.refusal import Refused, exhausted, require_at_most, unfit
from asynctrain.serve.samples import Labelled, read_samples
from asynctrain.serve.spool import Spool
from asynctrain.serve.told import Told, told_in
from asynctrain.train.figures import row_of
from asynctrain.train.history import History
from asynctrain.train.run import Run
from asynctrain.train.run_folder import RunFolder

T = TypeVar("T")

FILE_THREADS = 4  # that decode and write what clients send
_logger = logging.getLogger(__name__)


class Ticket:
    """The hold that one call has on a run, until another call takes it over.

    Args:
        holder: the task of the call, which is cancelled then.
    """

    def __init__(self, holder: asyncio.Task[Any] | None = None) -> None:
        self._holder = holder
        self.is_taken = False

    @property
    def is_held(self) -> bool:
        """Whether there is a call."""
        return self._holder is not None

    def take_away(self) -> None:
        """End the hold."""
        self.is_taken = True
        if self._holder is not None:
            self._holder.cancel()

    def require(self) -> None:
        """Raise ``Refused`` if another call has the hold now."""
        if self.is_taken:
            raise Refused(StatusCode.ABORTED, "another stream has taken over this run")


class ServedRun:
    """One run of the service, whatever has become of it.

    Attributes:
        record: what is known of it on disk.
        plan: what it trains; None once it has ended.
        spool: its data; likewise.
        folder: of its training.
        live: the training under way, if there is one.
        told: what of its events is on disk, while there is none.
        task: that trains, or is about to.
        is_wanted: whether nobody has cancelled it.
        is_interruptible: whether cancelling the task now lets it end the run.
        storing: held while its data is written, or removed.
    """

    def __init__(self, record: Record, folder: RunFolder, plan: Plan | None = None, spool: Spool | None = None) -> None:
        self.record = record
        self.plan = plan
        self.spool = spool
        self.folder = folder
        self.live: Run | None = None
        self.told = Told()
        self.task: asyncio.Task[None] | None = None
        self.is_wanted = True
        self.is_interruptible = False
        self.storing = asyncio.Lock()
        self.ticket = Ticket()
        self.left_at = time.monotonic()  # when its last stream went away
        self._news = asyncio.Event()

    @property
    def run_id(self) -> str:
        """Its name."""
        return self.record.run_id

    @property
    def outcome(self) -> Outcome | None:
        """How it has ended."""
        return self.record.outcome

    @property
    def news(self) -> asyncio.Event:
        """An event that is set when anything changes from now on."""
        return self._news

    @property
    def next_event(self) -> int:
        """The number that the next event will have."""
        if self.outcome is not None:
            return self.outcome.events
        return self.told.events if self.live is None else self.live.next_event

    def announce(self) -> None:
        """Wake those who wait for news."""
        self._news.set()
        self._news = asyncio.Event()

    def take(self) -> Ticket:
        """Return the hold on the run for the call whose task this is; another call that has it ends."""
        self.ticket.take_away()
        self.ticket = Ticket(asyncio.current_task())
        return self.ticket

    @property
    def state(self) -> pb.RunState.ValueType:
        """What it does now."""
        if self.outcome is not None:
            return _ENDS[self.outcome.end]
        if self.record.phase == "receiving":
            return pb.RECEIVING
        if self.task is None:
            return pb.QUEUED
        return pb.PAUSED if self.record.paused else pb.RUNNING

    def __repr__(self) -> str:
        return f"<ServedRun {self.run_id}, {pb.RunState.Name(self.state).lower()}>"


class Runs:
    """All runs of a server.

    Use it as ``async with Runs.open(...) as runs``; leaving the block ends the trainings under way with a checkpoint
    from which the next server goes on.

    Args:
        records: the folder.
        executor: where gradients are computed.
        limits: how much is done.
        tasks: owns the trainings.
        threads: where files are read and written.
    """

    def __init__(
        self,
        records: Records,
        executor: Executor,
        limits: Limits,
        tasks: asyncio.TaskGroup,
        threads: ThreadPoolExecutor,
    ) -> None:
        self.limits = limits
        self._records = records
        self._executor = executor
        self._tasks = tasks
        self._threads = threads
        self._runs: dict[str, ServedRun] = {}
        self._by_key: dict[tuple[str, str], ServedRun] = {}
        self._beginning = asyncio.Lock()
        self._reserved = 0  # bytes that spools have, or are about to have
        self._order = 0
        self.is_draining = False

    @classmethod
    @asynccontextmanager
    async def open(cls, path: Path, executor: Executor, limits: Limits) -> AsyncIterator[Runs]:
        """Open the folder of a server, and go on with what is there.

        Raises:
            OSError: the folder cannot be used, or another server uses it.
        """
        records = await in_thread(Records, path)
        try:
            async with thread_pool(FILE_THREADS, "serve") as threads, ServingGroup() as tasks:
                runs = cls(records, executor, limits, tasks, threads)
                await runs._restore()
                tasks.create_task(runs._sweep(), name="sweep-runs")
                yield runs
        finally:
            records.close()

    async def in_file_thread(self, function: Callable[..., T], *args: object) -> T:
        """Return ``function(*args)``, called in one of the threads that read and write files.

        Cancelling it waits for the call, so that nobody finds its work half done.
        """
        return await ended(asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args)))

    # Which runs there are

    def of(self, client: str) -> list[ServedRun]:
        """Return the runs of a client, the latest first."""
        own = [run for run in self._runs.values() if run.record.client == client]
        return sorted(own, key=lambda run: (run.record.created, run.run_id), reverse=True)

    def get(self, client: str, run_id: str) -> ServedRun:
        """Return a run of a client; raises ``Refused`` where there is none of that name that is its own."""
        run = self._runs.get(run_id)
        if run is None or run.record.client != client:
            raise Refused(StatusCode.NOT_FOUND, "there is no run of that name")
        return run

    def queue_position(self, run: ServedRun) -> int:
        """Return the place of a run among those that wait for their turn, counted from 1; 0 if it does not."""
        queue = self._queue()
        return queue.index(run) + 1 if run in queue else 0

    # How a run begins

    async def begin(self, client: str, start: pb.Start) -> ServedRun:
        """Return the run that ``start`` stands for: the one with its idempotency key, or a new one.

        Raises:
            Refused: it cannot be done, is beyond a limit, or the key stands for another Start.
        """
        key = require_key(start)
        plan, content, digest = await self.in_file_thread(_examined, start, self.limits)
        async with self._beginning:
            if (known := self._by_key.get((client, key))) is not None:
                if known.record.digest != digest:
                    raise Refused(StatusCode.ALREADY_EXISTS, "this idempotency key stands for another Start")
                return known
            self._require_room(client)
            name = f"run-{secrets.token_hex(8)}"
            record = Record(name, client, key, content, digest, plan.epochs, created=time.time())
            await self.in_file_thread(self._records.save, record)
            spool = await self._spool(record, plan)
            return self._add(ServedRun(record, self._records.run_folder(record.run_id), plan, spool))

    def _require_room(self, client: str) -> None:
        if self.is_draining:
            raise Refused(StatusCode.UNAVAILABLE, "the server is shutting down")
        unfinished = [run for run in self._runs.values() if run.outcome is None]
        own = sum(run.record.client == client for run in unfinished)
        if own >= self.limits.runs_per_client:
            raise exhausted(f"{own} runs of yours have not ended, more are not permitted")
        if len(unfinished) >= self.limits.runs:
            raise exhausted("the queue is full")

    def _add(self, run: ServedRun) -> ServedRun:
        self._runs[run.run_id] = run
        if run.record.key:
            self._by_key[run.record.client, run.record.key] = run
        return run

    async def _spool(self, record: Record, plan: Plan) -> Spool:
        path = self._records.spool_path(record.run_id)
        spool = await self.in_file_thread(Spool, path, plan.image_shape, self.limits.free_bytes)
        self._reserved += spool.bytes
        return spool

    # How its data arrives

    async def store(self, run: ServedRun, ticket: Ticket, message: Labelled, sequence: int, last: bool) -> int:
        """Store what a message holds, and let the run wait for its turn when it was the last.

        Returns:
            How many messages are stored.

        Raises:
            Refused: it is not what it must be, comes out of turn, or is beyond a limit.
            OSError: it cannot be written.
        """
        async with run.storing:
            ticket.require()
            plan, spool = run.plan, run.spool
            if plan is None or spool is None or run.record.phase != "receiving":
                raise unfit("the data of this run is complete, or is not wanted any more")
            _require_next(sequence, spool.contents.messages)
            images = _count(message)
            self._require_storable(plan, spool, images, last)
            reserved = images * plan.image_bytes
            before = spool.bytes
            self._reserved += reserved
            try:
                await self.in_file_thread(self._store, plan, spool, message, last)
            finally:
                self._reserved -= reserved - (spool.bytes - before)
            if last:
                await self._complete(run, spool)
            return spool.contents.messages

    async def stored(self, run: ServedRun) -> int:
        """Return how many messages are stored, once none is just being stored."""
        async with run.storing:
            return run.record.messages if run.spool is None else run.spool.contents.messages

    def _require_storable(self, plan: Plan, spool: Spool, images: int, last: bool) -> None:
        require_at_most(self.limits.message_images, images, "images in a message")
        total = spool.contents.images + images
        require_at_most(self.limits.epoch_samples, plan.epochs * total, "images in all epochs")
        require_at_most(self.limits.run_bytes, total * plan.image_bytes, "bytes of pixels in a run")
        reserved = self._reserved + images * plan.image_bytes
        require_at_most(self.limits.quota_bytes, reserved, "bytes of pixels in all runs")
        least = 2 if plan.holdout else 1
        if last and total < least:
            raise unfit(f"a run must have at least {least} images, or 1 without a holdout; got {total}")

    def _store(self, plan: Plan, spool: Spool, message: Labelled, last: bool) -> None:
        spool.append(read_samples(message, plan.settings, len(plan.classes), self.limits), last)
        if last:
            spool.sync()

    async def _complete(self, run: ServedRun, spool: Spool) -> None:
        self._order += 1
        contents = spool.contents
        ready = replace(
            run.record, phase="ready", order=self._order, images=contents.images, messages=contents.messages
        )
        await self._save(run, ready)
        self._start_next()

    # How it trains

    def _queue(self) -> list[ServedRun]:
        """Return the runs that wait for their turn, in the order in which they do."""
        ready = (run for run in self._runs.values() if run.record.phase == "ready")
        waiting = [run for run in ready if run.task is None and run.is_wanted]
        return sorted(waiting, key=lambda run: run.record.order)

    def _start_next(self) -> None:
        if self.is_draining:
            return
        busy = sum(run.task is not None for run in self._runs.values())
        for run in self._queue()[: max(0, self.limits.running - busy)]:
            run.task = self._tasks.create_task(self._train(run), name=f"train-{run.run_id}")
            run.announce()

    async def _train(self, run: ServedRun) -> None:
        """Train until the run ends, or the server does: then it goes on with the next one."""
        try:
            run.is_interruptible = True
            outcome = await self._trained(run) if run.is_wanted else _cancelled(run)
        except asyncio.CancelledError:
            if run.is_wanted:
                raise
            outcome = _cancelled(run)
        except Exception as error:
            outcome = _failure(error, run)
        finally:
            run.is_interruptible = False
            if run.live is not None:
                run.told = Told(run.live.next_event, has_end=True)
            run.live = None
            run.announce()
        await self._end(run, outcome)
        self._start_next()

    async def _trained(self, run: ServedRun) -> Outcome:
        assert run.plan is not None  # noqa: S101 - it has not ended
        assert run.spool is not None  # noqa: S101 - as above
        plan, folder = run.plan, run.folder
        trainer = plan.trainer(self._executor)
        train, test = await self.in_file_thread(lambda spool: plan.split(*spool.arrays()), run.spool)
        has_begun = await self.in_file_thread(folder.holds_run)
        async with trainer.start(
            plan.loader(train),
            epochs=plan.epochs,
            validate=test,
            saving=plan.saving(),
            state=await in_thread(trainer.initial_state),
            run_dir=folder.path,
            resume=folder.path if has_begun else None,
        ) as live:
            run.live = live
            run.announce()
            if run.record.paused:
                await live.pause()
            await asyncio.wait([live.task])
        return await self.in_file_thread(_outcome, live.history())

    # What is asked of it

    async def pause(self, run: ServedRun) -> None:
        """Let it wait after the step it is in; raises ``Refused`` unless it is running or paused."""
        live = await self._live(run)
        await self._save(run, replace(run.record, paused=True))
        await live.pause()

    async def resume(self, run: ServedRun) -> None:
        """Let it go on; raises ``Refused`` unless it is running or paused."""
        live = await self._live(run)
        await self._save(run, replace(run.record, paused=False))
        live.resume()

    async def stop(self, run: ServedRun) -> None:
        """End it after the step it is in, and wait for that; raises ``Refused`` before it has started."""
        if run.outcome is None:
            live = await self._live(run)
            self._tasks.create_task(_stopped(live), name=f"stop-{run.run_id}")
            await self.ended(run)

    async def cancel(self, run: ServedRun) -> None:
        """End it at once, and wait for that."""
        if run.outcome is not None:
            return
        if run.is_wanted:
            run.is_wanted = False
            if run.task is None:
                await self._end(run, _cancelled(run))
            elif run.is_interruptible:
                run.task.cancel()
        await self.ended(run)

    def leave(self, run: ServedRun, ticket: Ticket) -> None:
        """Let go of a run; without an idempotency key it is not wanted any more, unless the server itself goes."""
        if ticket.is_taken:
            return
        run.ticket = Ticket()
        run.left_at = time.monotonic()
        if not run.record.key and run.outcome is None and not self.is_draining:
            end = self.discard if run.record.phase == "receiving" else self.cancel
            self._tasks.create_task(end(run), name=f"abandon-{run.run_id}")

    async def ended(self, run: ServedRun) -> Outcome:
        """Wait for the end of a run and return how it was."""
        while run.outcome is None:
            await run.news.wait()
        return run.outcome

    async def _live(self, run: ServedRun) -> Run:
        """Return the training of a run, which may be just about to begin."""
        while run.live is None:
            if run.task is None or run.outcome is not None:
                raise unfit(f"the run is {pb.RunState.Name(run.state)}, not RUNNING or PAUSED")
            await run.news.wait()
        return run.live

    # How it ends

    async def _end(self, run: ServedRun, outcome: Outcome) -> None:
        async with run.storing:
            events = run.told.events + (not run.told.has_end)
            outcome = replace(outcome, time=time.time(), events=events)
            ended = replace(run.record, phase="ended", start=b"", outcome=outcome)
            try:
                await self.in_file_thread(self._records.save, ended)
            except OSError as error:  # the disk is full, say: the next server will end it again
                _logger.error("the end of %r could not be written", run, exc_info=error)
            spool, run.spool, run.plan, run.task, run.record = run.spool, None, None, None, ended
            run.announce()
            if spool is not None:
                self._reserved -= spool.bytes
                await self.in_file_thread(spool.delete)
        await self._forget_oldest()

    async def discard(self, run: ServedRun) -> None:
        """Remove a run whose data never became complete, as if it had never been."""
        await self.cancel(run)
        await self._forget(run)

    async def _forget_oldest(self) -> None:
        ended = [(run.outcome.time, run.run_id, run) for run in self._runs.values() if run.outcome is not None]
        for _, _, run in sorted(ended, key=lambda item: item[:2])[: max(0, len(ended) - self.limits.ended_runs)]:
            await self._forget(run)

    async def _forget(self, run: ServedRun) -> None:
        self._runs.pop(run.run_id, None)
        if self._by_key.get((run.record.client, run.record.key)) is run:
            del self._by_key[run.record.client, run.record.key]
        try:
            await self.in_file_thread(self._records.remove, run.run_id)
        except OSError as error:  # the next server will try again
            _logger.error("%r could not be removed", run, exc_info=error)

    async def _save(self, run: ServedRun, record: Record) -> None:
        """Let ``record`` be what is known of a run, on disk first."""
        await self.in_file_thread(self._records.save, record)
        run.record = record
        run.announce()

    # What outlives the server

    async def _restore(self) -> None:
        for record in await self.in_file_thread(lambda: list(self._records.load())):
            run = ServedRun(record, self._records.run_folder(record.run_id))
            self._order = max(self._order, record.order)
            self._add(run)
            if record.outcome is None:
                await self._take_up(run)
        self._start_next()

    async def _take_up(self, run: ServedRun) -> None:
        """Go on with a run of the server before; one that had no key and not all its data has no client any more."""
        try:
            run.told = await self.in_file_thread(told_in, run.folder.events.path)
            run.plan = await self.in_file_thread(restored, run.record.start, self.limits)
            run.spool = await self._spool(run.record, run.plan)
        except (Refused, OSError) as error:
            await self._end(run, _failure(error, run))
            return
        if run.record.phase == "receiving" and run.spool.contents.complete:
            await self._complete(run, run.spool)
        elif run.record.phase == "receiving" and not run.record.key:
            await self.discard(run)

    async def _sweep(self) -> None:
        """Discard the runs whose clients do not come back with the rest of their data; the body of a task."""
        while True:
            await asyncio.sleep(min(self.limits.linger_seconds / 4, 60.0))
            oldest = time.monotonic() - self.limits.linger_seconds
            for run in list(self._runs.values()):
                if run.record.phase == "receiving" and not run.ticket.is_held and run.left_at < oldest:
                    await self.discard(run)

    async def drain(self) -> None:
        """Begin no more runs, and end the trainings under way with a checkpoint; the next server goes on with them."""
        self.is_draining = True
        trainings = [run.task for run in self._runs.values() if run.task is not None]
        for task in trainings:
            task.cancel()
        for run in self._runs.values():
            run.announce()
        if trainings:
            await asyncio.wait(trainings)
        for run in self._runs.values():
            run.task = None  # whose traceback would hold on to the data

    def __repr__(self) -> str:
        return f"<Runs: {len(self._runs)}, {self._reserved:,} bytes of pixels>"


_ENDS: Mapping[End, pb.RunState.ValueType] = {
    "finished": pb.FINISHED,
    "stopped": pb.STOPPED,
    "cancelled": pb.CANCELLED,
    "failed": pb.FAILED,
}


def _examined(start: pb.Start, limits: Limits) -> tuple[Plan, bytes, str]:
    """Return the plan of a Start, its canonical bytes and their digest; raises ``Refused``. Blocks."""
    plan = parse_start(start, limits)
    content = canonical(start)
    return plan, content, hashlib.sha256(content).hexdigest()


def _require_next(sequence: int, expected: int) -> None:
    if sequence < expected:
        raise Refused(StatusCode.ALREADY_EXISTS, f"batch {sequence} is stored already, the next one is {expected}")
    if sequence > expected:
        raise Refused(StatusCode.OUT_OF_RANGE, f"batch {expected} is missing before batch {sequence}")


def _count(message: Labelled) -> int:
    """Return how many images a message says it has."""
    if message.WhichOneof("images") == "tensor":
        return message.tensor.shape[0] if message.tensor.shape else 0
    return len(message.encoded.images)


async def _stopped(live: Run) -> None:
    try:
        await live.stop()
    except (Exception, asyncio.CancelledError) as error:  # how it ends is told by the task that trains
        if isinstance(error, asyncio.CancelledError) and (task := asyncio.current_task()) and task.cancelling():
            raise


def _outcome(history: History) -> Outcome:
    """Return what a run has come to. Blocks: the weights are hashed."""
    metrics: dict[str, float] = {}
    if history.epochs:
        row = row_of(history.epochs[-1])
        metrics = {name: value for name, value in row.items() if name not in _NO_METRICS and isfinite(value)}
    end: End = "stopped" if history.reason == "stopped" else "finished"
    return Outcome(end, history.state.step, history.seconds, history.state.digest(), metrics)


_NO_METRICS = frozenset({"epoch", "step", "samples", "seconds"})


def _cancelled(run: ServedRun) -> Outcome:
    code = StatusCode.CANCELLED
    return Outcome("cancelled", _steps(run), code=code.value[0], detail="the run was cancelled")


def _failure(error: BaseException, run: ServedRun) -> Outcome:
    """Return how a run has failed; what may tell of the server's insides goes to its log alone."""
    code, detail = _code_and_detail(error)
    if code is StatusCode.INTERNAL:
        _logger.error("%r has failed", run, exc_info=error)
    return Outcome("failed", _steps(run), code=code.value[0], detail=detail)


def _code_and_detail(error: BaseException) -> tuple[StatusCode, str]:
    if isinstance(error, Refused):
        return error.code, error.detail
    if isinstance(error, DivergenceError | WeightlessBatchError | DataError | ValueError):
        return StatusCode.INVALID_ARGUMENT, str(error)
    if isinstance(error, ExecutorError):
        return StatusCode.UNAVAILABLE, f"no worker could do it: {error.reason}"
    if isinstance(error, MemoryError):
        return StatusCode.RESOURCE_EXHAUSTED, "the server has not enough memory"
    if isinstance(error, OSError):
        return StatusCode.RESOURCE_EXHAUSTED, f"the server could not write: {error.strerror or 'unknown'}"
    return StatusCode.INTERNAL, f"an error of the server's own: {type(error).__name__}"


def _steps(run: ServedRun) -> int:
    return run.live.progress.step if run.live is not None else 0
