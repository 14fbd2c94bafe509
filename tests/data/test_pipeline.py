"""Pipelines of one's own: what they deliver, in which order, how far ahead, and what ends them."""

from __future__ import annotations

import asyncio
import gc
import math
import operator
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asynctrain._aio import Failure, Flow, Meter
from asynctrain.data.pipeline import Pipeline, arriving, hand_on
from asynctrain.errors import ClosedError, ExecutorError
from tests.processes import children

NO_ROOT = "math domain error|expected a nonnegative input"  # before Python 3.14, and since


async def collect(pipeline: Pipeline[Any]) -> list[Any]:
    async with pipeline.open() as stream:
        return [item async for item in stream]


async def deliver(stream: AsyncIterator[Any], into: list[Any]) -> None:
    async for item in stream:
        into.append(item)  # noqa: PERF401 (a comprehension would lose what came before an error)


async def all_waiting() -> None:
    """Let every task go on until it waits for something that nobody in the test has done yet."""
    for _ in range(100):
        await asyncio.sleep(0)


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()  # noqa: S108


def pipeline_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("asynctrain")]


async def double(item: int) -> int:
    await asyncio.sleep(0)
    return 2 * item


def is_odd(item: int) -> bool:
    return item % 2 == 1


def is_even(item: int) -> bool:
    return item % 2 == 0


class Gate:
    """A plain function that lets each item pass when the test says so, and knows which are inside."""

    def __init__(self, items: int) -> None:
        self.gates = [threading.Event() for _ in range(items)]
        self.inside: set[int] = set()
        self.most = 0
        self._lock = threading.Lock()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __call__(self, item: int) -> int:
        with self._lock:
            self.inside.add(item)
            self.most = max(self.most, len(self.inside))
        self._loop.call_soon_threadsafe(self._changed.set)
        self.gates[item].wait()
        with self._lock:
            self.inside.remove(item)
        return item

    async def until_inside(self, *items: int) -> None:
        while self.inside != set(items):
            self._changed.clear()
            await self._changed.wait()

    def open_all(self) -> None:
        for gate in self.gates:
            gate.set()


# What is delivered


async def test_items_pass_the_stages_in_their_order() -> None:
    pipeline = Pipeline(range(7)).map(double, concurrency=3).map(operator.neg, concurrency=2).batch(3)
    assert await collect(pipeline) == [[0, -2, -4], [-6, -8, -10], [-12]]


@settings(max_examples=30)
@given(
    items=st.lists(st.integers(), max_size=40),
    stages=st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["threads", "async"]), st.integers(1, 5)),
            st.tuples(st.sampled_from(["filter", "batch and flatten"]), st.integers(1, 5)),
        ),
        max_size=4,
    ),
    prefetch=st.integers(1, 4),
)
async def test_any_ordered_pipeline_does_what_a_loop_would(
    items: list[int], stages: list[tuple[str, int]], prefetch: int
) -> None:
    async def flatten(inbox: Flow[list[int]], outbox: Flow[int], meter: Meter) -> None:
        async for batch in arriving(inbox, meter):
            assert not isinstance(batch, Failure)
            for item in batch:
                await hand_on(item, outbox, meter)

    pipeline: Pipeline[Any] = Pipeline(items).prefetch(prefetch)
    expected = items
    for kind, number in stages:
        if kind == "threads":
            pipeline, expected = pipeline.map(operator.neg, concurrency=number), [-item for item in expected]
        elif kind == "async":
            pipeline, expected = pipeline.map(double, concurrency=number), [2 * item for item in expected]
        elif kind == "filter":
            pipeline = pipeline.filter(is_odd, concurrency=number)
            expected = [item for item in expected if item % 2]
        else:
            pipeline = pipeline.batch(number).through(flatten, name="flatten")
    assert await collect(pipeline) == expected


@pytest.mark.parametrize("function", [operator.neg, double])
async def test_an_unordered_map_delivers_each_item_exactly_once(function: Callable[[int], Any]) -> None:
    out = await collect(Pipeline(range(200)).map(function, concurrency=7, ordered=False))
    factor = 2 if function is double else -1
    assert Counter(out) == Counter(factor * item for item in range(200))


async def test_an_unordered_map_does_not_wait_for_one_that_is_late() -> None:
    gate = Gate(6)
    for quick in gate.gates[1:]:
        quick.set()
    async with Pipeline(range(6)).map(gate, concurrency=2, ordered=False).open() as stream:
        assert [await anext(stream) for _ in range(5)] == [1, 2, 3, 4, 5]
        gate.open_all()
        assert [item async for item in stream] == [0]


async def test_batches_have_their_size_and_the_last_one_the_rest_unless_dropped() -> None:
    assert await collect(Pipeline(range(7)).batch(3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert await collect(Pipeline(range(7)).batch(3, drop_last=True)) == [[0, 1, 2], [3, 4, 5]]
    assert await collect(Pipeline(range(6)).chunked(3).map(sum)) == [3, 12]
    assert await collect(Pipeline([]).batch(3)) == []


async def test_a_filter_keeps_what_its_predicate_says_also_none_and_false() -> None:
    kept = await collect(Pipeline([None, 0, 3, False]).filter(lambda item: item != 3, concurrency=2))
    assert kept == [None, 0, False]


async def test_a_pipeline_without_stages_delivers_its_source() -> None:
    assert await collect(Pipeline(range(5))) == [0, 1, 2, 3, 4]
    async with Pipeline(range(100)).prefetch(7).open() as stream:
        await all_waiting()
        assert "7 of 7 read ahead" in repr(stream)


async def test_objects_with_an_asynchronous_call_run_on_the_loop() -> None:
    class Adds:
        def __init__(self, number: int) -> None:
            self.number = number

        async def __call__(self, item: int) -> int:
            assert threading.current_thread() is threading.main_thread()
            return item + self.number

    function: Any = Adds(3)
    assert await collect(Pipeline(range(3)).map(function)) == [3, 4, 5]
    assert await collect(Pipeline(range(3)).map(partial(_add, 3))) == [3, 4, 5]


async def _add(number: int, item: int) -> int:
    return item + number


async def test_a_feed_hands_on_its_items_and_its_error() -> None:
    async def feed(outbox: Flow[int], meter: Meter) -> None:
        for item in range(3):
            await hand_on(item, outbox, meter)
        raise OSError("the line is dead")

    delivered: list[int] = []
    async with Pipeline(feed).map(double).open() as stream:
        with pytest.raises(OSError, match="the line is dead") as caught:
            await deliver(stream, delivered)
    assert delivered == [0, 2, 4]
    assert caught.value.__notes__ == ["raised in the stage 'source'"]


async def test_a_pipeline_can_be_opened_again_and_twice_at_once() -> None:
    pipeline = Pipeline(range(30)).filter(is_even, concurrency=2).map(double, concurrency=4).map(operator.neg)
    both = await asyncio.gather(collect(pipeline), collect(pipeline))
    assert list(both) == [[-item for item in range(0, 60, 4)]] * 2
    in_pairs = pipeline.batch(2)
    async with in_pairs.open() as first, in_pairs.open() as second:
        mixed = [await anext(stream) for _ in range(8) for stream in (first, second)]
    assert mixed[::2] == mixed[1::2] == await collect(in_pairs)


def test_each_method_leaves_the_pipeline_it_is_called_on_as_it_is() -> None:
    pipeline = Pipeline(range(3))
    pipeline.map(operator.neg)
    assert repr(pipeline) == "<Pipeline source>"
    longer = pipeline.map(operator.neg).map(operator.neg).filter(is_odd).map(operator.neg, name="source").batch(2)
    assert repr(longer) == "<Pipeline source -> neg -> neg-2 -> is_odd -> is_odd-kept -> source-2 -> batch>"


# Executors


async def test_functions_and_predicates_run_in_processes_of_the_pipelines_own_that_are_gone_afterwards() -> None:
    shared = shared_memory()
    pipeline = Pipeline(range(6)).filter(operator.truth, executor="processes")
    pipeline = pipeline.map(math.factorial, concurrency=2, executor="processes")
    assert await collect(pipeline) == [1, 2, 6, 24, 120]
    assert shared_memory() == shared


async def test_an_executor_of_the_users_own_is_used_and_left_alone() -> None:
    with ThreadPoolExecutor(1, "mine") as mine:
        pipeline = Pipeline(range(3)).map(lambda _: threading.current_thread().name, executor=mine)
        assert await collect(pipeline) == ["mine_0"] * 3
        assert mine.submit(operator.neg, 3).result() == -3


async def test_an_executor_that_is_shut_down_underneath_is_told_instead_of_hanging() -> None:
    gate = Gate(4)
    with ThreadPoolExecutor(1) as mine:
        async with Pipeline(range(4)).map(gate, concurrency=3, executor=mine).batch(1).open() as stream:
            await gate.until_inside(0)
            await all_waiting()
            mine.shutdown(wait=False, cancel_futures=True)
            gate.open_all()
            assert await anext(stream) == [0]
            with pytest.raises(RuntimeError, match="a stage's function raised CancelledError"):
                await anext(stream)


async def test_the_loops_default_executor_is_not_used() -> None:
    await collect(Pipeline(range(9)).map(operator.neg, concurrency=3))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncio_")]


# Bounds


async def test_asynchronous_functions_have_as_many_in_flight_as_allowed_with_any_prefetch() -> None:
    """No clock: each item may go on only when 32 of them are inside."""
    inside, full = 0, asyncio.Event()

    async def wait_for_the_others(item: int) -> int:
        nonlocal inside
        inside += 1
        if inside == 32:
            full.set()
        await full.wait()
        return item

    pipeline = Pipeline(range(64)).map(wait_for_the_others, concurrency=32).prefetch(1)
    async with asyncio.timeout(5):
        assert await collect(pipeline) == list(range(64))


@pytest.mark.parametrize("ordered", [True, False])
async def test_no_more_threads_than_allowed_are_inside_a_function(ordered: bool) -> None:
    gate = Gate(20)
    async with Pipeline(range(20)).map(gate, concurrency=3, ordered=ordered).open() as stream:
        for first in range(18):
            await gate.until_inside(first, first + 1, first + 2)
            gate.gates[first].set()
            assert await anext(stream) == first
        gate.open_all()
        assert {item async for item in stream} == {18, 19}
    assert gate.most == 3


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize(("concurrency", "prefetch"), [(1, 1), (1, 5), (4, 2)])
async def test_the_source_is_never_read_further_ahead_than_documented(
    ordered: bool, concurrency: int, prefetch: int
) -> None:
    read = 0

    def numbers() -> Iterator[int]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield number

    first = Pipeline(numbers()).map(double, concurrency=concurrency, ordered=ordered)
    pipeline = first.map(double, concurrency=concurrency, ordered=ordered).prefetch(prefetch)
    bound = 2 + (2 * concurrency + 2) + (max(prefetch, concurrency) + concurrency + 2)
    async with pipeline.open() as stream:
        for taken in range(1, 50):
            await anext(stream)
            await all_waiting()
            waiting = re.search(r"(\d+) of (\d+) read ahead", repr(stream))
            assert waiting is not None
            assert int(waiting[1]) <= int(waiting[2]) == max(prefetch, concurrency)
            assert prefetch <= read - taken <= bound


async def test_batches_read_ahead_only_as_far_as_prefetch_says() -> None:
    async with Pipeline(range(10**6)).batch(10).prefetch(3).open() as stream:
        await all_waiting()
        assert "3 of 3 read ahead" in repr(stream)
        assert stream.statistics().stages[0].items <= (3 + 1 + 1) * 10


# Errors and ends


@pytest.mark.parametrize("executor", ["threads", "processes"])
async def test_an_error_of_a_function_comes_in_the_place_of_its_item_and_names_the_stage(executor: Any) -> None:
    delivered: list[float] = []
    async with Pipeline([0, 1, -1, 3]).map(math.sqrt, concurrency=2, executor=executor, name="root").open() as stream:
        with pytest.raises(ValueError, match=NO_ROOT) as caught:
            await deliver(stream, delivered)
        assert delivered == [0.0, 1.0]
        assert "raised in the stage 'root'" in caught.value.__notes__
        with pytest.raises(ValueError, match=NO_ROOT):  # asking again does not get past it
            await anext(stream)


async def test_an_error_passes_batches_and_filters_and_what_came_before_a_full_batch_is_not_delivered() -> None:
    delivered: list[list[float]] = []
    pipeline = Pipeline([4, 1, 9, -1, 16]).map(math.sqrt).filter(bool).batch(2)
    async with pipeline.open() as stream:
        with pytest.raises(ValueError, match=NO_ROOT):
            await deliver(stream, delivered)
    assert delivered == [[2.0, 1.0]]


@pytest.mark.parametrize("error", [StopIteration("end"), StopAsyncIteration("end")])
@pytest.mark.parametrize("on_the_loop", [True, False])
@pytest.mark.parametrize("size", [None, 2])
async def test_an_error_that_means_the_end_to_python_neither_ends_nor_hangs_the_stream(
    error: Exception, on_the_loop: bool, size: int | None
) -> None:
    def fail(item: int) -> int:
        if item == 2:
            raise error
        return item

    async def fail_on_the_loop(item: int) -> int:
        return fail(item)

    pipeline: Pipeline[Any] = Pipeline(range(5)).map(fail_on_the_loop if on_the_loop else fail)
    if size:
        pipeline = pipeline.batch(size)
    async with asyncio.timeout(5), pipeline.open() as stream:
        for _ in range(2 // (size or 1)):
            await anext(stream)
        with pytest.raises(RuntimeError, match=r"StopIteration|StopAsyncIteration"):
            await anext(stream)


async def test_an_error_of_a_stage_that_regroups_comes_after_what_it_handed_on() -> None:
    async def give_up(inbox: Flow[int], outbox: Flow[int], meter: Meter) -> None:
        async for item in arriving(inbox, meter):
            assert not isinstance(item, Failure)
            if item == 2:
                raise KeyError("enough")
            await hand_on(item, outbox, meter)

    delivered: list[int] = []
    async with Pipeline(range(9)).through(give_up, name="give up").open() as stream:
        with pytest.raises(KeyError, match="enough") as caught:
            await deliver(stream, delivered)
    assert delivered == [0, 1]
    assert caught.value.__notes__ == ["raised in the stage 'give up'"]


async def test_a_source_that_fails_midway_delivers_what_came_before() -> None:
    async def numbers() -> AsyncIterator[int]:
        for number in range(3):
            yield number
        raise ConnectionError("the line is dead")

    delivered: list[int] = []
    async with Pipeline(numbers()).map(operator.neg, concurrency=3).open() as stream:
        with pytest.raises(ConnectionError, match="the line is dead"):
            await deliver(stream, delivered)
    assert delivered == [0, -1, -2]


async def test_a_process_that_kills_itself_is_told_and_nothing_is_left() -> None:
    shared = shared_memory()
    delivered: list[None] = []
    signals = [signal.SIGINT, signal.SIGINT, signal.SIGKILL]  # they ignore interrupts
    pipeline = Pipeline(signals).map(signal.raise_signal, executor="processes", name="work")
    async with asyncio.timeout(10), pipeline.open() as stream:
        with pytest.raises(ExecutorError, match="processes of stage 'work': a worker process died") as caught:
            await deliver(stream, delivered)
    assert delivered == [None, None]
    assert caught.value.__notes__ == ["raised in the stage 'work'"]
    assert shared_memory() == shared


async def test_a_process_killed_from_outside_is_told_within_a_second_and_nothing_is_left() -> None:
    shared = shared_memory()
    pipeline = Pipeline([0, 60, 60]).map(time.sleep, executor="processes", concurrency=2)
    before = children()
    async with pipeline.open() as stream:
        await anext(stream)  # they are up
        victim = next(iter(children() - before))
        os.kill(victim, signal.SIGKILL)
        start = time.perf_counter()
        with pytest.raises(ExecutorError, match="a worker process died"):
            await anext(stream)
    assert time.perf_counter() - start < 1
    assert children() == before
    assert shared_memory() == shared


# Leaving


async def test_after_the_end_every_further_ask_is_told_that_it_is_the_end() -> None:
    async with Pipeline(range(3)).map(double).open() as stream:
        assert [item async for item in stream] == [0, 2, 4]
        for _ in range(3):
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
    with pytest.raises(ClosedError, match="a stream was used after its block had ended"):
        await anext(stream)


@pytest.mark.parametrize("ordered", [True, False])
async def test_leaving_early_leaves_no_thread_and_no_task(ordered: bool) -> None:
    before = asyncio.all_tasks()
    pipeline = Pipeline(range(10**6)).map(operator.neg, concurrency=3, ordered=ordered).filter(bool).batch(3)
    async with pipeline.open() as stream:
        async for _ in stream:
            break
        assert {"source", "neg", "bool", "bool-kept", "batch"} <= {task.get_name() for task in asyncio.all_tasks()}
        assert pipeline_threads()
    assert asyncio.all_tasks() == before
    assert pipeline_threads() == []


@pytest.mark.parametrize("ordered", [True, False])
async def test_cancelling_at_any_moment_leaves_no_thread_and_no_task(ordered: bool) -> None:
    pipeline = Pipeline(range(10**6)).map(operator.neg, concurrency=3, ordered=ordered).map(double).batch(3)
    before = asyncio.all_tasks()
    for turns in [*range(12), 40, 80]:
        task = asyncio.create_task(collect(pipeline))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before
        assert pipeline_threads() == []


async def test_leaving_waits_for_the_item_that_a_thread_is_at_and_begins_no_other() -> None:
    gate = Gate(9)
    log: list[str] = []

    async def leave() -> None:
        async with Pipeline(range(9)).map(gate, concurrency=2).open():
            await gate.until_inside(0, 1)
            log.append("leaving")
        log.append("left")

    task = asyncio.create_task(leave())
    while not log:  # noqa: ASYNC110 (the gate's own event is waited for in the task)
        await asyncio.sleep(0)
    await all_waiting()
    assert log == ["leaving"]
    gate.open_all()
    await task
    assert gate.most == 2
    assert gate.inside == set()


async def test_an_error_of_the_caller_leaves_the_block_as_it_is() -> None:
    error = KeyError("mine")

    async def fail_in_the_block() -> None:
        async with Pipeline(range(10**6)).map(operator.neg, concurrency=3).open() as stream:
            await anext(stream)
            raise error

    with pytest.raises(KeyError) as caught:
        await fail_in_the_block()
    assert caught.value is error
    assert pipeline_threads() == []


async def test_a_timeout_around_a_pipeline_just_works() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await collect(Pipeline(iter(int, 1)).map(double))


async def test_who_is_cancelled_while_waiting_for_an_item_loses_none() -> None:
    """Cancel each ask after another number of the loop's turns; what the others get must still be everything."""
    delivered: list[int] = []
    turns = 0
    async with Pipeline(range(60)).map(double, concurrency=3).open() as stream:
        while len(delivered) < 60:
            ask = asyncio.ensure_future(anext(stream))
            for _ in range(turns % 7):
                await asyncio.sleep(0)
            turns += 1
            ask.cancel()
            await asyncio.wait([ask])
            delivered += [] if ask.cancelled() else [ask.result()]
    assert delivered == [2 * item for item in range(60)]
    assert turns > 60, "some were cancelled"


async def test_several_consumers_share_the_items_and_each_is_told_the_end() -> None:
    async with Pipeline(range(50)).map(double, concurrency=3).open() as stream:
        shares: list[list[int]] = [[] for _ in range(4)]
        await asyncio.gather(*(deliver(stream, share) for share in shares))
    assert sorted(item for share in shares for item in share) == [2 * item for item in range(50)]


async def test_several_consumers_that_wait_are_told_when_the_block_ends() -> None:
    never = asyncio.Event()

    async def wait(item: int) -> int:
        await never.wait()
        return item

    async with Pipeline(range(9)).map(wait, concurrency=3).open() as stream:
        waiting = [asyncio.ensure_future(anext(stream)) for _ in range(3)]
        await all_waiting()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ClosedError] * 3


async def test_a_pipeline_that_was_left_holds_no_item() -> None:
    class Item:
        pass

    async with Pipeline([Item() for _ in range(9)]).map(lambda _: Item(), concurrency=2).open() as stream:
        await anext(stream)
        await all_waiting()
    del stream
    gc.collect()
    assert not [found for found in gc.get_objects() if type(found) is Item]


# Arguments


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda pipeline: pipeline.map(operator.neg, concurrency=0), "concurrency must be 1 or more, got 0"),
        (lambda pipeline: pipeline.filter(is_odd, concurrency=-1), "concurrency must be 1 or more, got -1"),
        (
            lambda pipeline: pipeline.map(operator.neg, executor="gpu"),
            "executor must be 'threads', 'processes' or a concurrent.futures one, got 'gpu'",
        ),
        (lambda pipeline: pipeline.batch(0), "size must be 1 or more, got 0"),
        (lambda pipeline: pipeline.chunked(-2), "size must be 1 or more, got -2"),
        (lambda pipeline: pipeline.prefetch(0), "prefetch must be 1 or more, got 0"),
    ],
)
def test_wrong_arguments_are_told(build: Callable[[Pipeline[int]], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(Pipeline(range(3)))


def test_a_predicate_that_is_a_coroutine_function_is_refused_for_it_would_keep_everything() -> None:
    predicate: Any = double
    with pytest.raises(TypeError, match="predicate must be a plain function, got the coroutine function"):
        Pipeline(range(3)).filter(predicate)
