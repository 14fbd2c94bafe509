"""One step: the cut, the order of additions, the update."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynctrain import nn, optim
from asynctrain.arena import Arena, Array
from asynctrain.errors import DivergenceError
from asynctrain.executors import InlineExecutor, ThreadExecutor
from asynctrain.executors.base import Session
from asynctrain.optim import initial_state
from asynctrain.train.state import TrainState
from asynctrain.train.step import TrainStep
from asynctrain.types import (
    Batch,
    Cursor,
    ForwardWork,
    GradientResult,
    GradientWork,
    Normalization,
    Params,
    Program,
    Sums,
    cut,
)

RNG = np.random.default_rng(0)


@given(samples=st.integers(1, 500), microbatch=st.integers(1, 70))
def test_a_batch_is_cut_into_the_fewest_parts_of_sizes_that_differ_by_at_most_one(
    samples: int, microbatch: int
) -> None:
    pieces = cut(samples, microbatch)
    sizes = [piece.stop - piece.start for piece in pieces]
    assert len(pieces) == -(-samples // microbatch)
    assert max(sizes) <= microbatch
    assert max(sizes) - min(sizes) <= 1
    assert [index for piece in pieces for index in range(piece.start, piece.stop)] == list(range(samples))


@pytest.mark.parametrize(
    ("samples", "sizes"),
    [(1, [1]), (32, [32]), (33, [16, 17]), (64, [32, 32]), (128, [64, 64]), (129, [43, 43, 43]), (256, [64] * 4)],
)
def test_by_default_two_workers_have_something_to_do_and_no_part_is_larger_than_64(
    samples: int, sizes: list[int]
) -> None:
    assert [piece.stop - piece.start for piece in cut(samples, None)] == sizes


def batch(samples: int, size: int, classes: int) -> Batch:
    images = RNG.integers(0, 256, (samples, size, size, 1), dtype=np.uint8)
    labels = RNG.integers(0, classes, samples)
    return Batch(images, labels, ("",) * samples, Cursor(0, samples, samples, 1), last=True)


def fresh(model: nn.Model, optimizer: optim.Optimizer, dtype: str = "float64") -> TrainState:
    params = model.init(0, dtype)
    return TrainState(Program(model.to_json(), dtype=dtype), params, initial_state(optimizer, params))


@pytest.fixture
async def threads() -> AsyncIterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def softmax_regression_step(weight: Array, bias: Array, data: Batch, rate: float) -> tuple[Array, Array]:
    """One step of plain gradient descent on the mean cross-entropy, written out for this test."""
    x = (data.images.reshape(len(data.labels), -1) / 255 - 0.5) / 0.25
    z = x @ weight + bias
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    error = (p - np.eye(len(bias))[data.labels]) / len(x)
    return weight - rate * x.T @ error, bias - rate * error.sum(axis=0)


@pytest.mark.parametrize("size", [4, 120])  # the larger one is reduced and updated by threads, part by part
async def test_steps_are_those_of_gradient_descent(size: int, threads: ThreadPoolExecutor) -> None:
    model = nn.models.linear(num_classes=6, image_shape=(size, size, 1))
    optimizer = optim.sgd(0.01)
    start = fresh(model, optimizer)
    weight, bias = start.params["dense1/weight"].copy(), start.params["dense1/bias"].copy()
    async with InlineExecutor() as executor, executor.open(start.program) as session:
        step = TrainStep(model, session, optimizer, 5, threads)
        state = await step.begin(start)
        for _ in range(3):
            data = batch(23, size, 6)
            state, sums = await step(state, data)
            weight, bias = softmax_regression_step(weight, bias, data, 0.01)
    np.testing.assert_allclose(state.params["dense1/weight"], weight, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(state.params["dense1/bias"], bias, rtol=1e-9, atol=1e-12)
    assert (state.step, state.cursor, sums.samples) == (3, Cursor(0, 23, 23, 1), 23)


@pytest.mark.parametrize("part", [2**16, 2**20])  # elements: several jobs for the parameters, or one for all
async def test_large_models_have_the_same_bits_from_threads(
    part: int, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asynctrain.train.step.PART", part)
    model = nn.models.mlp(num_classes=10, image_shape=(20, 20, 1))
    optimizer = optim.adamw(1e-2)
    digests = set()
    data = batch(64, 20, 10)
    for home in (InlineExecutor(), ThreadExecutor(1), ThreadExecutor(3, split="layers")):
        start = fresh(model, optimizer, "float32")
        async with home as executor, executor.open(start.program) as session:
            step = TrainStep(model, session, optimizer, 16, threads)
            state = await step.begin(start)
            for _ in range(3):
                state, _ = await step(state, data)
        digests.add(state.digest())
    assert len(digests) == 1


async def test_a_step_leaves_the_state_it_began_with_as_it_was(threads: ThreadPoolExecutor) -> None:
    model = nn.models.linear(num_classes=3, image_shape=(4, 4, 1))
    optimizer = optim.adam(1e-2)
    start = fresh(model, optimizer)
    async with InlineExecutor() as executor, executor.open(start.program) as session:
        step = TrainStep(model, session, optimizer, 5, threads)
        before = await step.begin(start)
        digest = before.digest()
        after, _ = await step(before, batch(9, 4, 3))
    assert before.digest() == start.digest() == digest != after.digest()
    assert not np.any(before.optimizer_state["nu"].vector)


class Backwards(Session):
    """A session that answers the last microbatch first, and gives each a gradient by which float addition can tell."""

    slots = 4

    @property
    def fingerprint(self) -> dict[str, str]:
        return {}

    def __init__(self, params: Params) -> None:
        self.params = params
        self.answered: list[int] = []
        self.turn = asyncio.Condition()

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        pass

    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult:  # type: ignore[override]
        assert isinstance(work, GradientWork)
        async with self.turn:
            await self.turn.wait_for(lambda: len(self.answered) == work.of - 1 - work.microbatch)
            self.answered.append(work.microbatch)
            self.turn.notify_all()
        values = {0: 1e8, 1: 1.0, 2: -1e8, 3: 1.0}
        gradients = Arena.of(
            {name: np.full_like(array, values[work.microbatch]) for name, array in self.params.items()}
        )
        return GradientResult(gradients, Sums(1.0, 1.0, 1))


async def test_gradients_are_added_in_the_order_of_microbatches_whichever_comes_first(
    threads: ThreadPoolExecutor,
) -> None:
    model = nn.models.linear(num_classes=2, image_shape=(1, 1, 1))
    start = fresh(model, optim.sgd(1.0), "float32")
    session = Backwards(start.params)
    step = TrainStep(model, session, optim.sgd(1.0), 1, threads)
    state = await step.begin(start)
    after, _ = await step(state, batch(4, 1, 2))
    assert session.answered == [3, 2, 1, 0]
    in_order = ((np.float32(1e8) + np.float32(1)) + np.float32(-1e8)) + np.float32(1)  # 1, and 2 or 0 in other orders
    np.testing.assert_array_equal(start.params["dense1/bias"] - after.params["dense1/bias"], in_order / 4)


async def test_a_loss_that_is_not_finite_is_an_error_that_tells_the_step(threads: ThreadPoolExecutor) -> None:
    model = nn.models.linear(num_classes=3, image_shape=(4, 4, 1))
    optimizer = optim.sgd(1.0)
    start = fresh(model, optimizer, "float32")
    poisoned = start.writable_copy()
    poisoned.params["dense1/weight"][0, 0] = np.nan
    async with InlineExecutor() as executor, executor.open(start.program) as session:
        step = TrainStep(model, session, optimizer, 5, threads)
        state = await step.begin(poisoned)
        with pytest.raises(DivergenceError, match="training diverged at step 1: the loss is nan") as caught:
            await step(state, batch(9, 4, 3))
    assert caught.value.step == 1


def test_normalization_defaults_are_what_the_reference_above_uses() -> None:
    assert Normalization() == Normalization(mean=0.5, std=0.25)
