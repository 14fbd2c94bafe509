"""What is particular to threads: side by side, and stopped between two kernels."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from asynctrain import nn
from asynctrain._aio import in_thread
from asynctrain.arena import Array
from asynctrain.errors import ClosedError, ExecutorError
from asynctrain.executors import ThreadExecutor
from asynctrain.types import ForwardWork, GradientWork, Params, Program

PATIENCE = 20  # seconds that a gate waits before it fails the test


@nn.register_layer("test_gated_dense")
@dataclass(frozen=True)
class GatedDense(nn.Dense):
    """A Dense layer whose weight gradient ends only when an earlier layer is in the chain of input gradients."""

    weight_gradient_runs: ClassVar[threading.Event]
    chain_is_further: ClassVar[threading.Event]

    def backward_params(self, params: Params, saved: Any, dy: Array, scope: nn.Scope) -> None:
        self.weight_gradient_runs.set()
        assert self.chain_is_further.wait(PATIENCE), "the chain did not go on beside the weight gradient"
        super().backward_params(params, saved, dy, scope)


@nn.register_layer("test_gate")
@dataclass(frozen=True)
class Gate(nn.ReLU):
    """An earlier layer whose input gradient ends only when the later layer's weight gradient runs."""

    def backward_input(self, params: Params, saved: Any, dy: Array, scope: nn.Scope) -> Array:
        GatedDense.chain_is_further.set()
        assert GatedDense.weight_gradient_runs.wait(PATIENCE), "no weight gradient ran beside the chain"
        return super().backward_input(params, saved, dy, scope)


@nn.register_layer("test_blocking")
@dataclass(frozen=True)
class Blocking(nn.ReLU):
    """A layer whose kernel takes until it is let go."""

    entered: ClassVar[threading.Semaphore]  # released by each
    leave: ClassVar[threading.Event]

    def forward(self, params: Params, x: Array, scope: nn.Scope) -> tuple[Array, Any]:
        self.entered.release()
        assert self.leave.wait(PATIENCE)
        return super().forward(params, x, scope)


@nn.register_layer("test_counting")
@dataclass(frozen=True)
class Counting(nn.ReLU):
    """A layer that counts how often its kernel runs."""

    count: ClassVar[int] = 0

    def forward(self, params: Params, x: Array, scope: nn.Scope) -> tuple[Array, Any]:
        Counting.count += 1
        return super().forward(params, x, scope)


@pytest.fixture(autouse=True)
def gates() -> Iterator[None]:
    GatedDense.weight_gradient_runs, GatedDense.chain_is_further = threading.Event(), threading.Event()
    Blocking.entered, Blocking.leave = threading.Semaphore(0), threading.Event()
    Counting.count = 0
    yield
    Blocking.leave.set()


IMAGES = np.random.default_rng(0).integers(0, 256, (4, 2, 2, 1), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0])


def model(*layers: nn.Layer) -> nn.Model:
    return nn.Model([nn.Flatten(), nn.Dense(5), *layers, nn.Dense(3)], input_shape=(2, 2, 1))


async def has_entered() -> None:
    """Wait until one more thread is in a blocking layer."""
    assert await in_thread(Blocking.entered.acquire, True, PATIENCE)


async def test_with_split_layers_a_weight_gradient_runs_while_the_chain_goes_on_in_earlier_layers() -> None:
    gated = model(Gate(), GatedDense(6), nn.ReLU())
    async with ThreadExecutor(2, split="layers") as executor, executor.open(Program(gated.to_json())) as session:
        await session.broadcast(gated.init(0), {}, 0)
        result = await session.compute(GradientWork(0, 0, 4, IMAGES, LABELS), 0)
    assert np.any(result.gradients["test_gated_dense1/weight"]), "and the gradient is there in the end"


async def test_auto_splits_layers_only_where_microbatches_are_fewer_than_threads() -> None:
    gated = model(Gate(), GatedDense(6), nn.ReLU())
    async with ThreadExecutor(2) as executor, executor.open(Program(gated.to_json())) as session:
        await session.broadcast(gated.init(0), {}, 0)
        await session.compute(GradientWork(0, 0, 1, IMAGES, LABELS), 0)  # would fail in its gates if not split


async def test_cancelling_stops_before_the_next_layer_and_leaves_the_session_usable() -> None:
    stopping = model(Blocking(), Counting())
    async with ThreadExecutor(1) as executor, executor.open(Program(stopping.to_json())) as session:
        await session.broadcast(stopping.init(0), {}, 0)
        task = asyncio.create_task(session.compute(GradientWork(0, 0, 1, IMAGES, LABELS), 0))
        await has_entered()
        task.cancel()
        Blocking.leave.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await session.compute(GradientWork(0, 0, 1, IMAGES, LABELS), 0)
    assert Counting.count == 1, "the layer after the one that ran at the time belongs to the second computation"


async def test_leaving_a_session_waits_for_the_kernel_under_way() -> None:
    slow = model(Blocking(), Counting())
    events: list[str] = []

    def let_go() -> None:
        events.append("let go")
        Blocking.leave.set()

    async with ThreadExecutor(1) as executor:
        async with executor.open(Program(slow.to_json())) as session:
            await session.broadcast(slow.init(0), {}, 0)
            task = asyncio.create_task(session.compute(GradientWork(0, 0, 1, IMAGES, LABELS), 0))
            await has_entered()
            task.cancel()
            asyncio.get_running_loop().call_later(0.05, let_go)
        events.append("session left")
    assert events == ["let go", "session left"]
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_closing_lets_what_others_do_on_the_threads_end_and_has_a_deadline() -> None:
    may_end = threading.Event()
    executor = ThreadExecutor(1)
    jobs = [executor.shared_threads.submit(lambda: may_end.wait(PATIENCE)) for _ in range(2)]
    with pytest.raises(ExecutorError, match=r"2 of its jobs did not end within 0\.05 s of being asked to"):
        await executor.aclose(0.05)
    may_end.set()
    await executor.aclose()
    assert [job.result() for job in jobs] == [True, True]


async def test_closing_tells_those_that_wait_for_a_computation_that_has_begun_or_has_not() -> None:
    stopping = model(Blocking(), Counting())
    executor = ThreadExecutor(1)
    async with executor.open(Program(stopping.to_json())) as session:
        await session.broadcast(stopping.init(0), {}, 0)
        waiting = [asyncio.create_task(session.compute(GradientWork(0, 0, 1, IMAGES, LABELS), 0)) for _ in range(2)]
        await has_entered()
        with pytest.raises(ExecutorError, match=r"1 of its jobs did not end within 0 s of being asked to"):
            await executor.aclose(0)
        Blocking.leave.set()
        await executor.aclose()
        told = await asyncio.gather(*waiting, return_exceptions=True)
    assert [repr(error) for error in told] == ["ClosedError('the session on threads:1 is closed')"] * 2
    assert Counting.count == 0


async def test_closing_stops_all_sessions_at_once_by_one_deadline() -> None:
    stopping = model(Blocking(), Counting())
    executor = ThreadExecutor(2)
    async with AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(executor.open(Program(stopping.to_json()))) for _ in range(2)]
        for session in sessions:
            await session.broadcast(stopping.init(0), {}, 0)
        waiting = [asyncio.create_task(session.compute(ForwardWork(IMAGES, LABELS), 0)) for session in sessions]
        await has_entered()
        await has_entered()
        with pytest.raises(ExecutorError, match=r"2 of its jobs did not end within 0\.05 s of being asked to"):
            await executor.aclose(0.05)
        Blocking.leave.set()
        await executor.aclose()
        told = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(error) for error in told] == [ClosedError, ClosedError]
    assert Counting.count == 0


def test_work_that_ends_after_its_loop_tells_nobody(caplog: pytest.LogCaptureFixture) -> None:
    may_end = threading.Event()
    executor = ThreadExecutor(1)

    async def give_up() -> None:
        executor.shared_threads.submit(lambda: may_end.wait(PATIENCE))
        with pytest.raises(ExecutorError):
            await executor.aclose(0.01)

    asyncio.run(give_up())
    may_end.set()
    asyncio.run(executor.aclose())
    assert caplog.records == []


async def test_that_no_thread_can_be_started_is_not_taken_for_a_closed_executor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with ThreadExecutor(1) as executor:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            with pytest.raises(RuntimeError, match=r"^can't start new thread$"):
                executor.shared_threads.submit(int)
    with pytest.raises(ClosedError, match=r"^the executor threads:1 is closed$"):
        executor.shared_threads.submit(int)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"split": "rows"}, "split must be 'auto', 'microbatches'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ThreadExecutor(**arguments)
