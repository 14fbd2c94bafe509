"""Pipelines of your own: a source, and stages between bounded queues, as an asynchronous stream.

    pipeline = Pipeline(paths).map(load, concurrency=4).filter(is_wanted).batch(32).prefetch(2)
    async with pipeline.open() as stream:
        async for batch in stream:
            ...
        print(stream.report())

A pipeline is a description and can be opened many times; what is opened owns its tasks, threads and processes, and
leaves none behind. ``Loader`` is such a pipeline, ready-made for labelled images.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from concurrent.futures import BrokenExecutor, Executor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast, overload

from asynctrain._aio import (
    Failure,
    Flow,
    Meter,
    ServingGroup,
    Worked,
    finished,
    noted,
    process_pool,
    source,
    stage,
    thread_pool,
)
from asynctrain.data.statistics import Statistics, snapshot
from asynctrain.errors import ClosedError, ExecutorError

T = TypeVar("T", covariant=True)
A = TypeVar("A")
B = TypeVar("B")
Home = Literal["threads", "processes"]
Feed = Callable[[Flow[Any], Meter], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class _Map:
    """Do something to each item; ``executor`` is None for coroutine functions, which run on the loop."""

    name: str
    function: Callable[[Any], Any]
    concurrency: int
    executor: Home | Executor | None
    ordered: bool


@dataclass(frozen=True, slots=True)
class _Gather:
    """Regroup the stream: a coroutine between two queues, for what does not go item by item."""

    name: str
    run: Callable[[Flow[Any], Flow[Any], Meter], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Dropped:
    """What a filter leaves in the place of an item that it drops."""


@dataclass(frozen=True, slots=True)
class _Keep:
    """A predicate as a function of one item; an object of the module, so that it can travel to a process."""

    predicate: Callable[[Any], bool]

    def __call__(self, item: Any) -> Any:
        return item if self.predicate(item) else _Dropped()


@dataclass(frozen=True, slots=True)
class Pipeline(Generic[T]):
    """A source and stages; each method returns a new pipeline with one stage more.

    Args:
        source: any iterable, iterated on the loop (so it must be quick), any asynchronous one, or a ``Feed``: a
            coroutine function that does ``hand_on`` with each item, for a source that is a block (``async with``).
    """

    source: Iterable[Any] | AsyncIterable[Any] | Feed
    _stages: tuple[_Map | _Gather, ...] = ()
    _prefetch: int = 2
    _hints: dict[str, str] = field(default_factory=dict)

    if TYPE_CHECKING:  # the items of a new pipeline are those of its source

        def __init__(self, source: Iterable[T] | AsyncIterable[T] | Feed, /) -> None: ...

    @overload
    def map(
        self,
        function: Callable[[Any], Coroutine[Any, Any, B]],
        *,
        concurrency: int = ...,
        ordered: bool = ...,
        name: str | None = ...,
    ) -> Pipeline[B]: ...
    @overload
    def map(
        self,
        function: Callable[[Any], B],
        *,
        concurrency: int = ...,
        executor: Home | Executor = ...,
        ordered: bool = ...,
        name: str | None = ...,
    ) -> Pipeline[B]: ...
    def map(
        self,
        function: Callable[[Any], Any],
        *,
        concurrency: int = 1,
        executor: Home | Executor = "threads",
        ordered: bool = True,
        name: str | None = None,
    ) -> Pipeline[Any]:
        """Do ``function`` to each item.

        Args:
            function: plain, or a coroutine function, which runs on the loop.
            concurrency: how many items are worked on at once, 1 or more.
            executor: where plain functions run: ``"threads"`` or ``"processes"`` of the pipeline's own, or any
                ``concurrent.futures`` executor, which stays yours to shut down. For processes the function must be
                importable by its name, as ``multiprocessing`` wants it.
            ordered: keep the order of items; else they come as they are done.
            name: of the stage, in errors and statistics; by default the function's.

        Where handing over each item costs more than the work on it (35-90 us for a thread, some more for a process),
        let the items be lists of what is to be worked on, see ``chunked``.
        """
        if concurrency < 1:
            raise ValueError(f"concurrency must be 1 or more, got {concurrency}")
        if not isinstance(executor, Executor) and executor not in ("threads", "processes"):
            raise ValueError(f"executor must be 'threads', 'processes' or a concurrent.futures one, got {executor!r}")
        name = name or str(getattr(function, "__name__", type(function).__name__))
        home = None if _is_async(function) else executor
        return self._with(_Map(self._unique(name), function, concurrency, home, ordered))

    def filter(
        self, predicate: Callable[[Any], bool], *, concurrency: int = 1, executor: Home | Executor = "threads"
    ) -> Pipeline[T]:
        """Keep the items for which ``predicate``, a plain function, is true; arguments as for ``map``."""
        if _is_async(predicate):
            raise TypeError(f"predicate must be a plain function, got the coroutine function {predicate!r}")
        name = getattr(predicate, "__name__", "filter")
        pipeline = self.map(_Keep(predicate), concurrency=concurrency, executor=executor, name=name)
        return cast("Pipeline[T]", pipeline._with(_Gather(self._unique(f"{name}-kept"), _drop)))

    def batch(self, size: int, *, drop_last: bool = False) -> Pipeline[list[T]]:
        """Collect the items in lists of ``size``, 1 or more; the last may be shorter unless ``drop_last``."""
        if size < 1:
            raise ValueError(f"size must be 1 or more, got {size}")

        async def collect(inbox: Flow[Any], outbox: Flow[Any], meter: Meter) -> None:
            batch: list[Any] = []
            async for item in arriving(inbox, meter):
                if isinstance(item, Failure):
                    await hand_on(item, outbox, meter)
                    return
                batch.append(item)
                if len(batch) == size:
                    await hand_on(batch, outbox, meter)
                    batch = []
            if batch and not drop_last:
                await hand_on(batch, outbox, meter)

        return cast("Pipeline[list[T]]", self._with(_Gather(self._unique("batch"), collect)))

    def chunked(self, size: int) -> Pipeline[list[T]]:
        """Let items travel in lists of ``size``, so that ``map`` gets many at once: ``batch`` under its other use."""
        return self.batch(size)

    def through(self, run: Callable[[Flow[Any], Flow[Any], Meter], Awaitable[None]], *, name: str) -> Pipeline[Any]:
        """Add a stage that regroups the stream: a coroutine that reads ``arriving(inbox)`` and does ``hand_on``."""
        return self._with(_Gather(self._unique(name), run))

    def prefetch(self, items: int) -> Pipeline[T]:
        """Let ``items``, 1 or more, wait for the consumer; by default 2."""
        if items < 1:
            raise ValueError(f"prefetch must be 1 or more, got {items}")
        return replace(self, _prefetch=items)

    def hint(self, **hints: str) -> Pipeline[T]:
        """Say for stages, by name, what would help where they are the bottleneck; ``report`` repeats it."""
        return replace(self, _hints={**self._hints, **hints})

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Stream[T]]:
        """Start the stages and hand out the stream.

        Leaving the block, in whatever way, stops them: tasks are cancelled, threads and processes end after the item
        they are at, and are waited for. Bounds: a stage has begun at most ``2 * concurrency + 2`` items that the next
        one has not taken, the last one ``max(prefetch, concurrency) + concurrency + 2``.

        Raises (while iterating): what a function or the source raised, in the place of its item; ``ExecutorError``
        where a worker process died; ``ClosedError`` after the block.
        """
        meters = [Meter("source")]
        async with AsyncExitStack() as pools, ServingGroup() as tasks:
            flow: Flow[Any] = asyncio.Queue(1 if self._stages else self._prefetch)
            tasks.create_task(_sourced(self.source, flow, meters[0]), name="source")
            for index, step in enumerate(self._stages):
                meters.append(Meter(step.name, getattr(step, "concurrency", 1)))
                ahead = self._prefetch if index == len(self._stages) - 1 else 1
                outbox: Flow[Any] = asyncio.Queue(max(ahead, meters[-1].concurrency))
                runner = await _runner(step, flow, outbox, tasks, meters[-1], pools)
                tasks.create_task(runner, name=step.name)
                flow = outbox
            stream: Stream[T] = Stream(flow, meters, self._hints)
            try:
                yield stream
            finally:
                stream.close()

    def _with(self, step: _Map | _Gather) -> Pipeline[Any]:
        return replace(cast("Pipeline[Any]", self), _stages=(*self._stages, step))

    def _unique(self, name: str) -> str:
        taken = {"source", *(step.name for step in self._stages)}
        return name if name not in taken else next(f"{name}-{n}" for n in range(2, 1000) if f"{name}-{n}" not in taken)

    def __repr__(self) -> str:
        return f"<Pipeline {' -> '.join(['source', *(step.name for step in self._stages)])}>"


async def _runner(
    step: _Map | _Gather,
    inbox: Flow[Any],
    outbox: Flow[Any],
    tasks: asyncio.TaskGroup,
    meter: Meter,
    pools: AsyncExitStack,
) -> Any:
    """Return the coroutine of a stage; what it needs to run in is opened on ``pools``."""
    if isinstance(step, _Gather):
        return _to_its_end(partial(step.run, inbox, outbox, meter), outbox, meter)
    function = step.function
    if step.executor is not None:
        function = _in_executor(step, await _opened(step, pools))
    return stage(function, inbox, outbox, tasks, meter, ordered=step.ordered)


async def _opened(step: _Map, pools: AsyncExitStack) -> Executor:
    if isinstance(step.executor, Executor):
        return step.executor
    pool = thread_pool if step.executor == "threads" else process_pool
    return await pools.enter_async_context(pool(step.concurrency, step.name))


def _in_executor(step: _Map, executor: Executor) -> Callable[[Any], Awaitable[Any]]:
    async def call(item: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, _called, step.function, item)
        except BrokenExecutor as error:
            raise ExecutorError(f"processes of stage {step.name!r}", "a worker process died") from error

    return call


def _is_async(function: Callable[..., Any]) -> bool:
    """Whether ``function`` is a coroutine function, or an object whose ``__call__`` is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


def _called(function: Callable[[Any], Any], item: Any) -> Worked[Any]:
    """Return ``function(item)``; no future can hold a ``StopIteration``, whoever waited for it would wait for ever."""
    start = perf_counter()
    try:
        return Worked(function(item), perf_counter() - start)
    except StopIteration as error:
        raise RuntimeError("a stage's function raised StopIteration") from error


async def _sourced(items: Iterable[Any] | AsyncIterable[Any] | Feed, outbox: Flow[Any], meter: Meter) -> None:
    if isinstance(items, Iterable | AsyncIterable):
        return await source(items, outbox, meter)
    return await _to_its_end(partial(items, outbox, meter), outbox, meter)


async def _to_its_end(fill: Callable[[], Awaitable[None]], outbox: Flow[Any], meter: Meter) -> None:
    """Have ``outbox`` filled, and an error told in the place of the next item."""
    try:
        await fill()
    except (Exception, asyncio.CancelledError) as error:
        await hand_on(noted(error, meter), outbox, meter)
    await outbox.put(None)


async def arriving(inbox: Flow[A], meter: Meter) -> AsyncIterator[A | Failure]:
    """Yield what comes out of ``inbox``, done, in its order, failures included."""
    while (task := await meter.get(inbox)) is not None:
        start = perf_counter()
        item = await task
        begun, blocked = perf_counter(), meter.blocked
        meter.starved += begun - start
        yield item
        meter.busy += perf_counter() - begun - (meter.blocked - blocked)


async def hand_on(item: A | Failure, outbox: Flow[A], meter: Meter) -> None:
    """Put a finished item into ``outbox``."""
    if not isinstance(item, Failure):
        meter.count(item)
    await meter.put(outbox, finished(item))


async def _drop(inbox: Flow[Any], outbox: Flow[Any], meter: Meter) -> None:
    async for item in arriving(inbox, meter):
        if not isinstance(item, _Dropped):
            await hand_on(item, outbox, meter)


class Stream(AsyncIterator[T]):
    """An opened pipeline.

    What ends it, its last item or an error or its closing, is told to whoever asks again.
    """

    def __init__(self, flow: Flow[Any], meters: list[Meter], hints: dict[str, str]) -> None:
        self._flow = flow
        self._meters = meters
        self._hints = hints
        self._opened = perf_counter()
        self._waited = 0.0
        self._end: Exception | None = None
        self._turn = asyncio.Lock()
        self._taken: asyncio.Future[Any] | None = None  # out of the queue, but not handed to anyone yet

    async def __anext__(self) -> T:
        start = perf_counter()
        try:
            return await self._next()
        finally:
            self._waited += perf_counter() - start

    async def _next(self) -> T:
        async with self._turn:  # one at a time: who is cancelled while waiting leaves the item to who asks next
            if self._end is None:
                task = self._taken = self._taken or await self._flow.get() or finished(Failure(StopAsyncIteration()))
                if not task.done():
                    await asyncio.wait([task])  # a bare await would take the tasks' cancellation for our own
            if self._end is None:
                item, self._taken = task.result(), None
                if not isinstance(item, Failure):
                    return cast("T", item)
                self._end = item.error
            raise self._end

    def close(self) -> None:
        """Let ``ClosedError`` be raised from now on, to those that wait too."""
        self._end = ClosedError("a stream was used after its block had ended")
        self._wake()

    def _wake(self) -> None:
        """Let the next one who waits for an item see the end."""
        if self._flow.empty():
            self._flow.put_nowait(None)

    def statistics(self) -> Statistics:
        """Return what the stages did and waited for so far."""
        seconds = perf_counter() - self._opened
        stages = tuple(snapshot(meter, seconds) for meter in self._meters)
        return Statistics(seconds, stages, self._waited, self._hints)

    def report(self) -> str:
        """Return one sentence on what holds the stream up, and a table of its stages."""
        return self.statistics().report()

    def __repr__(self) -> str:
        waiting = f"{self._flow.qsize()} of {self._flow.maxsize} read ahead"
        return f"<Stream {' -> '.join(meter.name for meter in self._meters)}: {waiting}>"
