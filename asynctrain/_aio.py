"""The asyncio kit: stages between bounded queues, a group of tasks that serves its block, threads that are joined.

A queue between two stages carries *tasks*, put there in the order of their items, so order is kept however the tasks
finish. A task never raises: what went wrong travels as a ``Failure`` in the place of the item, and everything before
it still arrives. So does what would otherwise end a loop or a task unseen: a ``StopAsyncIteration``, and a
``CancelledError`` that nobody asked of the task. Each stage has a meter, from which one can tell which of them holds
the others up.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import sys
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, TypeVarTuple

from asynctrain.errors import ClosedError

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

T = TypeVar("T")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True)
class Failure:
    """What stands in the place of an item whose stage raised ``error``."""

    error: Exception


Flow = asyncio.Queue[asyncio.Future[T | Failure] | None]
"""A bounded queue of items that are being made, in their order; None marks the end."""


class Worked(NamedTuple, Generic[T]):
    """What a stage's function may return instead of a plain result: that took ``seconds`` of work, the rest was a wait.

    It is for functions that wait for a place among others: for a thread that others use as well, or for a lock.
    """

    result: T
    seconds: float


class Meter:
    """What one stage does, and what it waits for.

    Attributes:
        name: of the stage.
        concurrency: how many items it works on at once.
        items: how many it has handed on; one that has an integer ``samples`` counts as so many.
        failures: how many items failed in it.
        busy: seconds of work, added over all that went on at once.
        starved: seconds in which it waited for an item to begin with.
        blocked: seconds in which it waited for room in the queue behind it.
    """

    __slots__ = ("_queue", "blocked", "busy", "concurrency", "failures", "items", "name", "occupied", "puts", "starved")

    def __init__(self, name: str, concurrency: int = 1) -> None:
        self.name = name
        self.concurrency = concurrency
        self.items = self.failures = self.puts = self.occupied = 0
        self.busy = self.starved = self.blocked = 0.0
        self._queue: asyncio.Queue[Any] | None = None

    def count(self, item: object) -> None:
        """Add an item that is handed on."""
        samples = getattr(item, "samples", 1)
        self.items += samples if isinstance(samples, int) else 1  # an item of the user's may have others

    async def get(self, inbox: asyncio.Queue[T]) -> T:
        """Take from ``inbox``, counting the wait."""
        start = perf_counter()
        try:
            return await inbox.get()
        finally:
            self.starved += perf_counter() - start

    async def put(self, outbox: Flow[T], item: asyncio.Future[T | Failure]) -> None:
        """Put into ``outbox``, counting the wait and what was there already."""
        self._queue = outbox
        self.occupied += outbox.qsize()
        self.puts += 1
        start = perf_counter()
        try:
            await outbox.put(item)
        finally:
            self.blocked += perf_counter() - start

    @property
    def capacity(self) -> int:
        """How many items fit into the queue behind it."""
        return self._queue.maxsize if self._queue else 0

    @property
    def occupancy(self) -> float:
        """How full the queue behind it was found, 0 to 1, as a mean over all puts."""
        return self.occupied / (self.puts * self.capacity) if self.puts and self.capacity else 0.0


async def source(items: Iterable[T] | AsyncIterable[T], outbox: Flow[T], meter: Meter) -> None:
    """Put every item into ``outbox``, and where the iteration fails, its error in the place of the next item."""
    try:
        async with aclosing(_iterated(items)) as iterator:
            start = perf_counter()
            async for item in iterator:
                meter.busy += perf_counter() - start
                meter.count(item)
                await meter.put(outbox, finished(item))
                start = perf_counter()
    except (Exception, asyncio.CancelledError) as error:
        failure: asyncio.Future[T | Failure] = finished(noted(error, meter))
        await meter.put(outbox, failure)
    await outbox.put(None)


async def _iterated(items: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T, None]:
    """Yield the items of either kind of iterable, and close a generator when it is left early."""
    if isinstance(items, AsyncGenerator):
        async with aclosing(items):
            async for item in items:
                yield item
    elif isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


async def stage(
    function: Callable[[T], Awaitable[R | Worked[R]]],
    inbox: Flow[T],
    outbox: Flow[R],
    tasks: asyncio.TaskGroup,
    meter: Meter,
    *,
    ordered: bool = True,
) -> None:
    """Do ``function`` to each item, ``meter.concurrency`` at once; failures of earlier stages pass by.

    Each item's work is a task ``name-0``, ``name-1``, ... of ``tasks``. Ordered, the task itself is put into ``outbox``
    before it is done, so items stay in order; else each is put there when it is done.

    Bounds: as many tasks are begun as ``outbox`` has places, and two more: one waits to be put, and one is awaited by
    the next stage.
    """
    limit = asyncio.Semaphore(meter.concurrency)
    number = 0
    unfinished: set[asyncio.Task[None]] = set()
    while (before := await meter.get(inbox)) is not None:
        name = f"{meter.name}-{number}"
        number += 1
        if ordered:
            attempt = _attempt_after(before, function, limit, meter)
            await meter.put(outbox, tasks.create_task(attempt, name=name))
            continue
        if len(unfinished) > meter.concurrency:
            await asyncio.wait(unfinished, return_when=asyncio.FIRST_COMPLETED)
        task = tasks.create_task(_attempt_and_put(before, function, limit, meter, outbox), name=name)
        unfinished.add(task)
        task.add_done_callback(unfinished.discard)
    if unfinished:
        await asyncio.wait(unfinished)
    await outbox.put(None)


async def _attempt_and_put(
    before: asyncio.Future[T | Failure],
    function: Callable[[T], Awaitable[R | Worked[R]]],
    limit: asyncio.Semaphore,
    meter: Meter,
    outbox: Flow[R],
) -> None:
    attempt = _attempt_after(before, function, limit, meter)
    await meter.put(outbox, finished(await attempt))


async def _attempt_after(
    before: asyncio.Future[T | Failure],
    function: Callable[[T], Awaitable[R | Worked[R]]],
    limit: asyncio.Semaphore,
    meter: Meter,
) -> R | Failure:
    item = await before
    if isinstance(item, Failure):
        return item
    async with limit:
        start = perf_counter()
        try:
            result = await function(item)
        except (Exception, asyncio.CancelledError) as error:
            meter.busy += perf_counter() - start
            return noted(error, meter)
    if isinstance(result, Worked):
        result, seconds = result
    else:
        seconds = perf_counter() - start
    meter.busy += seconds
    meter.count(result)
    return result


def noted(error: Exception | asyncio.CancelledError, meter: Meter) -> Failure:
    """Return what is told of ``error``; raises it if it is a cancellation that was asked of this task."""
    if isinstance(error, asyncio.CancelledError) and _is_cancelled():
        raise error
    meter.failures += 1
    failure = Failure(_tellable(error))
    failure.error.add_note(f"raised in the stage {meter.name!r}")
    return failure


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _tellable(error: Exception | asyncio.CancelledError) -> Exception:
    """Return ``error``, or where it would be taken for an end that it is not, a ``RuntimeError`` that it caused."""
    if not isinstance(error, StopIteration | StopAsyncIteration | asyncio.CancelledError):
        return error
    told = RuntimeError(f"a stage's function raised {type(error).__name__}")
    told.__cause__ = error
    return told


def finished(item: T) -> asyncio.Future[T]:
    """Return a future that holds ``item`` already, as a ``Flow`` carries it."""
    future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
    future.set_result(item)
    return future


@contextmanager
def unwrapped() -> Iterator[None]:
    """Raise the error of a one-element exception group in the group's stead; for public boundaries."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        error = group.exceptions[0]
        raise error from error.__cause__  # the group adds nothing: keep it out of the traceback


@contextmanager
def first_of_several() -> Iterator[None]:
    """Raise the first error of an exception group in the group's stead; its notes tell what else the group has.

    For work that is one to its caller, whose parts fail for one reason: a batch of which two microbatches are refused.
    """
    try:
        yield
    except ExceptionGroup as group:
        first, *others = _leaves(group)
        for other in others:
            first.add_note(f"and beside it {type(other).__name__}: {other}")
        raise first from first.__cause__


def _leaves(group: ExceptionGroup[Exception]) -> list[Exception]:
    """Return the errors of a group and of the groups in it."""
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, ExceptionGroup) else [error])
    ]


class ServingGroup(asyncio.TaskGroup):
    """A TaskGroup whose tasks serve its block: they are cancelled when the block ends, and a lone error comes bare."""

    def __init__(self) -> None:
        super().__init__()
        self._serving: set[asyncio.Task[Any]] = set()

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        """Start a task of the group."""
        task = super().create_task(coro, name=name, context=context)
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        return task

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Not by raising a private error inside the group: Python 3.11 loses a cancellation that comes after one.
        for task in self._serving:
            task.cancel()
        with unwrapped():
            await super().__aexit__(kind, error, traceback)


async def in_thread(function: Callable[[*Ts], R], *args: *Ts, stop: Callable[[], None] | None = None) -> R:
    """Return ``function(*args)``, run in a thread of its own that has ended when this returns.

    Unlike ``asyncio.to_thread`` it neither uses the loop's default executor nor leaves work behind: when cancelled, it
    calls ``stop()``, which should make ``function`` return soon, waits for the thread, and raises ``CancelledError``;
    what the function returned or raised is then dropped.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Callable[[], R]] = loop.create_future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            result = context.run(function, *args)
        except BaseException as error:
            loop.call_soon_threadsafe(done.set_result, _raising(error))
        else:
            loop.call_soon_threadsafe(done.set_result, lambda: result)

    thread = threading.Thread(target=run, name=f"asynctrain-{getattr(function, '__name__', 'thread')}")
    thread.start()
    cancelled: asyncio.CancelledError | None = None
    while not done.done() or thread.is_alive():
        try:
            if done.done():  # it only has to end, and a join would hold up the loop until it may
                await asyncio.sleep(0.001)
            else:
                await asyncio.wait([done])
        except asyncio.CancelledError as error:
            if stop is not None and cancelled is None:
                stop()
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return done.result()()


async def ended(future: asyncio.Future[R]) -> R:
    """Return the result of work that cannot be stopped; cancelled, it waits for that too, then it is cancelled."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return future.result()


def step_back() -> None:
    """Give the calling thread a lower priority than the loop's; the first thing that a thread of ours does.

    Where threads are busy on every CPU, the loop would otherwise wait its turn among them: a heartbeat beside training
    was then later by a millisecond and more at the 99th percentile. At 10 a thread has about a tenth of the loop's
    weight, and still gets on beside other programs. Only Linux has priorities of single threads.
    """
    if sys.platform == "linux":
        thread, nice = threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, os.getpid()) + 10
        if nice > os.getpriority(os.PRIO_PROCESS, thread):  # up again it may not go, in a thread born with less
            os.setpriority(os.PRIO_PROCESS, thread, nice)


class Threads(ThreadPoolExecutor):
    """So many threads, which step back.

    Attributes:
        workers: how many.
        under_way: what was handed to them and is not over.
    """

    def __init__(self, workers: int, name: str, owner: str = "a pool of threads") -> None:
        super().__init__(workers, thread_name_prefix=f"asynctrain-{name}", initializer=step_back)
        self.workers = workers
        self.under_way: set[Future[Any]] = set()
        self._owner = owner
        self._closed = False

    def submit(self, function: Callable[..., R], /, *args: Any, **options: Any) -> Future[R]:
        """Have the function called; raises ``ClosedError``, which names the owner, after ``shutdown``."""
        try:
            future = super().submit(function, *args, **options)
        except RuntimeError as error:  # or no further thread can be started
            if not self._closed:
                raise
            raise ClosedError(f"{self._owner} is closed") from error
        self.under_way.add(future)
        future.add_done_callback(self.under_way.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more work; as of every pool of ``concurrent.futures``."""
        self._closed = True
        super().shutdown(wait, cancel_futures=cancel_futures)


Submit = Callable[[Callable[[], Any]], Future[Any]]


class _Guest(Executor):
    """Submits to threads that others submit to as well, and can wait for its own work."""

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._futures: set[Future[Any]] = set()

    def submit(self, function: Callable[..., R], /, *args: Any, **options: Any) -> Future[R]:
        future: Future[R] = self._submit(partial(function, *args, **options))
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def leave(self) -> None:
        """Drop what has not begun, and wait for the rest. Blocks."""
        wait([future for future in list(self._futures) if not future.cancel()])


@asynccontextmanager
async def guest_of(submit: Submit) -> AsyncIterator[Executor]:
    """Share threads with whoever else they work for, by their ``submit``; at the end of the block it has left them.

    Two kinds of work on threads of their own would have more threads busy than there are CPUs. One that holds the
    interpreter, or was just handed it, may then wait for a CPU, and the loop waits for that thread.
    """
    guest = _Guest(submit)
    try:
        yield guest
    finally:
        await in_thread(guest.leave)


@asynccontextmanager
async def thread_pool(workers: int, name: str) -> AsyncIterator[Threads]:
    """Own some threads; at the end of the block work that has not begun is dropped, and the threads are joined."""
    pool = Threads(workers, name)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        await in_thread(pool.shutdown)


@asynccontextmanager
async def process_pool(processes: int, name: str, grace: float = 5.0) -> AsyncIterator[Executor]:
    """Own some processes, spawned when they are first needed; at the end of the block they are gone.

    Work that has not begun is dropped; what is under way has ``grace`` seconds to end before its process is killed.
    """
    from concurrent.futures import ProcessPoolExecutor  # both cost 20 ms of import, and few pipelines have processes
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_leave_interrupts_to_parent)
    try:
        yield pool
    finally:
        workers = list((pool._processes or {}).values())  # the pool forgets them as it shuts down
        kill = asyncio.get_running_loop().call_later(grace, _kill, workers)
        try:
            await in_thread(partial(pool.shutdown, cancel_futures=True))  # in one call: a second would not wait
        finally:
            kill.cancel()


def _leave_interrupts_to_parent() -> None:
    """Ignore Ctrl-C, which a terminal sends to all processes of a program: the parent stops its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.kill()


def _raising(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail
