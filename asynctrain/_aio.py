"""The asyncio kit: stages between bounded queues, a group of tasks that serves its block, threads that are joined.

A queue between two stages carries *tasks*, put there in the order of their items, so order is kept however the tasks
finish. A task never raises: what went wrong travels as a ``Failure`` in the place of the item, and everything before
it still arrives.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True)
class Failure:
    """What stands in the place of an item whose stage raised ``error``."""

    error: Exception


Flow = asyncio.Queue[asyncio.Task[T | Failure] | None]
"""A bounded queue of tasks in the order of their items; None marks the end."""


async def source(
    function: Callable[[T], Awaitable[R]], items: Iterable[T], outbox: Flow[R], tasks: asyncio.TaskGroup, name: str
) -> None:
    """Be the first stage: start ``function(item)`` for each item as a task ``name-0``, ``name-1``, ... of ``tasks``.

    Of its tasks, ``outbox.maxsize`` are in the queue, one waits to be put, and one is awaited by the next stage.
    """
    for number, item in enumerate(items):
        await outbox.put(tasks.create_task(_attempt(function, item), name=f"{name}-{number}"))
    await outbox.put(None)


async def stage(
    function: Callable[[T], Awaitable[R]], inbox: Flow[T], outbox: Flow[R], tasks: asyncio.TaskGroup, name: str
) -> None:
    """Be a stage between two queues: as ``source``, for each item that comes out of ``inbox``; failures pass by."""
    number = 0
    while (before := await inbox.get()) is not None:
        await outbox.put(tasks.create_task(_attempt_after(before, function), name=f"{name}-{number}"))
        number += 1
    await outbox.put(None)


async def _attempt_after(before: asyncio.Task[T | Failure], function: Callable[[T], Awaitable[R]]) -> R | Failure:
    item = await before
    return item if isinstance(item, Failure) else await _attempt(function, item)


async def _attempt(function: Callable[[T], Awaitable[R]], item: T) -> R | Failure:
    try:
        return await function(item)
    except Exception as error:
        task = asyncio.current_task()
        error.add_note(f"raised in {task.get_name() if task else 'no task'}")
        return Failure(error)


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


@asynccontextmanager
async def thread_pool(threads: int | None, name: str) -> AsyncIterator[ThreadPoolExecutor]:
    """Own some threads; at the end of the block work that has not begun is dropped, and the threads are joined."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=f"asynctrain-{name}")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        await in_thread(pool.shutdown)


def _raising(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail
