"""What every executor promises, whatever it is made of."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import numpy as np
import pytest

from asynctrain import nn
from asynctrain.errors import ClosedError, StaleParametersError
from asynctrain.executors import Executor, InlineExecutor, ThreadExecutor
from asynctrain.types import ForwardWork, GradientWork, Program

HOMES: dict[str, Callable[[], Executor]] = {
    "inline": InlineExecutor,
    "one thread": lambda: ThreadExecutor(1),
    "two threads by microbatch": lambda: ThreadExecutor(2, split="microbatches"),
    "two threads by layer": lambda: ThreadExecutor(2, split="layers"),
    "three threads": lambda: ThreadExecutor(3),
}
MODEL = nn.models.lenet(num_classes=10, image_shape=(12, 12, 1))
PROGRAM = Program(MODEL.to_json(), seed=1)
PARAMS = MODEL.init(0)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (16, 12, 12, 1), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 16)
WORK = [GradientWork(0, i, 2, IMAGES[8 * i : 8 * i + 8], LABELS[8 * i : 8 * i + 8]) for i in range(2)]


@pytest.fixture(params=HOMES)
def home(request: pytest.FixtureRequest) -> Callable[[], Executor]:
    return HOMES[request.param]


async def gradients(executor: Executor, work: GradientWork) -> bytes:
    async with executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        return (await session.compute(work, 0)).gradients.vector.tobytes()


async def test_gradients_have_the_bits_of_the_inline_executor(home: Callable[[], Executor]) -> None:
    async with InlineExecutor() as reference, home() as executor:
        assert await gradients(executor, WORK[1]) == await gradients(reference, WORK[1])


@pytest.mark.parametrize("name", ["resnet8", "mobilenet"])
async def test_gradients_and_statistics_of_nested_layers_have_those_bits_too(
    home: Callable[[], Executor], name: str
) -> None:
    model = nn.models.get(name)(num_classes=10, image_shape=(12, 12, 1))

    async def bits(executor: Executor) -> tuple[bytes, bytes]:
        async with executor.open(Program(model.to_json(), seed=1)) as session:
            await session.broadcast(model.init(0), {}, 0)
            result = await session.compute(WORK[1], 0)
            return result.gradients.vector.tobytes(), result.statistics.vector.tobytes()

    async with InlineExecutor() as reference, home() as executor:
        assert await bits(executor) == await bits(reference)


async def test_two_sessions_interleaved_do_not_see_each_other(home: Callable[[], Executor]) -> None:
    other = MODEL.init(7)
    async with home() as executor, executor.open(PROGRAM) as first, executor.open(PROGRAM) as second:
        await first.broadcast(PARAMS, {}, 0)
        await second.broadcast(other, {}, 0)
        results = await asyncio.gather(*(session.compute(WORK[0], 0) for session in (first, second, first)))
        bits = [result.gradients.vector.tobytes() for result in results]
    assert bits[0] == bits[2] != bits[1]


async def test_predictions_are_the_callers_own(home: Callable[[], Executor]) -> None:
    async with home() as executor, executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        first = await session.compute(ForwardWork(IMAGES[:8]), 0)
        kept = first.outputs.copy()
        await session.compute(ForwardWork(IMAGES[8:]), 0)
    np.testing.assert_array_equal(first.outputs, kept)


async def test_another_version_than_the_broadcast_one_is_refused(home: Callable[[], Executor]) -> None:
    async with home() as executor, executor.open(PROGRAM) as session:
        with pytest.raises(StaleParametersError, match="has parameters of version None, was asked for version 0"):
            await session.compute(WORK[0], 0)
        await session.broadcast(PARAMS, {}, 4)
        with pytest.raises(StaleParametersError) as caught:
            await session.compute(WORK[0], 5)
    assert (caught.value.have, caught.value.want) == (4, 5)


async def test_an_error_in_a_kernel_arrives_and_the_session_stays_usable(home: Callable[[], Executor]) -> None:
    wrong = GradientWork(0, 0, 2, IMAGES[:8], LABELS[:8] + 10)
    async with home() as executor, executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        with pytest.raises(ValueError, match="label"):
            await session.compute(wrong, 0)
        await session.compute(WORK[0], 0)


async def test_closing_twice_is_allowed_and_use_afterwards_is_an_error(home: Callable[[], Executor]) -> None:
    executor = home()
    async with executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
    with pytest.raises(ClosedError):
        await session.compute(WORK[0], 0)
    await executor.aclose()
    await executor.aclose()
    with pytest.raises(ClosedError):
        await AsyncExitStack().enter_async_context(executor.open(PROGRAM))
    assert "closed" in repr(executor)


async def test_closing_under_an_open_session_ends_its_work_with_an_error(home: Callable[[], Executor]) -> None:
    executor = home()
    async with executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        await executor.aclose()
        with pytest.raises(ClosedError):
            await session.compute(WORK[0], 0)
