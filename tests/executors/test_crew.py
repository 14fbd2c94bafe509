"""A crew: members that come, go, freeze and fail while a step is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeVar, overload

import numpy as np
import pytest

from asynctrain.arena import Layout
from asynctrain.errors import ClosedError, ExecutorError, FingerprintError, StaleParametersError, WorkerLostError
from asynctrain.executors.crew import Crew
from asynctrain.executors.ledger import FATAL, Patience, Statistics
from asynctrain.types import (
    ForwardResult,
    ForwardWork,
    GradientResult,
    GradientWork,
    Notice,
    Params,
    Speculated,
    Sums,
    WorkerJoined,
    WorkerLost,
)
from tests.executors.schedules import JumpingLoop, hold, simulated

T = TypeVar("T")

EMPTY = Layout({}, np.dtype(np.float32)).empty()
IMAGES = np.zeros((1, 1, 1, 1), np.uint8)


def work(microbatch: int = 0, step: int = 0) -> GradientWork:
    return GradientWork(step, microbatch, 4, IMAGES, np.zeros(1, np.int64))


class Member:
    """A session that does what the test tells it to, and writes down what is asked of it."""

    slots = 1

    def __init__(self, name: str = "", fingerprint: str = "same") -> None:
        self.name = name
        self.fingerprint = {"cpu": fingerprint}
        self.calls: list[str] = []
        self.answers: list[asyncio.Future[GradientResult]] = []
        self.released = 0
        self.may_receive = asyncio.Event()
        self.may_receive.set()
        self.asked = asyncio.Event()
        self.killed = 0

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        self.calls.append(f"receive {version}")
        await self.may_receive.wait()

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        assert isinstance(work, GradientWork)
        self.calls.append(f"compute {work.microbatch}")
        self.answers.append(Watched(self.calls))
        self.asked.set()
        return await self.answers[-1]

    def kill(self) -> None:
        self.killed += 1

    def answer(self, loss: float = 0.0) -> None:
        """Let the first computation that is under way return."""
        self.answers.pop(0).set_result(GradientResult(EMPTY, Sums(loss), EMPTY, self.release))

    def fail(self, error: Exception) -> None:
        self.answers.pop(0).set_exception(error)

    def release(self) -> None:
        self.released += 1


class Watched(asyncio.Future[GradientResult]):
    """A computation that writes down the very call that cancels it."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def cancel(self, msg: Any | None = None) -> bool:
        self.calls.append("cancel")
        return super().cancel(msg)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_the_result_is_that_of_the_member_that_computed_it() -> None:
    a, b = Member(), Member()
    async with Crew("crew") as crew:
        crew.join(a, "a")
        crew.join(b, "b")
        assert (crew.slots, crew.addresses) == (2, ("a", "b"))
        await crew.broadcast({}, {}, 0)
        tasks = [asyncio.create_task(crew.compute(work(i), 0)) for i in range(3)]
        await turns()
        b.answer(1.0)
        await turns()
        a.answer(0.0)
        b.answer(2.0)
        assert [result.sums.loss for result in await asyncio.gather(*tasks)] == [0.0, 1.0, 2.0]
    assert a.calls == ["receive 0", "compute 0"]
    assert b.calls == ["receive 0", "compute 1", "compute 2"], "the parameters travel once"
    assert crew.statistics == Statistics(accepted=3)


async def test_a_member_that_joins_amid_a_step_gets_the_parameters_before_its_first_work() -> None:
    a, b = Member(), Member()
    async with Crew("crew") as crew:
        crew.join(a, "a")
        await crew.broadcast({}, {}, 7)
        tasks = [asyncio.create_task(crew.compute(work(i), 7)) for i in range(2)]
        await turns()
        crew.join(b, "b")
        await turns()
        a.answer()
        b.answer()
        await asyncio.gather(*tasks)
    assert b.calls == ["receive 7", "compute 1"]


async def test_what_a_lost_member_had_is_computed_by_another() -> None:
    a, b = Member(), Member()
    notices: list[Notice] = []
    async with Crew("crew", tell=notices.append) as crew:
        crew.join(a, "a")
        await crew.broadcast({}, {}, 0)
        task = asyncio.create_task(crew.compute(work(), 0))
        await turns()
        crew.join(b, "b")
        crew.lose("a", "it was killed")
        crew.lose("a", "and again")
        await turns()
        b.answer(5.0)
        assert (await task).sums.loss == 5.0
    assert a.calls[-1] == "cancel"
    assert a.killed == 1
    assert notices == [WorkerJoined("a", 1), WorkerJoined("b", 1), WorkerLost("a", "it was killed")]


@pytest.mark.parametrize(
    "error", [WorkerLostError("a", "its connection broke"), ClosedError("closed"), StaleParametersError("a", None, 0)]
)
async def test_a_member_that_says_it_is_gone_is_lost(error: Exception) -> None:
    a, b = Member(), Member()
    async with Crew("crew") as crew:
        crew.join(a, "a")
        await crew.broadcast({}, {}, 0)
        task = asyncio.create_task(crew.compute(work(), 0))
        await turns()
        crew.join(b, "b")
        a.fail(error)
        await turns()
        b.answer(5.0)
        assert (await task).sums.loss == 5.0
        assert crew.addresses == ("b",)
    assert crew.statistics.lost == 1


async def test_a_member_that_cancels_its_work_by_itself_is_lost() -> None:
    a, b = Member(), Member()
    async with Crew("crew") as crew:
        crew.join(a, "a")
        await crew.broadcast({}, {}, 0)
        task = asyncio.create_task(crew.compute(work(), 0))
        await turns()
        crew.join(b, "b")
        a.answers[0].cancel()
        await turns()
        b.answer()
        await task
        assert crew.addresses == ("b",)


async def test_an_error_of_the_work_itself_is_raised_and_not_tried_elsewhere() -> None:
    a, b = Member(), Member()
    async with Crew("crew") as crew:
        crew.join(a, "a")
        crew.join(b, "b")
        await crew.broadcast({}, {}, 0)
        task = asyncio.create_task(crew.compute(work(), 0))
        await turns()
        a.fail(ValueError("a label is wrong"))
        with pytest.raises(ValueError, match="a label is wrong"):
            await task
        assert crew.addresses == ("a", "b")
    assert b.calls == ["receive 0"]


async def test_cancelling_reaches_the_members_computation_in_the_same_call() -> None:
    inner, a = Crew("inner"), Member()
    async with inner, Crew("outer") as outer:
        inner.join(a, "a")
        outer.join(inner, "inner")
        await outer.broadcast({}, {}, 0)
        task = asyncio.create_task(outer.compute(work(), 0))
        await turns()
        gathered = asyncio.gather(task)
        gathered.cancel()
        assert a.calls[-1] == "cancel", "before the loop has had a turn"
        with suppress(asyncio.CancelledError):
            await gathered
        await turns()
        again = asyncio.create_task(outer.compute(work(1), 0))
        await turns()
        a.answers.pop(0)
        a.answer()
        await again


async def test_a_result_that_comes_in_the_very_turn_of_the_cancellation_is_given_back() -> None:
    a = Member()
    async with Crew("crew") as crew:
        crew.join(a, "a")
        await crew.broadcast({}, {}, 0)
        task = asyncio.create_task(crew.compute(work(), 0))
        await turns()
        a.answer()
        await asyncio.sleep(0)  # the attempt has it; the caller does not yet
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert a.released == 1


class Stubborn(Member):
    """One that goes on when it is told to stop, and returns its result late."""

    async def compute(self, work: Any, version: int) -> Any:
        inner = asyncio.ensure_future(super().compute(work, version))
        while not inner.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([inner])
        return inner.result()


async def test_late_and_duplicate_results_are_dropped_given_back_and_counted() -> None:
    a, b = Stubborn(), Stubborn()
    async with Crew("crew", patience=Patience(floor=0.02, factor=1.0)) as crew:
        crew.join(a, "a")
        await crew.broadcast({}, {}, 0)
        task = asyncio.create_task(crew.compute(work(), 0))
        await turns()
        crew.join(b, "b")
        await b.asked.wait()  # the deadline passes
        b.answer(2.0)
        assert (await task).sums.loss == 2.0
        a.answer(1.0)
        await turns()
        assert (a.released, b.released) == (1, 0)
        task = asyncio.create_task(crew.compute(work(1), 0))
        await turns()
        task.cancel()
        await asyncio.wait([task])
        b.answer(3.0)
        await turns()
        assert b.released == 1
    assert crew.statistics == Statistics(accepted=1, late=1, duplicates=1, speculated=1)


async def test_parameters_that_a_member_still_receives_are_waited_for_before_the_next_are_taken() -> None:
    a, b = Member(), Member()
    b.may_receive.clear()
    async with Crew("crew") as crew:
        crew.join(a, "a")
        crew.join(b, "b")
        await crew.broadcast({}, {}, 0)
        task = asyncio.create_task(crew.broadcast({}, {}, 1))
        await turns()
        assert not task.done(), "b still reads the arrays of version 0"
        b.may_receive.set()
        await task
        await turns()
    assert a.calls == b.calls == ["receive 0", "receive 1"]


class Dawdling(Member):
    """One that goes on receiving when it is told to stop."""

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        receiving = asyncio.ensure_future(super().broadcast(params, model_state, version))
        while not receiving.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([receiving])


async def test_what_a_lost_member_has_received_is_not_taken_for_its_successors() -> None:
    a, b = Dawdling(), Member()
    a.may_receive.clear()
    b.may_receive.clear()
    async with Crew("crew") as crew:
        crew.join(a, "the address")
        await crew.broadcast({}, {}, 0)
        await turns()
        crew.lose("the address", "it was killed")
        crew.join(b, "the address")
        task = asyncio.create_task(crew.compute(work(), 0))
        await turns()
        a.may_receive.set()
        await turns()
        assert b.calls == ["receive 0"]
        b.may_receive.set()
        await turns()
        b.answer()
        await task


async def test_who_is_told_of_a_loss_may_at_once_send_another_member_and_take_work_back() -> None:
    a, b, c = Member(), Member(), Member()
    tasks: list[asyncio.Task[GradientResult]] = []

    def tell(notice: Notice) -> None:
        if notice == WorkerLost("a", "it was killed"):
            crew.join(b, "b")
            crew.lose("c", "it stood beside it")
            tasks[1].cancel()
        if isinstance(notice, WorkerJoined) and notice.address == "b":
            crew.resize("b")

    async with Crew("crew", tell=tell) as crew:
        crew.join(a, "a")
        await crew.broadcast({}, {}, 0)
        tasks += [asyncio.create_task(crew.compute(work(i), 0)) for i in range(3)]
        await turns()
        crew.join(c, "c")
        await turns()
        crew.lose("a", "it was killed")
        await turns()
        b.answer(0.0)
        await turns()
        b.answer(2.0)
        assert [(await tasks[i]).sums.loss for i in (0, 2)] == [0.0, 2.0]
        assert tasks[1].cancelled()
        assert crew.addresses == ("b",)


async def test_other_bits_are_refused() -> None:
    async with Crew("crew") as crew:
        with pytest.raises(WorkerLostError, match="crew: no worker has joined yet"):
            _ = crew.fingerprint
        crew.join(Member(), "a")
        with pytest.raises(FingerprintError, match="cpu is 'same' here and 'another' there"):
            crew.join(Member(fingerprint="another"), "b")
        crew.lose("a", "it was killed")
        with pytest.raises(FingerprintError):
            crew.join(Member(fingerprint="another"), "b")
        assert crew.fingerprint == {"cpu": "same"}
        assert crew.addresses == ()


async def test_a_member_that_leaves_does_what_it_has_and_is_not_killed() -> None:
    a, b = Member(), Member()
    async with Crew("crew") as crew:
        crew.join(a, "a")
        await crew.broadcast({}, {}, 0)
        task = asyncio.create_task(crew.compute(work(), 0))
        await turns()
        crew.join(b, "b")
        leaving = asyncio.create_task(crew.leave("a"))
        other = asyncio.create_task(crew.compute(work(1), 0))
        await turns()
        assert not leaving.done()
        a.answer(1.0)
        assert (await task).sums.loss == 1.0
        await leaving
        await crew.leave("a")
        b.answer()
        await other
        assert crew.addresses == ("b",)
    assert (a.killed, a.calls) == (0, ["receive 0", "compute 0"])
    assert crew.statistics.lost == 0


async def test_closing_fails_what_is_awaited_and_stops_the_members() -> None:
    a = Member()
    async with Crew("crew") as crew:
        crew.join(a, "a")
        await crew.broadcast({}, {}, 0)
        tasks = [asyncio.create_task(crew.compute(work(i), 0)) for i in range(2)]
        await turns()
        crew.close()
        assert a.calls == ["receive 0", "compute 0", "cancel"], "at once"
        crew.close()
        for task in tasks:
            with pytest.raises(ClosedError, match="the session on crew is closed"):
                await task
        for using in (crew.compute(work(), 0), crew.broadcast({}, {}, 1)):
            with pytest.raises(ClosedError):
                await using
        with pytest.raises(ClosedError):
            crew.join(Member(), "b")
    assert "closed" in repr(crew)


async def test_another_version_than_the_last_is_refused_and_what_waits_for_an_older_one_fails() -> None:
    async with Crew("crew") as crew:
        with pytest.raises(StaleParametersError, match="crew: has parameters of version None, was asked for version 0"):
            await crew.compute(work(), 0)
        await crew.broadcast({}, {}, 0)
        task = asyncio.create_task(crew.compute(work(), 0))
        await turns()
        await crew.broadcast({}, {}, 1)
        with pytest.raises(StaleParametersError, match="has parameters of version 1, was asked for version 0"):
            await task


async def test_work_that_is_the_end_of_many_members_fails_with_what_became_of_the_last() -> None:
    async with Crew("crew") as crew:
        await crew.broadcast({}, {}, 0)
        task = asyncio.create_task(crew.compute(work(), 0))
        for number in range(FATAL):
            crew.join(Member(), f"{number}")
            await turns()
            crew.lose(f"{number}", "it was killed")
        with pytest.raises(
            ExecutorError, match="8 workers were lost at the same work; the last one lost was 7: it was"
        ):
            await task


@pytest.mark.parametrize("joined", [False, True])
def test_without_members_work_waits_and_then_fails_with_what_became_of_the_last(joined: bool) -> None:
    async def main() -> float:
        async with Crew("crew", worker_wait=12.0) as crew:
            await crew.broadcast({}, {}, 0)
            if joined:
                crew.join(Member(), "a")
                crew.lose("a", "it was killed")
            told = "; the last one lost was a: it was killed" if joined else ""
            with pytest.raises(WorkerLostError, match=f"crew: there was no worker for 12 s{told}$"):
                await crew.compute(work(), 0)
            return asyncio.get_running_loop().time()

    assert jumping(main) == 12.0


def test_what_is_late_is_computed_by_another_member_too_and_that_is_told() -> None:
    async def main() -> list[Notice]:
        notices: list[Notice] = []
        a, b = Member(), Member()
        async with Crew("crew", tell=notices.append) as crew:
            crew.join(a, "a")
            crew.join(b, "b")
            await crew.broadcast({}, {}, 3)
            task = asyncio.create_task(crew.compute(work(1, step=3), 3))
            await asyncio.sleep(2.5)
            b.answer(2.0)
            assert (await task).sums.loss == 2.0
            assert a.calls[-1] == "cancel"
        return notices[2:]

    assert jumping(main) == [Speculated("b", "a", 3, 1)]


def test_a_member_more_than_one_version_behind_is_told_to_go() -> None:
    async def main() -> tuple[int, float]:
        a, b = Member(), Member()
        b.may_receive.clear()
        async with Crew("crew") as crew:
            crew.join(a, "a")
            crew.join(b, "b")
            await crew.broadcast({}, {}, 0)
            await crew.broadcast({}, {}, 1)
            assert crew.addresses == ("a",)
            return b.killed, asyncio.get_running_loop().time()

    assert jumping(main) == (1, 2.0), "after the patience that a result has"


def test_waiting_costs_nothing() -> None:
    """An hour's computation: the deadline passes once, there is nobody else, and then nothing wakes the loop."""

    async def main() -> int:
        a = Member()
        async with Crew("crew") as crew:
            crew.join(a, "a")
            await crew.broadcast({}, {}, 0)
            task = asyncio.create_task(crew.compute(work(), 0))
            await turns()
            loop = asyncio.get_running_loop()
            loop.call_later(3600, a.answer)
            assert isinstance(loop, JumpingLoop)
            before = loop.wakings
            await task
            return loop.wakings - before

    assert jumping(main) < 12


def jumping(main: Callable[[], Awaitable[T]]) -> T:
    """Return what ``main()`` returns, run on a loop that does not wait."""

    async def run() -> T:
        return await main()

    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(run())


def test_a_negative_worker_wait_is_refused() -> None:
    with pytest.raises(ValueError, match="worker_wait must be at least 0 seconds, got -1"):
        Crew("crew", worker_wait=-1)


def test_whatever_befalls_simulated_workers_the_bits_are_those_of_a_quiet_day() -> None:
    for seed in range(40):
        hold(simulated(seed, workers=1 + seed % 3))
