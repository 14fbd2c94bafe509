"""What every executor promises, whatever it is made of."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import AsyncExitStack, ExitStack
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from random import Random

import numpy as np
import pytest

import asynctrain as at
from asynctrain import nn, optim
from asynctrain._aio import thread_pool
from asynctrain.arena import Array
from asynctrain.errors import ClosedError, StaleParametersError
from asynctrain.executors import Executor, InlineExecutor, ThreadExecutor
from asynctrain.executors.group import ExecutorGroup
from asynctrain.executors.pool import PoolExecutor
from asynctrain.executors.process import ProcessExecutor
from asynctrain.optim import initial_state
from asynctrain.rpc import GrpcExecutor
from asynctrain.testing import check_executor
from asynctrain.train.state import TrainState
from asynctrain.train.step import TrainStep
from asynctrain.types import Batch, Cursor, ForwardWork, GradientWork, Program
from tests.executors.dask_clusters import DaskCluster
from tests.rpc.conftest import worker_process

POOLS: dict[str, futures.Executor] = {}  # while this module's tests run
WORKERS: list[str] = []  # likewise: addresses of gRPC workers
DASK: dict[str, str] = {}  # likewise: the address of a scheduler


def dask() -> Executor:
    pytest.importorskip("distributed", reason="needs the extra dask")
    return at.DaskExecutor(DASK["address"])


def own_dask(workers: int) -> Executor:
    """Return a Dask cluster of the executor's own."""
    pytest.importorskip("distributed", reason="needs the extra dask")
    return at.DaskExecutor(workers=workers)


HOMES: dict[str, Callable[[], Executor]] = {
    "inline": InlineExecutor,
    "one thread": lambda: ThreadExecutor(1),
    "two threads by microbatch": lambda: ThreadExecutor(2, split="microbatches"),
    "two threads by layer": lambda: ThreadExecutor(2, split="layers"),
    "three threads": lambda: ThreadExecutor(3),
    "a group of one": lambda: ExecutorGroup(InlineExecutor()),
    "a group of two": lambda: ExecutorGroup(InlineExecutor(), ThreadExecutor(2, split="layers")),
    "a group in a group": lambda: ExecutorGroup(ExecutorGroup(ThreadExecutor(1), ThreadExecutor(1)), InlineExecutor()),
    "a pool of threads": lambda: PoolExecutor(POOLS["threads"], slots=2),
    "a pool of processes": lambda: PoolExecutor(POOLS["processes"], slots=2),
    "two processes": lambda: ProcessExecutor(2),
    "two gRPC workers": lambda: GrpcExecutor(*WORKERS),
    "gRPC, threads and a process": lambda: ExecutorGroup(
        GrpcExecutor(WORKERS[0]), ThreadExecutor(1), ProcessExecutor(1)
    ),
    "a Dask cluster": dask,
}
MODEL = nn.models.lenet(num_classes=10, image_shape=(12, 12, 1))
PROGRAM = Program(MODEL.to_json(), seed=1)
PARAMS = MODEL.init(0)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (16, 12, 12, 1), dtype=np.uint8)
LABELS = RNG.integers(0, 10, 16)
WORK = [GradientWork(0, i, 2, IMAGES[8 * i : 8 * i + 8], LABELS[8 * i : 8 * i + 8]) for i in range(2)]


@pytest.fixture(scope="module", autouse=True)
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Have pools and a cluster that are warm before the first test, which is not to be blamed for what they keep."""
    with (
        futures.ThreadPoolExecutor(3) as threads,
        futures.ProcessPoolExecutor(3, mp_context=get_context("spawn")) as processes,
        worker_process("--executor", "threads:1") as one,
        worker_process("--executor", "threads:2") as other,
        ExitStack() as stack,
    ):
        if find_spec("distributed"):
            cluster = DaskCluster(tmp_path_factory.mktemp("dask"), workers=2)
            DASK["address"] = stack.enter_context(cluster).address
        POOLS.update(threads=threads, processes=processes)
        WORKERS.extend([one.address, other.address])
        for pool in POOLS.values():
            list(pool.map(len, [()] * 8))
        yield
        POOLS.clear()
        WORKERS.clear()


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


@pytest.mark.one_loop
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


# Whole trainings

MODELS = {
    "mlp": nn.models.mlp(num_classes=3, image_shape=(8, 8, 3)),
    "lenet with dropout": nn.Model(
        [nn.Conv2D(4, 3), nn.ReLU(), nn.MaxPool2D(2), nn.Flatten(), nn.Dense(8), nn.Dropout(0.5), nn.Dense(3)],
        (8, 8, 3),
    ),
    "resnet8 with batch norm": nn.models.get("resnet8")(num_classes=3, image_shape=(8, 8, 3)),
}
STEPS = 20
SAMPLES, MICROBATCH = 5, 2  # three microbatches, one of a single sample


def batch(step: int) -> Batch:
    rng = np.random.default_rng(step)
    images = rng.integers(0, 256, (SAMPLES, 8, 8, 3), dtype=np.uint8)
    return Batch(images, rng.integers(0, 3, SAMPLES), ("",) * SAMPLES, Cursor(), last=False)


def first_state(name: str, optimizer: optim.Optimizer) -> TrainState:
    model = MODELS[name]
    params = model.init(0)
    return TrainState(Program(model.to_json(), seed=1), params, initial_state(optimizer, params), model.init_state())


async def digest(executor: Executor, name: str) -> str:
    """Return what the parameters are after some steps, and all that was gathered on the way."""
    optimizer = optim.adamw(1e-2)
    start = first_state(name, optimizer)
    async with thread_pool(1, "update") as threads, executor.open(start.program) as session:
        step = TrainStep(MODELS[name], session, optimizer, MICROBATCH, threads)
        state = await step.begin(start)
        for number in range(STEPS):
            state, _ = await step(state, batch(number))
        return state.digest()


@cache
def expected(name: str) -> str:
    async def inline() -> str:
        async with InlineExecutor() as executor:
            return await digest(executor, name)

    with futures.ThreadPoolExecutor(1) as elsewhere:  # a loop of its own, for that of the test runs already
        return elsewhere.submit(asyncio.run, inline()).result()


@pytest.mark.one_loop
@pytest.mark.parametrize("name", MODELS)
async def test_a_training_has_the_bits_of_the_inline_executor(home: Callable[[], Executor], name: str) -> None:
    async with home() as executor:
        assert await digest(executor, name) == expected(name)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: ProcessExecutor(1), id="one process"),
        pytest.param(lambda: ProcessExecutor(3), id="three processes"),
        pytest.param(lambda: ExecutorGroup(*(ThreadExecutor(1) for _ in range(3))), id="three in a group"),
        pytest.param(lambda: ExecutorGroup(dask(), ThreadExecutor(1)), id="a Dask cluster and a thread"),
        pytest.param(lambda: PoolExecutor(POOLS["processes"], slots=1), id="one of a pool"),
        pytest.param(lambda: PoolExecutor(POOLS["threads"], slots=4), id="four in a pool of three"),
    ],
)
async def test_so_it_has_with_other_numbers_of_workers(make: Callable[[], Executor]) -> None:
    async with make() as executor:
        assert await digest(executor, "lenet with dropout") == expected("lenet with dropout")


def group_of(workers: int) -> Executor:
    """Return a group of homes of one worker each, no two of a kind."""
    homes: list[Callable[[], Executor]] = [
        lambda: ProcessExecutor(1),
        lambda: own_dask(1),
        lambda: ExecutorGroup(PoolExecutor(POOLS["processes"], slots=1)),
    ]
    return ExecutorGroup(*(home() for home in homes[:workers]))


KINDS: dict[str, Callable[[int], Executor]] = {
    "threads by microbatch": lambda workers: ThreadExecutor(workers, split="microbatches"),
    "threads by layer": lambda workers: ThreadExecutor(workers, split="layers"),
    "processes": ProcessExecutor,
    "Dask": own_dask,
    "a pool of threads": lambda workers: PoolExecutor(POOLS["threads"], slots=workers),
    "a pool of processes": lambda workers: PoolExecutor(POOLS["processes"], slots=workers),
    "a group": group_of,
}


@pytest.mark.soak
@pytest.mark.one_loop
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
async def test_so_it_has_on_every_kind_of_home_with_one_two_and_three_workers(
    kind: str, workers: int, name: str
) -> None:
    async with KINDS[kind](workers) as executor:
        assert await digest(executor, name) == expected(name)


def at_an_odd_offset(array: Array) -> Array:
    """Return ``array`` as it may come out of a received message: read-only, one byte into a buffer."""
    return np.frombuffer(b"\0" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)


async def test_a_received_buffer_at_an_odd_offset_gives_the_same_bits(home: Callable[[], Executor]) -> None:
    odd = GradientWork(0, 1, 2, at_an_odd_offset(WORK[1].images), at_an_odd_offset(WORK[1].labels))
    async with InlineExecutor() as reference, home() as executor:
        assert await gradients(executor, odd) == await gradients(reference, WORK[1])


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 10))])
async def test_cancelled_at_a_random_point_it_stops_and_the_session_stays_usable(
    home: Callable[[], Executor], seed: int
) -> None:
    random = Random(seed)
    async with InlineExecutor() as reference, home() as executor, executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        for _ in range(3):
            tasks = [asyncio.create_task(session.compute(work, 0)) for work in WORK * 2]
            await asyncio.sleep(random.choice([0, 0, 0.001, 0.003]))
            for task in random.sample(tasks, 3):
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.result().release()
        result = await session.compute(WORK[1], 0)
        assert result.gradients.vector.tobytes() == await gradients(reference, WORK[1])


async def test_the_error_of_a_microbatch_tells_where_it_was_raised(home: Callable[[], Executor]) -> None:
    wrong = GradientWork(0, 0, 2, IMAGES[:8], LABELS[:8] + 10)
    async with home() as executor, executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        with pytest.raises(ValueError, match="label") as caught:
            await session.compute(wrong, 0)
    told = "".join(traceback.format_exception(caught.value))
    assert "losses.py" in told, "the traceback of the place that computed, be it a note"


async def test_it_passes_the_check_for_executors_of_ones_own(home: Callable[[], Executor]) -> None:
    await check_executor(home)
