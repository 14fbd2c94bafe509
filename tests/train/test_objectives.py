"""Losses and optimizers at work in a step: weights, soft labels, norms over all parts, sums that are resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import asynctrain as at
from asynctrain import nn, optim
from asynctrain.arena import Array, digest
from asynctrain.errors import WeightlessBatchError
from asynctrain.executors import InlineExecutor, ThreadExecutor
from asynctrain.nn.losses import (
    LossFunction,
    binary_cross_entropy,
    huber,
    mean_squared_error,
    softmax_cross_entropy,
)
from asynctrain.optim import initial_state
from asynctrain.train.state import TrainState
from asynctrain.train.step import TrainStep
from asynctrain.types import Batch, Cursor, Program, Sums

pytestmark = pytest.mark.one_loop

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (23, 4, 4, 1), dtype=np.uint8)
LABELS = RNG.integers(0, 3, 23)
SOFT: Array = RNG.dirichlet(np.ones(3), 23).astype(np.float32)
MODEL = nn.models.linear(num_classes=3, image_shape=(4, 4, 1))
PLAIN = softmax_cross_entropy()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def batch(labels: Array, images: Array = IMAGES) -> Batch:
    return Batch(images, labels, ("",) * len(images), Cursor(0, len(images), len(images), 1), last=True)


def fresh(
    optimizer: optim.Optimizer, loss: LossFunction = PLAIN, dtype: str = "float64", model: nn.Model = MODEL
) -> TrainState:
    params = model.init(0, dtype)
    program = Program(model.to_json(), loss.to_json(), dtype=dtype)
    return TrainState(program, params, initial_state(optimizer, params))


async def trained(
    start: TrainState,
    optimizer: optim.Optimizer,
    batches: Sequence[Batch],
    threads: ThreadPoolExecutor,
    *,
    model: nn.Model = MODEL,
    microbatch: int = 5,
    home: at.Executor | None = None,
) -> tuple[TrainState, Sums]:
    """Return the state after the batches, in arrays of its own, and the sums of the last."""
    async with home or InlineExecutor() as executor, executor.open(start.program) as session:
        step = TrainStep(model, session, optimizer, microbatch, threads)
        state = await step.begin(start)
        for each in batches:
            state, sums = await step(state, each)
    return state.copy(), sums


def outputs(state: TrainState) -> Array:
    x = (IMAGES.reshape(len(IMAGES), -1) / 255 - 0.5) / 0.25
    z: Array = x @ state.params["dense1/weight"] + state.params["dense1/bias"]
    return z


# Losses

CASES: dict[str, tuple[LossFunction, Array]] = {
    "classes, smoothed, ignored": (softmax_cross_entropy((1.0, 0.2, 3.0), 0.1, ignore_index=1), LABELS),
    "soft": (softmax_cross_entropy(), SOFT),
    "many labels": (binary_cross_entropy((1.0, 2.0, 0.5)), (SOFT > 0.3).astype(np.float32)),
    "regression": (mean_squared_error(), SOFT),
    "robust regression": (huber(0.1), SOFT),
}


@pytest.mark.parametrize(("loss", "labels"), CASES.values(), ids=CASES)
async def test_a_step_goes_down_the_weighted_mean_whatever_the_microbatches(
    loss: LossFunction, labels: Array, threads: ThreadPoolExecutor
) -> None:
    optimizer = optim.sgd(0.1)
    start = fresh(optimizer, loss)
    whole = loss(outputs(start), labels)
    x = (IMAGES.reshape(len(IMAGES), -1) / 255 - 0.5) / 0.25
    weight = start.params["dense1/weight"] - 0.1 * x.T @ whole.gradient / whole.weight
    for microbatch in (1, 5, 23):
        state, sums = await trained(start, optimizer, [batch(labels)], threads, microbatch=microbatch)
        np.testing.assert_allclose(state.params["dense1/weight"], weight, rtol=1e-9, atol=1e-12)
        assert sums.mean_loss == pytest.approx(whole.value / whole.weight, rel=1e-12)
        assert sums.samples == 23
        assert sums.accuracy == pytest.approx(whole.correct / whole.judged if whole.judged else np.nan, nan_ok=True)


async def test_a_batch_that_weighs_nothing_is_an_error_and_leaves_the_state(threads: ThreadPoolExecutor) -> None:
    optimizer = optim.sgd(0.1)
    start = fresh(optimizer, softmax_cross_entropy(ignore_index=-1))
    with pytest.raises(WeightlessBatchError, match="the batch of step 1 has a total weight of 0") as caught:
        await trained(start, optimizer, [batch(np.full(23, -1))], threads)
    assert caught.value.step == 1


async def test_a_microbatch_that_weighs_nothing_adds_nothing(threads: ThreadPoolExecutor) -> None:
    optimizer = optim.sgd(0.1)
    labels = np.where(np.arange(23) < 12, -1, LABELS)
    start = fresh(optimizer, softmax_cross_entropy(ignore_index=-1))
    ignored, _ = await trained(start, optimizer, [batch(labels)], threads, microbatch=4)
    left_out, _ = await trained(start, optimizer, [batch(LABELS[12:], IMAGES[12:])], threads, microbatch=4)
    np.testing.assert_allclose(ignored.params.vector, left_out.params.vector, rtol=1e-12, atol=1e-14)


async def test_mixed_batches_train(blobs: at.ArrayDataset) -> None:
    loader = at.Loader(blobs, batch_size=60, image_size=(12, 12), channels=1, mix=at.augment.Mixup())
    model = at.models.linear(num_classes=3, image_shape=(12, 12, 1))
    loss = softmax_cross_entropy(label_smoothing=0.05)
    async with ThreadExecutor(2) as executor:
        trainer = at.Trainer(model, optimizer=optim.adamw(1e-2), executor=executor, loss=loss)
        await trainer.fit(loader, epochs=8)
        evaluation = await trainer.evaluate(loader.evaluating(blobs))
    assert evaluation.accuracy > 0.9


async def test_a_trainer_takes_a_loss_by_name_or_with_arguments_and_tells_of_what_is_none() -> None:
    def program(**loss: str | LossFunction) -> Program:
        trainer = at.Trainer(MODEL, optimizer=optim.sgd(0.1), executor=InlineExecutor(), **loss)  # type: ignore[arg-type]
        return trainer.state.program

    assert program().loss == program(loss="softmax_cross_entropy").loss == "softmax_cross_entropy"
    described = program(loss=huber(0.5))
    assert Program.from_json(described.to_json()) == described
    assert described.digest != program(loss=huber(0.6)).digest
    with pytest.raises(ValueError, match=r"loss must be one of softmax_cross_entropy, .* got 'hinge'"):
        program(loss="hinge")


# Optimizers

CLIPPED = optim.chain(optim.clip_by_global_norm(1e-3), optim.adamw(1e-2))


@pytest.mark.parametrize("model", [MODEL, nn.models.mlp(num_classes=3, image_shape=(4, 4, 1), hidden=(300, 400))])
async def test_clipping_bounds_the_norm_of_the_mean_gradient(model: nn.Model, threads: ThreadPoolExecutor) -> None:
    optimizer = optim.chain(optim.clip_by_global_norm(1e-3), optim.sgd(1.0))
    start = fresh(optimizer, model=model)
    clipped, _ = await trained(start, optimizer, [batch(LABELS)], threads, model=model)
    free, _ = await trained(start, optim.sgd(1.0), [batch(LABELS)], threads, model=model)
    moved, gradient = (state.params.vector - start.params.vector for state in (clipped, free))
    assert np.linalg.norm(gradient) > 0.1
    np.testing.assert_allclose(moved, gradient * 1e-3 / np.linalg.norm(gradient), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    "optimizer", [CLIPPED, optim.average_weights(optim.accumulate(optim.freeze(CLIPPED, "dense1/*"), 2))], ids=repr
)
async def test_large_models_have_the_same_bits_from_all_homes_and_threads(optimizer: optim.Optimizer) -> None:
    model = nn.models.mlp(num_classes=10, image_shape=(20, 20, 1))
    images = RNG.integers(0, 256, (64, 20, 20, 1), dtype=np.uint8)
    data = batch(RNG.integers(0, 10, 64), images)
    digests = set()
    for home, count in ((InlineExecutor(), 1), (ThreadExecutor(1), 4), (ThreadExecutor(3, split="layers"), 2)):
        start = fresh(optimizer, dtype="float32", model=model)
        with ThreadPoolExecutor(count) as threads:
            state, _ = await trained(start, optimizer, [data] * 4, threads, model=model, microbatch=16, home=home)
        digests.add((state.digest(), *(digest(arena) for arena in state.optimizer_state.values())))
    assert len(digests) == 1


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
async def test_a_run_resumed_between_two_applications_ends_with_the_same_bits(
    stop: int, threads: ThreadPoolExecutor
) -> None:
    optimizer = optim.average_weights(optim.accumulate(CLIPPED, steps=3))
    batches = [batch(np.roll(LABELS, turn)) for turn in range(5)]
    start = fresh(optimizer)
    whole, _ = await trained(start, optimizer, batches, threads)
    part, _ = await trained(start, optimizer, batches[:stop], threads)
    resumed, _ = await trained(part, optimizer, batches[stop:], threads)
    assert resumed.digest() == whole.digest() != start.digest()
    for slot, arena in whole.optimizer_state.items():
        assert digest(resumed.optimizer_state[slot]) == digest(arena)


async def test_averaged_parameters_are_read_from_the_state_the_frozen_ones_as_they_are(
    threads: ThreadPoolExecutor,
) -> None:
    optimizer = optim.freeze(optim.average_weights(optim.sgd(0.1)), "*/bias")
    state, _ = await trained(fresh(optimizer), optimizer, [batch(LABELS)] * 3, threads)
    averaged = state.averaged()
    average = state.optimizer_state["average"]
    assert list(average) == ["dense1/weight"]
    np.testing.assert_array_equal(averaged.params["dense1/weight"], average["dense1/weight"])
    np.testing.assert_array_equal(averaged.params["dense1/bias"], state.params["dense1/bias"])
    assert averaged.digest() != state.digest()
    assert averaged.params.layout == state.params.layout
    assert not averaged.params["dense1/weight"].flags.writeable


def test_a_state_without_averages_says_how_to_have_them() -> None:
    with pytest.raises(ValueError, match=r"made by optim.average_weights\(...\) to have averaged parameters"):
        fresh(optim.sgd(0.1)).averaged()
