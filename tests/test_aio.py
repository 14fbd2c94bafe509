from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures.process import BrokenProcessPool

import pytest

from asynctrain._aio import (
    Failure,
    Flow,
    Meter,
    ServingGroup,
    guest_of,
    in_thread,
    process_pool,
    source,
    stage,
    step_back,
    thread_pool,
    unwrapped,
)
from asynctrain.errors import ClosedError


async def through_stages(
    tasks: asyncio.TaskGroup,
    items: object,
    *functions: Callable[[int], Awaitable[int]],
    concurrency: int = 1,
    places: int = 1,
    ordered: bool = True,
) -> Flow[int]:
    """Start a source and one stage for each function, named stage0, stage1, ...; return the last queue."""
    flow: Flow[int] = asyncio.Queue(places)
    tasks.create_task(source(items, flow, Meter("source")), name="source")  # type: ignore[arg-type]
    for number, function in enumerate(functions):
        inbox, flow = flow, asyncio.Queue(places)
        meter = Meter(f"stage{number}", concurrency)
        tasks.create_task(stage(function, inbox, flow, tasks, meter, ordered=ordered))
    return flow


async def all_waiting() -> None:
    """Let every task go on until it waits for something that nobody in the test has done yet."""
    for _ in range(100):
        await asyncio.sleep(0)


async def drain(flow: Flow[int]) -> list[int | str]:
    """Return what comes out of a flow, failures as the text of their error."""
    out: list[int | str] = []
    while (task := await flow.get()) is not None:
        item = await task
        out.append(str(item.error) if isinstance(item, Failure) else item)
    return out


async def test_order_is_kept_when_tasks_finish_in_the_opposite_order() -> None:
    finished = [asyncio.Event() for _ in range(4)]
    log = []

    async def after_the_next(item: int) -> int:
        if item < 3:
            await finished[item + 1].wait()
        log.append(item)
        finished[item].set()
        return item * 10

    async with ServingGroup() as tasks:
        flow = await through_stages(tasks, range(4), after_the_next, concurrency=4, places=4)
        assert await drain(flow) == [0, 10, 20, 30]
    assert log == [3, 2, 1, 0]


async def test_unordered_items_come_as_they_are_done() -> None:
    may_end = asyncio.Event()

    async def the_first_is_late(item: int) -> int:
        if item == 0:
            await may_end.wait()
        return item

    async with ServingGroup() as tasks:
        flow = await through_stages(tasks, range(4), the_first_is_late, concurrency=2, ordered=False)
        assert [await (await flow.get() or pytest.fail("it ended")) for _ in range(3)] == [1, 2, 3]
        may_end.set()
        assert await drain(flow) == [0]


@pytest.mark.parametrize("ordered", [True, False])
async def test_a_failure_keeps_its_place_between_the_items_before_and_after_it(ordered: bool) -> None:
    async def read(item: int) -> int:
        if item == 1:
            raise OSError("no disk")
        return item

    async def decode(item: int) -> int:
        if item == 3:
            raise ValueError("no image")
        return -item

    async with ServingGroup() as tasks:
        flow = await through_stages(tasks, range(5), read, decode, ordered=ordered)
        assert await drain(flow) == [0, "no disk", -2, "no image", -4]


async def test_a_failure_has_a_note_that_names_its_stage_and_is_counted_there_only() -> None:
    async def fail_at_seven(item: int) -> int:
        if item == 7:
            raise ValueError(item)
        return item

    async def pass_on(item: int) -> int:
        return item

    meters = [Meter("read"), Meter("decode"), Meter("check")]
    flows: list[Flow[int]] = [asyncio.Queue(9) for _ in meters]
    async with ServingGroup() as tasks:
        await source([6, 7, 8], flows[0], meters[0])
        await stage(fail_at_seven, flows[0], flows[1], tasks, meters[1])
        await stage(pass_on, flows[1], flows[2], tasks, meters[2])
        await flows[2].get()
        task = await flows[2].get()
        assert isinstance(task, asyncio.Task)
        failure = await task
    assert task.get_name() == "check-1"
    assert isinstance(failure, Failure)
    assert failure.error.__notes__ == ["raised in the stage 'decode'"]
    assert [(meter.items, meter.failures) for meter in meters] == [(3, 0), (2, 1), (2, 0)]


@pytest.mark.parametrize("error", [StopAsyncIteration("end"), asyncio.CancelledError("end")])
@pytest.mark.parametrize("ordered", [True, False])
async def test_what_would_pass_for_an_end_is_told_as_a_failure(error: BaseException, ordered: bool) -> None:
    async def fail(item: int) -> int:
        raise error if item == 1 else KeyError(item)

    async with ServingGroup() as tasks:
        flow = await through_stages(tasks, [1], fail, ordered=ordered)
        failure = await (await flow.get() or pytest.fail("it ended"))
        assert isinstance(failure, Failure)
        assert str(failure.error) == f"a stage's function raised {type(error).__name__}"
        assert failure.error.__cause__ is error
        assert await flow.get() is None


async def test_no_more_tasks_are_begun_than_the_queue_has_places_and_two() -> None:
    begun = 0

    async def count(item: int) -> int:
        nonlocal begun
        begun += 1
        return item

    async with ServingGroup() as tasks:
        flow = await through_stages(tasks, range(100), count, concurrency=9, places=3)
        for taken in range(10):
            await all_waiting()
            assert begun == taken + 4  # three in the queue, one that waits to be put; one more is awaited by its taker
            await flow.get()


@pytest.mark.parametrize("ordered", [True, False])
async def test_as_many_are_worked_on_at_once_as_allowed_and_no_more(ordered: bool) -> None:
    gates = [asyncio.Event() for _ in range(30)]
    inside: set[int] = set()

    async def pass_the_gate(item: int) -> int:
        inside.add(item)
        await gates[item].wait()
        inside.remove(item)
        return item

    async with ServingGroup() as tasks:
        flow = await through_stages(tasks, range(30), pass_the_gate, concurrency=5, places=5, ordered=ordered)
        for first in range(26):
            await all_waiting()
            assert inside == set(range(first, first + 5))
            gates[first].set()
            assert await (await flow.get() or pytest.fail("it ended")) == first


async def test_unordered_work_does_not_run_ahead_of_a_consumer_that_takes_nothing() -> None:
    begun = 0

    async def count(item: int) -> int:
        nonlocal begun
        begun += 1
        return item

    async with ServingGroup() as tasks:
        await through_stages(tasks, range(100), count, concurrency=4, places=3, ordered=False)
        await all_waiting()
        assert begun <= 3 + 4 + 1  # in the queue, and waiting to be put into it


async def counted_up(to: int, log: list[str]) -> AsyncIterator[int]:
    try:
        for item in range(to):
            yield item
        raise OSError("the line is dead")
    finally:
        log.append("closed")


async def test_a_source_that_fails_midway_delivers_what_came_before_and_then_its_error() -> None:
    log: list[str] = []
    async with ServingGroup() as tasks:
        flow = await through_stages(tasks, counted_up(3, log))
        assert await drain(flow) == [0, 1, 2, "the line is dead"]
    assert log == ["closed"]


async def test_an_asynchronous_generator_is_closed_when_it_is_left_early() -> None:
    log: list[str] = []
    async with ServingGroup() as tasks:
        flow = await through_stages(tasks, counted_up(100, log))
        await flow.get()
        assert log == []
    assert log == ["closed"]


async def test_a_source_that_raises_a_cancellation_of_its_own_is_told_instead_of_hanging() -> None:
    class Revoked:
        def __aiter__(self) -> Revoked:
            return self

        async def __anext__(self) -> int:
            raise asyncio.CancelledError

    async with ServingGroup() as tasks:
        flow = await through_stages(tasks, Revoked())
        assert await drain(flow) == ["a stage's function raised CancelledError"]


async def test_a_plain_iterator_that_fails_is_told_in_its_place() -> None:
    def numbers() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    async with ServingGroup() as tasks:
        flow = await through_stages(tasks, numbers())
        assert await drain(flow) == [1, "'gone'"]


async def test_a_meter_counts_the_waits_on_either_side_and_how_full_its_queue_was() -> None:
    meter = Meter("read", 2)
    inbox: Flow[int] = asyncio.Queue()
    outbox: Flow[int] = asyncio.Queue(2)
    assert (meter.capacity, meter.occupancy) == (0, 0.0)
    getting = asyncio.ensure_future(meter.get(inbox))
    await asyncio.sleep(0.01)
    inbox.put_nowait(None)
    await getting
    assert meter.starved > 0.005
    done: asyncio.Future[int | Failure] = asyncio.get_running_loop().create_future()
    await meter.put(outbox, done)
    await meter.put(outbox, done)
    assert meter.blocked < 0.005
    putting = asyncio.ensure_future(meter.put(outbox, done))
    await asyncio.sleep(0.01)
    outbox.get_nowait()
    await putting
    assert meter.blocked > 0.005
    assert meter.capacity == 2
    assert meter.occupancy == pytest.approx((0 + 1 + 2) / (3 * 2))


async def test_the_tasks_of_a_serving_group_are_cancelled_when_its_block_ends() -> None:
    async with ServingGroup() as tasks:
        waiting = tasks.create_task(asyncio.Event().wait())
        await asyncio.sleep(0)
    assert waiting.cancelled()


async def test_an_error_in_the_block_comes_out_as_it_is() -> None:
    error = KeyError("mine")

    async def fail_in_the_block() -> None:
        async with ServingGroup() as tasks:
            tasks.create_task(asyncio.Event().wait())
            raise error

    with pytest.raises(KeyError) as caught:
        await fail_in_the_block()
    assert caught.value is error


async def test_an_error_of_a_task_interrupts_the_block_and_comes_out_bare() -> None:
    async def fail() -> None:
        raise KeyError("theirs")

    async def wait_in_the_block() -> None:
        async with ServingGroup() as tasks:
            tasks.create_task(fail())
            await asyncio.Event().wait()

    with pytest.raises(KeyError, match="theirs"):
        await wait_in_the_block()


async def test_a_cancellation_that_arrives_while_the_block_ends_is_not_lost() -> None:
    leaving, may_end = asyncio.Event(), asyncio.Event()

    async def slow_to_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            leaving.set()
            await may_end.wait()

    async def serve() -> None:
        async with ServingGroup() as tasks:
            tasks.create_task(slow_to_end())
            await asyncio.sleep(0)

    server = asyncio.create_task(serve())
    await leaving.wait()
    server.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await server


def test_only_a_group_of_one_is_unwrapped_and_only_once() -> None:
    inner = ExceptionGroup("inner", [ValueError(1)])
    with pytest.raises(ExceptionGroup) as caught, unwrapped():
        raise ExceptionGroup("outer", [inner])
    assert caught.value is inner
    with pytest.raises(ExceptionGroup, match="two"), unwrapped():
        raise ExceptionGroup("two", [ValueError(1), ValueError(2)])


def test_an_unwrapped_error_keeps_its_cause() -> None:
    error, cause = ValueError("what"), OSError("why")
    error.__cause__ = cause
    with pytest.raises(ValueError, match="what") as caught, unwrapped():
        raise ExceptionGroup("", [error])
    assert caught.value.__cause__ is cause


async def test_in_thread_returns_the_result_and_its_thread_has_ended() -> None:
    threads: list[threading.Thread] = []

    def add(a: int, b: int) -> int:
        threads.append(threading.current_thread())
        return a + b

    assert await in_thread(add, 2, 3) == 5
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()


@pytest.mark.parametrize("error", [OSError("disk"), StopIteration("odd"), KeyboardInterrupt()])
async def test_in_thread_raises_what_the_function_raised(error: BaseException) -> None:
    def fail() -> None:
        raise error

    outcome: BaseException | None = None
    try:
        await in_thread(fail)
    except RuntimeError as translated:  # what Python makes of a StopIteration that leaves a coroutine
        outcome = translated.__cause__
    except BaseException as raised:
        outcome = raised
    assert outcome is error


async def test_in_thread_sees_the_context_variables_of_its_caller() -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")
    name.set("caller")
    assert await in_thread(name.get) == "caller"


async def test_a_cancelled_in_thread_stops_the_function_and_waits_for_its_end() -> None:
    loop = asyncio.get_running_loop()
    started, stop, log = asyncio.Event(), threading.Event(), list[str]()

    def work() -> None:
        loop.call_soon_threadsafe(started.set)
        stop.wait()
        log.append("ended")

    task = asyncio.create_task(in_thread(work, stop=_logged(log, stop.set)))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["stop", "ended"]


async def test_cancelling_in_thread_again_does_not_leave_the_thread_behind() -> None:
    loop = asyncio.get_running_loop()
    started, asked, may_end, log = asyncio.Event(), asyncio.Event(), threading.Event(), list[str]()

    def work() -> None:
        loop.call_soon_threadsafe(started.set)
        may_end.wait()
        log.append("ended")

    task = asyncio.create_task(in_thread(work, stop=_logged(log, asked.set)))
    await started.wait()
    task.cancel()
    await asked.wait()
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["stop", "ended"]


async def test_the_threads_of_a_pool_have_ended_after_its_block_and_work_not_begun_is_dropped() -> None:
    begun, may_end, log = threading.Event(), threading.Event(), list[int]()

    def work(item: int) -> None:
        log.append(item)
        begun.set()
        may_end.wait()

    async with thread_pool(1, "test") as pool:
        futures = [pool.submit(work, item) for item in range(3)]
        await in_thread(begun.wait)
        asyncio.get_running_loop().call_later(0.01, may_end.set)
    assert log == [0]
    assert [future.cancelled() for future in futures] == [False, True, True]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asynctrain-test")]


async def test_a_guest_leaves_threads_that_go_on_with_nothing_of_its_own_on_them() -> None:
    begun, may_end = threading.Event(), threading.Event()
    log: list[str] = []

    def work(name: str) -> None:
        log.append(name)
        begun.set()
        may_end.wait()

    async with thread_pool(1, "test") as pool:
        async with guest_of(pool.submit) as guest:
            futures = [guest.submit(work, name) for name in ("under way", "not begun")]
            other = pool.submit(log.append, "the host's own")
            await in_thread(begun.wait)
            asyncio.get_running_loop().call_later(0.01, may_end.set)
        assert log[0] == "under way"
        assert [future.cancelled() for future in futures] == [False, True]
        await asyncio.wrap_future(other)
        assert log == ["under way", "the host's own"]


async def test_a_guest_that_leaves_does_not_wait_for_its_host() -> None:
    may_end = threading.Event()
    async with thread_pool(1, "test") as pool:
        hosts = pool.submit(may_end.wait, 20)
        async with guest_of(pool.submit) as guest:
            dropped = guest.submit(print)
        assert dropped.cancelled()
        assert not hosts.done()
        may_end.set()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of single threads")
async def test_a_thread_that_was_born_with_less_priority_is_not_put_up() -> None:
    def step_back_from(nice: int) -> int:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, nice)
        step_back()
        return os.getpriority(os.PRIO_PROCESS, thread)

    nice = os.getpriority(os.PRIO_PROCESS, os.getpid())
    assert await in_thread(step_back_from, nice) == min(nice + 10, 19)
    assert await in_thread(step_back_from, 19) == 19


async def test_a_guest_is_told_when_its_host_has_closed() -> None:
    async with thread_pool(1, "test") as pool, guest_of(pool.submit) as guest:
        pool.shutdown()
        with pytest.raises(ClosedError, match=r"^a pool of threads is closed$"):
            guest.submit(print)


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_a_process_that_is_at_work_when_its_block_ends_is_killed_after_its_grace() -> None:
    loop = asyncio.get_running_loop()
    async with process_pool(1, "test", grace=0.05) as pool:
        pid = await loop.run_in_executor(pool, os.getpid)
        assert pid != os.getpid()
        left = pool.submit(time.sleep, 60)
        dropped = [pool.submit(time.sleep, 60) for _ in range(5)]
        while not left.running():  # noqa: ASYNC110 (no event tells that another process has begun)
            await asyncio.sleep(0.001)
        start = time.perf_counter()
    assert time.perf_counter() - start < 2
    assert has_ended(pid)
    assert isinstance(left.exception(0), BrokenProcessPool)
    assert dropped[-1].cancelled()


async def test_processes_leave_the_interrupts_of_the_keyboard_to_their_parent() -> None:
    loop = asyncio.get_running_loop()
    async with process_pool(1, "test") as pool:
        pid = await loop.run_in_executor(pool, os.getpid)
        os.kill(pid, signal.SIGINT)
        assert await loop.run_in_executor(pool, os.getpid) == pid
    assert has_ended(pid)


def _logged(log: list[str], function: Callable[[], None]) -> Callable[[], None]:
    def stop() -> None:
        log.append("stop")
        function()

    return stop


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of single threads")
async def test_the_threads_of_a_pool_stand_back_for_the_loop() -> None:
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    async with thread_pool(1, "test") as threads:
        assert await asyncio.get_running_loop().run_in_executor(threads, priority) > priority()
