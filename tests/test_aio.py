from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable

import pytest

from asynctrain._aio import Failure, Flow, ServingGroup, in_thread, source, stage, unwrapped


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

    flow: Flow[int] = asyncio.Queue(4)
    async with ServingGroup() as tasks:
        tasks.create_task(source(after_the_next, range(4), flow, tasks, "read"))
        assert await drain(flow) == [0, 10, 20, 30]
    assert log == [3, 2, 1, 0]


async def test_a_failure_keeps_its_place_between_the_items_before_and_after_it() -> None:
    async def read(item: int) -> int:
        if item == 1:
            raise OSError("no disk")
        return item

    async def decode(item: int) -> int:
        if item == 3:
            raise ValueError("no image")
        return -item

    read_flow: Flow[int] = asyncio.Queue(1)
    flow: Flow[int] = asyncio.Queue(1)
    async with ServingGroup() as tasks:
        tasks.create_task(source(read, range(5), read_flow, tasks, "read"))
        tasks.create_task(stage(decode, read_flow, flow, tasks, "decode"))
        assert await drain(flow) == [0, "no disk", -2, "no image", -4]


async def test_a_failure_has_a_note_that_names_the_task_and_so_the_stage() -> None:
    async def fail(item: int) -> int:
        raise ValueError(item)

    flow: Flow[int] = asyncio.Queue(3)
    async with ServingGroup() as tasks:
        tasks.create_task(source(fail, [7, 8], flow, tasks, "decode"))
        await flow.get()
        task = await flow.get()
        assert task is not None
        failure = await task
    assert task.get_name() == "decode-1"
    assert isinstance(failure, Failure)
    assert failure.error.__notes__ == ["raised in decode-1"]


async def test_a_stage_starts_no_more_tasks_than_its_queue_and_one_hold() -> None:
    started: list[int] = []
    enough = asyncio.Event()

    async def count(item: int) -> int:
        started.append(item)
        if len(started) == 4:
            enough.set()
        return item

    flow: Flow[int] = asyncio.Queue(3)
    async with ServingGroup() as tasks:
        tasks.create_task(source(count, range(100), flow, tasks, "read"))
        await enough.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert started == [0, 1, 2, 3]  # three in the queue, one waiting to be put


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


def _logged(log: list[str], function: Callable[[], None]) -> Callable[[], None]:
    def stop() -> None:
        log.append("stop")
        function()

    return stop
