"""Concurrent requests are answered together, and none suffers from another."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Sequence

import pytest

from asynctrain._aio import Failure
from asynctrain.executors.worker import StopFlag, Stopped
from asynctrain.inference.gathering import Gathering


class Oracle:
    """Answers ``n`` with ``2 n`` and a word with an error, when it is let; knows what it was asked together."""

    def __init__(self) -> None:
        self.asked: list[list[int | str]] = []
        self.stopped = 0
        self.calls = threading.Semaphore(0)
        self.error: Exception | None = None

    def answer(self, questions: Sequence[int | str], stop: StopFlag) -> list[int | Failure]:
        self.asked.append(list(questions))
        try:
            while not self.calls.acquire(timeout=0.001):
                stop.check()
            stop.check()
        except Stopped:
            self.stopped += 1
            raise
        if self.error is not None:
            raise self.error
        return [2 * n if isinstance(n, int) else Failure(ValueError(n)) for n in questions]

    def let(self, calls: int = 1) -> None:
        self.calls.release(calls)

    async def is_asked(self, calls: int = 1) -> None:
        """Wait until it was called so often."""
        while len(self.asked) < calls:  # noqa: ASYNC110  # a thread tells it
            await asyncio.sleep(0.001)


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture
def gathering(oracle: Oracle) -> Gathering[int | str, int]:
    return Gathering(oracle.answer, limit=4)


async def asking(gathering: Gathering[int | str, int], *questions: int | str) -> list[asyncio.Task[int]]:
    """Start tasks that ask, in this order, and let them run up to their wait."""
    tasks = [asyncio.create_task(gathering.ask(question, items=1)) for question in questions]
    await asyncio.sleep(0)
    return tasks


async def test_those_that_ask_meanwhile_are_answered_together_at_most_so_many(
    oracle: Oracle, gathering: Gathering[int | str, int]
) -> None:
    first = await asking(gathering, 0)
    await oracle.is_asked()
    others = await asking(gathering, *range(1, 8))
    oracle.let(3)
    assert await asyncio.gather(*first, *others) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert oracle.asked == [[0], [1, 2, 3, 4], [5, 6, 7]]


async def test_those_that_ask_in_one_turn_of_the_loop_are_gathered_behind_the_first(
    oracle: Oracle, gathering: Gathering[int | str, int]
) -> None:
    oracle.let(2)
    assert await asyncio.gather(*(gathering.ask(n, items=1) for n in range(4))) == [0, 2, 4, 6]
    assert oracle.asked == [[0], [1, 2, 3]]


async def test_a_request_of_many_items_fills_a_micro_batch_and_one_of_too_many_is_alone(
    oracle: Oracle, gathering: Gathering[int | str, int]
) -> None:
    tasks = await asking(gathering, 0)
    await oracle.is_asked()
    for question, items in ((1, 2), (2, 2), (3, 1), (4, 9), (5, 1)):
        tasks.append(asyncio.create_task(gathering.ask(question, items)))
    await asyncio.sleep(0)
    oracle.let(9)
    assert await asyncio.gather(*tasks) == [0, 2, 4, 6, 8, 10]
    assert oracle.asked == [[0], [1, 2], [3], [4], [5]]


async def test_what_goes_wrong_with_one_reaches_only_its_caller(
    oracle: Oracle, gathering: Gathering[int | str, int]
) -> None:
    tasks = await asking(gathering, 0, 1, "wrong", 2)
    oracle.let(2)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(answer) for answer in found] == ["0", "2", "wrong", "4"]


async def test_an_error_of_the_computing_reaches_all_who_asked_and_the_next_are_answered(
    oracle: Oracle, gathering: Gathering[int | str, int]
) -> None:
    oracle.error = MemoryError("too large")
    oracle.let(2)
    found = await asyncio.gather(*await asking(gathering, 0, 1, 2), return_exceptions=True)
    assert [str(answer) for answer in found] == ["too large"] * 3
    oracle.error = None
    oracle.let()
    assert await gathering.ask(3, items=1) == 6


@pytest.mark.parametrize("leaving", [0, 1, 2])
async def test_a_caller_that_is_cancelled_while_it_is_computed_takes_nothing_from_the_others(
    oracle: Oracle, gathering: Gathering[int | str, int], leaving: int
) -> None:
    before = await asking(gathering, 9)
    await oracle.is_asked()
    tasks = await asking(gathering, 0, 1, 2)
    oracle.let()
    await asyncio.gather(*before)
    await oracle.is_asked(2)
    tasks[leaving].cancel()
    late = await asking(gathering, 3)
    oracle.let(2)
    found = await asyncio.gather(*tasks, *late, return_exceptions=True)
    assert isinstance(found.pop(leaving), asyncio.CancelledError)
    assert found == [answer for n, answer in enumerate((0, 2, 4, 6)) if n != leaving]
    assert oracle.stopped == 0


@pytest.mark.parametrize("leaving", [1, 2, 3])
async def test_a_caller_that_is_cancelled_while_it_waits_is_not_computed(
    oracle: Oracle, gathering: Gathering[int | str, int], leaving: int
) -> None:
    tasks = await asking(gathering, 0)
    await oracle.is_asked()
    tasks += await asking(gathering, 1, 2, 3)
    tasks[leaving].cancel()
    await asyncio.sleep(0)
    oracle.let(2)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(found[leaving], asyncio.CancelledError)
    assert oracle.asked == [[0], [n for n in (1, 2, 3) if n != leaving]]


async def test_one_that_is_cancelled_in_the_moment_it_is_to_lead_leaves_the_lead_to_the_next(
    oracle: Oracle, gathering: Gathering[int | str, int]
) -> None:
    async def ask_and_cancel_the_next() -> int:
        answer = await gathering.ask(1, items=4)
        tasks[2].cancel()  # woken in this very turn of the loop, and not yet there
        return answer

    tasks = await asking(gathering, 0)
    await oracle.is_asked()
    tasks.append(asyncio.create_task(ask_and_cancel_the_next()))
    await asyncio.sleep(0)
    tasks += await asking(gathering, 2, 3)
    oracle.let(3)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(found.pop(2), asyncio.CancelledError)
    assert found == [0, 2, 6]
    assert oracle.asked == [[0], [1], [3]]


async def test_what_nobody_wants_any_more_is_stopped_and_the_next_are_answered(
    oracle: Oracle, gathering: Gathering[int | str, int]
) -> None:
    before = await asking(gathering, 9)
    await oracle.is_asked()
    tasks = await asking(gathering, 0, 1, 2)
    oracle.let()
    await asyncio.gather(*before)
    await oracle.is_asked(2)
    for task in tasks:
        task.cancel()
    late = await asking(gathering, 3)
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in found] == [asyncio.CancelledError] * 3
    assert oracle.stopped == 1
    oracle.let()
    assert await late[0] == 6


async def test_a_lone_caller_that_is_cancelled_stops_the_computing_and_leaves_no_thread(
    oracle: Oracle, gathering: Gathering[int | str, int]
) -> None:
    threads = threading.active_count()
    (task,) = await asking(gathering, 0)
    await oracle.is_asked()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await task
    assert oracle.stopped == 1
    assert threading.active_count() == threads


def test_one_gathering_serves_one_loop_after_another_and_two_at_once(
    oracle: Oracle, gathering: Gathering[int | str, int]
) -> None:
    async def several() -> list[int]:
        return await asyncio.gather(*(gathering.ask(n, items=1) for n in range(12)))

    oracle.let(100)
    found: list[list[int]] = [asyncio.run(several()), asyncio.run(several())]
    threads = [threading.Thread(target=lambda: found.append(asyncio.run(several()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[2 * n for n in range(12)]] * 4


@pytest.mark.parametrize("seed", range(10))
async def test_whoever_comes_and_goes_the_others_are_answered(seed: int) -> None:
    rng = random.Random(seed)
    gathering: Gathering[int, int] = Gathering(lambda questions, stop: [2 * n for n in questions], limit=5)
    tasks: list[asyncio.Task[int]] = []
    cancelled = set()
    for n in range(60):
        tasks.append(asyncio.create_task(gathering.ask(n, items=rng.randint(1, 6))))
        if rng.random() < 0.3:
            leaving = rng.randrange(n + 1)
            if tasks[leaving].cancel():
                cancelled.add(leaving)
        await asyncio.sleep(rng.choice([0, 0, 0.001]))
    found = await asyncio.gather(*tasks, return_exceptions=True)
    for n, answer in enumerate(found):
        assert isinstance(answer, asyncio.CancelledError) if n in cancelled else answer == 2 * n
