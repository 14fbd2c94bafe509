"""Normalisation: moments, running statistics, gradients, and the same bits from every home."""

from __future__ import annotations

import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import asynctrain as at
from asynctrain.arena import Arena, Array, Shape, digest
from asynctrain.data import ImageSettings
from asynctrain.executors import InlineExecutor, ThreadExecutor
from asynctrain.nn import (
    BatchNorm,
    Conv2D,
    Dense,
    Flatten,
    GroupNorm,
    Layer,
    LayerNorm,
    MaxPool2D,
    Model,
    ReLU,
    Scope,
    Sequential,
    Workspace,
    layer_from_json,
)
from asynctrain.nn.kernels import norm
from asynctrain.nn.layers.fusion import fused
from asynctrain.nn.layers.normalization import RectifiedNorm
from asynctrain.optim import initial_state
from asynctrain.testing import check_gradients
from asynctrain.train.state import TrainState
from asynctrain.train.step import TrainStep
from asynctrain.types import Batch, Cursor, Program

CASES: list[tuple[Layer, Shape]] = [
    (BatchNorm(), (3,)),
    (BatchNorm(eps=0.5), (1,)),
    (BatchNorm(0.5), (3, 2, 4)),
    (BatchNorm(), (1, 1, 1)),
    (BatchNorm(), (5, 1, 2)),
    (LayerNorm(), (5,)),
    (LayerNorm(eps=0.1), (1,)),
    (LayerNorm(), (3, 2, 4)),
    (GroupNorm(1), (6,)),
    (GroupNorm(3), (3,)),
    (GroupNorm(2), (3, 2, 4)),
    (GroupNorm(4), (3, 5, 4)),  # a group for each channel
    (GroupNorm(1), (2, 1, 3)),
    (Sequential([Dense(4), BatchNorm(), ReLU(), Dense(3), LayerNorm()]), (5,)),
    (Sequential([BatchNorm(), Flatten(), Dense(2)]), (2, 3, 2)),
]
IDS = [f"{layer}-{shape}" for layer, shape in CASES]


@pytest.mark.parametrize(("layer", "input_shape"), CASES, ids=IDS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("train", [True, False])
def test_gradients_agree_with_central_differences(layer: Layer, input_shape: Shape, batch: int, train: bool) -> None:
    check_gradients(layer, input_shape, batch=batch, train=train)


@pytest.mark.parametrize(("layer", "input_shape"), CASES, ids=IDS)
def test_a_layer_comes_back_from_its_json(layer: Layer, input_shape: Shape) -> None:
    assert layer_from_json(json.loads(json.dumps(layer.to_json()))) == layer


class Passes:
    """One layer as a model, with random parameters and everything that its passes write into."""

    def __init__(self, layer: Layer, input_shape: Shape, dtype: type = np.float64) -> None:
        self.model = Model([layer], input_shape)
        self.params = self.model.init(0, dtype)
        self.params.vector[...] += np.random.default_rng(1).standard_normal(self.params.vector.shape)
        self.gradients = self.model.layout(dtype).empty()
        self.statistics = self.model.statistics_layout.empty()
        self.state = self.model.init_state()
        self.workspace = Workspace()

    def scope(self, *, train: bool = True) -> Scope:
        return Scope(
            self.workspace, train=train, gradients=self.gradients, statistics=self.statistics, state=self.state
        )

    def forward(self, x: Array, *, train: bool = True) -> Array:
        return self.model.forward(self.params, x, self.scope(train=train))[0].copy()

    def step(self, x: Array, dy: Array) -> Array | None:
        scope = self.scope()
        _, saved = self.model.forward(self.params, x, scope)
        return self.model.root.backward(self.params, saved, dy, scope)

    def named(self, arena: Arena) -> dict[str, Array]:
        return {name.rpartition("/")[2]: array.astype(np.float64) for name, array in arena.items()}


def images(shape: Shape, dtype: type = np.float32) -> Array:
    """Channels of very different means and spreads."""
    x = np.random.default_rng(0).standard_normal(shape)
    channels = np.arange(shape[-1])
    moved: Array = (x * 10.0 ** (channels % 3 - 1) + 5 * (channels % 4)).astype(dtype)
    return moved


def normalized(x: Array, axes: tuple[int, ...], eps: float = 1e-5) -> Array:
    """By the definition, in float64."""
    x = x.astype(np.float64)
    n: Array = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)
    return n


# Shapes that need several blocks, rows that cannot be laid side by side (a prime number), and very many channels
SHAPES = [(32, 33, 32, 32), (1009, 3), (7, 5, 3, 2000), (2, 300, 300, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batch_norm_agrees_with_its_definition(shape: Shape, dtype: type) -> None:
    passes = Passes(BatchNorm(), shape[1:], dtype)
    x = images(shape, dtype)
    y = passes.forward(x)
    params = passes.named(passes.params)
    expected = normalized(x, tuple(range(len(shape) - 1))) * params["scale"] + params["bias"]
    assert y.dtype == dtype
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e3 * float(np.finfo(dtype).eps))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_in_float32_agrees_with_that_in_float64(shape: Shape) -> None:
    for layer in (BatchNorm(), GroupNorm(1), LayerNorm()):
        single, double = Passes(layer, shape[1:], np.float32), Passes(layer, shape[1:], np.float64)
        double.params.vector[...] = 0
        for name, array in single.params.items():
            double.params[name][...] = array
        x, dy = images(shape), np.random.default_rng(2).standard_normal(shape).astype(np.float32)
        dx, expected = single.step(x, dy), double.step(x.astype(np.float64), dy.astype(np.float64))
        assert dx is not None
        assert expected is not None
        np.testing.assert_allclose(dx, expected, rtol=0, atol=2e-4 * np.abs(expected).max())
        for name, gradient in double.gradients.items():
            np.testing.assert_allclose(single.gradients[name], gradient, atol=3e-5 * np.abs(dy).size ** 0.5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 7), (33, 32, 32, 16)], ids=str)
def test_a_norm_and_its_relu_agree_with_one_after_the_other(shape: Shape, train: bool) -> None:
    x, found = images(shape, np.float64), []
    for layers in ([BatchNorm(), ReLU()], [Sequential([BatchNorm()]), Sequential([ReLU()])]):
        passes = Passes(Sequential(layers), shape[1:])
        passes.state.vector[...] += np.random.default_rng(3).uniform(0, 1, passes.state.vector.shape)
        scope = passes.scope(train=train)
        y, saved = passes.model.forward(passes.params, x, scope)
        dx = passes.model.root.backward(passes.params, saved, np.cos(x), scope)
        assert dx is not None
        assert (y == 0).any()
        found.append({"y": y, "dx": dx, **passes.named(passes.gradients)})
    for name, expected in found[1].items():
        np.testing.assert_allclose(found[0][name], expected, rtol=1e-9, atol=1e-9, err_msg=name)


def test_a_norm_and_its_relu_are_one_and_of_a_relu_of_somebodys_own_nothing_is_known() -> None:
    class Own(ReLU):
        pass

    steps = [step for _, step in fused({"a": BatchNorm(), "b": ReLU(), "c": BatchNorm(), "d": Own()}, (4,))]
    assert steps == [RectifiedNorm(BatchNorm()), BatchNorm(), Own()]


def test_a_block_far_from_all_others_costs_the_variance_few_digits() -> None:
    """What all is centred by is the mean of the first block."""
    x = np.random.default_rng(0).standard_normal((64 * 1024, 16)).astype(np.float32)
    x[: norm.block_size(x) // 16] += 1000
    _, variance = norm.moments(x, scratch=np.empty(norm.block_size(x), np.float32))
    np.testing.assert_allclose(variance, x.astype(np.float64).var(axis=0), rtol=1e-5)


def test_a_mean_far_from_zero_costs_the_variance_no_digits() -> None:
    """In float32, E[x^2] - E[x]^2 would lose everything here: the squares are a million times the variance."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 32, 32, 4)) + 1000).astype(np.float32).reshape(-1, 4)
    mean, variance = norm.moments(x, scratch=np.empty(norm.block_size(x), np.float32))
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(variance, x.astype(np.float64).var(axis=0), rtol=1e-5)


def test_a_channel_whose_images_differ_in_brightness_alone_has_their_variance() -> None:
    """Each block is constant in itself: all of the variance is between blocks."""
    levels = np.repeat(np.arange(8, dtype=np.float32), norm.TOGETHER // 2)[:, None]
    _, variance = norm.moments(levels, scratch=np.empty(norm.block_size(levels), np.float32))
    np.testing.assert_allclose(variance, np.arange(8).var(), rtol=1e-6)


def test_a_constant_channel_gives_its_bias() -> None:
    passes = Passes(BatchNorm(), (4, 4, 2), np.float32)
    y = passes.forward(np.full((3, 4, 4, 2), 7, np.float32))
    bias = np.broadcast_to(passes.named(passes.params)["bias"], y.shape)
    np.testing.assert_allclose(y, bias, rtol=0, atol=3e-4)  # 1 / sqrt(eps) = 316 times the rounding of 7


def test_running_statistics_are_folded_from_the_whole_batch_whatever_its_microbatches() -> None:
    x = images((23, 5, 4, 3), np.float64) + np.arange(23.0).reshape(-1, 1, 1, 1)  # microbatches of different means
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    for cuts in ([23], [8, 8, 7], [1, 22], [1] * 23):
        passes = Passes(BatchNorm(0.75), (5, 4, 3))
        total = passes.model.statistics_layout.empty()
        total.vector.fill(0)
        for piece in np.split(x, np.cumsum(cuts)[:-1]):
            passes.forward(piece)
            total.vector[...] += passes.statistics.vector
        for _ in range(2):
            passes.model.fold(passes.state, total, 23, passes.state)
        state = passes.named(passes.state)
        np.testing.assert_allclose(state["mean"], (1 - 0.75**2) * mean, rtol=1e-12)
        np.testing.assert_allclose(state["variance"], 0.75**2 + (1 - 0.75**2) * variance, rtol=1e-12)


def test_prediction_uses_the_running_statistics_and_writes_none() -> None:
    passes = Passes(BatchNorm(eps=0.1), (3,))
    passes.state["batch_norm1/mean"][...] = [1, 2, 3]
    passes.state["batch_norm1/variance"][...] = [4, 5, 6]
    passes.statistics.vector.fill(np.nan)
    before = passes.state.vector.copy()
    x = images((2, 3), np.float64)
    params = passes.named(passes.params)
    expected = params["scale"] * (x - [1, 2, 3]) / np.sqrt(np.array([4, 5, 6]) + 0.1) + params["bias"]
    np.testing.assert_allclose(passes.forward(x, train=False), expected, rtol=1e-12)
    np.testing.assert_array_equal(passes.state.vector, before)
    assert np.isnan(passes.statistics.vector).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_agrees_with_its_definition(shape: Shape) -> None:
    passes = Passes(LayerNorm(), shape[1:], np.float32)
    x = images(shape)
    params = passes.named(passes.params)
    expected = normalized(x, (-1,)) * params["scale"] + params["bias"]
    np.testing.assert_allclose(passes.forward(x), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("groups", [1, 4, 32])
def test_group_norm_agrees_with_its_definition(groups: int) -> None:
    passes = Passes(GroupNorm(groups), (40, 31, 32), np.float32)
    x = images((3, 40, 31, 32))
    params = passes.named(passes.params)
    grouped = normalized(x.reshape(3, 40, 31, groups, -1), (1, 2, 4)).reshape(x.shape)
    np.testing.assert_allclose(passes.forward(x), grouped * params["scale"] + params["bias"], rtol=0, atol=3e-4)


@pytest.mark.parametrize("layer", [BatchNorm(), LayerNorm(), GroupNorm(4)], ids=str)
def test_a_steady_step_allocates_nothing_large_and_repeats_its_bits(layer: Layer) -> None:
    passes = Passes(layer, (32, 32, 32), np.float32)
    x, dy = images((32, 32, 32, 32)), images((32, 32, 32, 32))[::-1].copy()
    results = []
    for attempt in range(3):
        tracemalloc.start()
        dx = passes.step(x, dy)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert attempt == 0 or peak < 2**20
        assert dx is not None
        results.append(digest({"dx": dx, **passes.gradients, **passes.statistics}))
    assert len(set(results)) == 1


MODEL = Model(
    [Conv2D(4), BatchNorm(), ReLU(), MaxPool2D(), Flatten(), Dense(6), BatchNorm(0.5), ReLU(), Dense(3)], (6, 6, 1)
)


def batch(seed: int, samples: int = 21) -> Batch:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (samples, 6, 6, 1), dtype=np.uint8)
    return Batch(pixels, rng.integers(0, 3, samples), ("",) * samples, Cursor(0, samples, samples, 1), last=True)


async def trained(home: InlineExecutor | ThreadExecutor, steps: int = 4, microbatch: int = 8) -> TrainState:
    optimizer = at.optim.sgd(0.1)
    params = MODEL.init(0)
    start = TrainState(
        Program(MODEL.to_json()), params, initial_state(optimizer, params), model_state=MODEL.init_state()
    )
    with ThreadPoolExecutor() as threads:
        async with home as executor, executor.open(start.program) as session:
            step = TrainStep(MODEL, session, optimizer, microbatch, threads)
            state = await step.begin(start)
            for seed in range(steps):
                state, _ = await step(state, batch(seed))
            return state.copy()


async def test_every_home_and_split_gives_the_same_parameters_and_running_statistics() -> None:
    homes: list[InlineExecutor | ThreadExecutor] = [
        InlineExecutor(),
        ThreadExecutor(1),
        ThreadExecutor(3),
        ThreadExecutor(3, split="layers"),
    ]
    states = [await trained(home) for home in homes]
    assert len({digest({**state.params, **state.model_state}) for state in states}) == 1
    assert not np.array_equal(states[0].model_state.vector, MODEL.init_state().vector)


async def test_a_step_of_several_microbatches_folds_the_statistics_of_the_whole_batch() -> None:
    state = await trained(InlineExecutor(), steps=1)
    data = batch(0)
    x = ((data.images / 255 - 0.5) / 0.25).astype(np.float32)
    y, _ = Model([Conv2D(4)], (6, 6, 1)).forward(MODEL.init(0), x, Scope(Workspace(), train=False))
    y = y.astype(np.float64)
    np.testing.assert_allclose(state.model_state["batch_norm1/mean"], 0.1 * y.mean((0, 1, 2)), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(state.model_state["batch_norm1/variance"], 0.9 + 0.1 * y.var((0, 1, 2)), rtol=1e-6)


async def test_a_classifier_keeps_the_running_statistics_through_its_file(tmp_path: Path) -> None:
    state = await trained(InlineExecutor())

    def classifier(model_state: Arena) -> at.Classifier:
        return at.Classifier(
            Program(MODEL.to_json()), state.params, model_state, ("a", "b", "c"), ImageSettings((6, 6), 1)
        )

    pixels = list(batch(9).images)
    saved = classifier(state.model_state)
    saved.save(tmp_path / "model.safetensors")
    predictions = await at.Classifier.load(tmp_path / "model.safetensors").predict(pixels)
    assert predictions == await saved.predict(pixels)
    assert predictions != await classifier(MODEL.init_state()).predict(pixels)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BatchNorm(1.0), ValueError, "batch_norm: momentum must be at least 0 and below 1, got 1.0"),
        (lambda: BatchNorm(eps=0), ValueError, "batch_norm: eps must be above 0, got 0"),
        (lambda: LayerNorm(eps=-1.0), ValueError, "layer_norm: eps must be above 0, got -1.0"),
        (lambda: GroupNorm(0), ValueError, "group_norm: groups must be at least 1, got 0"),
        (lambda: GroupNorm(2, eps=0.0), ValueError, "group_norm: eps must be above 0, got 0.0"),
        (lambda: layer_from_json({"layer": "group_norm", "groups": 1.5}), TypeError, "groups must be an integer"),
        (
            lambda: Model([GroupNorm(4)], (2, 2, 6)),
            ValueError,
            "group_norm1: group_norm: groups must divide the 6 channels, got 4",
        ),
        (lambda: BatchNorm().output_shape(()), ValueError, r"batch_norm needs an input of shape \(..., channels\)"),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(make: object, error: type[Exception], message: str) -> None:
    assert callable(make)
    with pytest.raises(error, match=message):
        make()
