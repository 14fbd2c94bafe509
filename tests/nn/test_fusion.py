"""A convolution and the pooling of its outputs as one kernel: the numbers and the model are those of two."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from asynctrain.arena import Array, Shape
from asynctrain.nn import (
    BatchNorm,
    Conv2D,
    Dense,
    Flatten,
    Layer,
    LeakyReLU,
    MaxPool2D,
    Model,
    ReLU,
    Scope,
    Sequential,
    Tanh,
    Workspace,
    models,
)
from asynctrain.nn.layers.fusion import PooledConv2D, RectifiedDense, fused
from asynctrain.testing import check_gradients

Arrays = dict[str, Array]

CASES: list[tuple[list[Layer], Shape]] = [
    ([Conv2D(6, 5), ReLU(), MaxPool2D(2)], (14, 14, 1)),
    ([Conv2D(5, 5, padding="valid"), ReLU(), MaxPool2D(2)], (12, 14, 6)),
    ([Conv2D(4), LeakyReLU(0.1), MaxPool2D(2)], (9, 7, 3)),  # the pool leaves a row and a column out
    ([Conv2D(3, (2, 3), padding="valid", use_bias=False), MaxPool2D(2)], (8, 9, 2)),
    ([Conv2D(7, (1, 4), padding=((2, 0), (1, 3))), ReLU(), MaxPool2D((1, 2))], (3, 6, 2)),
    ([Conv2D(40, 2), ReLU(), MaxPool2D((3, 2))], (7, 5, 1)),  # more filters than numbers in a patch
    ([Conv2D(2), ReLU(), MaxPool2D(2)], (2, 3, 1)),
    ([Conv2D(3, 5), ReLU(), MaxPool2D(2), Conv2D(4, 4, padding="valid"), ReLU(), MaxPool2D(2)], (19, 18, 2)),
    ([Conv2D(3), MaxPool2D(2), Conv2D(2, (3, 4)), MaxPool2D(2), Conv2D(2, 2), LeakyReLU(), MaxPool2D(3)], (27, 25, 1)),
]
each_case = pytest.mark.parametrize(("layers", "shape"), CASES, ids=[f"{layers}-{shape}" for layers, shape in CASES])


def apart(layers: Sequence[Layer]) -> list[Layer]:
    """Return the layers so that none is next to another, which is what is fused."""
    return [Sequential([layer]) for layer in layers]


def is_fused(layers: Sequence[Layer], shape: Shape) -> bool:
    return any(isinstance(step, PooledConv2D) for _, step in fused(Sequential(layers).children, shape))


def passed(
    layers: Sequence[Layer],
    x: Array,
    dy: Array,
    workspace: Workspace | None = None,
    emit: Callable[[Callable[[], None]], None] = lambda job: job(),
) -> Arrays:
    """Return y, dx and the weight gradients by their last name, for parameters that depend on the seed alone."""
    model = Model(layers, x.shape[1:])
    params, gradients = model.init(3, x.dtype), model.layout(x.dtype).empty()
    for name in params:
        params[name][...] += np.random.default_rng(4).standard_normal(params[name].shape) / 4
    gradients.vector.fill(np.nan)
    scope = Scope(workspace or Workspace(), train=True, emit=emit, gradients=gradients)
    y, saved = model.forward(params, x, scope)
    found = {"y": y.copy()}
    dx = model.root.backward(params, saved, dy, scope)
    assert dx is not None
    return {**found, "dx": dx.copy(), **{name.split("/")[-1]: gradients[name] for name in gradients}}


def drawn(layers: Sequence[Layer], shape: Shape, dtype: type, samples: int = 5) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    dy = rng.standard_normal((samples, *Sequential(layers).output_shape(shape)))
    return rng.standard_normal((samples, *shape)).astype(dtype), dy.astype(dtype)


@each_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_all_parts_agree_with_one_layer_after_the_other(
    layers: list[Layer], shape: Shape, dtype: type, tolerance: float
) -> None:
    assert is_fused(layers, shape)
    assert not is_fused(apart(layers), shape)
    x, dy = drawn(layers, shape, dtype)
    together, in_turn = passed(layers, x, dy), passed(apart(layers), x, dy)
    assert together.keys() == in_turn.keys()
    for name, expected in in_turn.items():
        assert together[name].dtype == dtype
        np.testing.assert_allclose(together[name], expected, atol=tolerance * np.abs(expected).max(), err_msg=name)


@each_case
def test_gradients_agree_with_central_differences(layers: list[Layer], shape: Shape) -> None:
    check_gradients(Sequential(layers), shape)


@pytest.mark.parametrize("samples", [1, 33])
def test_images_that_take_several_tiles_agree_too(samples: int) -> None:
    layers, shape = [Conv2D(5), ReLU(), MaxPool2D(2)], (44, 36, 6)
    x, dy = drawn(layers, shape, np.float64, samples)
    together, in_turn = passed(layers, x, dy), passed(apart(layers), x, dy)
    for name, expected in in_turn.items():
        np.testing.assert_allclose(together[name], expected, atol=1e-12 * np.abs(expected).max(), err_msg=name)


def test_of_equal_outputs_the_first_in_row_order_takes_the_gradient() -> None:
    layers: list[Layer] = [Conv2D(1, 1), MaxPool2D(2)]
    x = np.zeros((1, 2, 6, 1))
    x[0, :, :, 0] = [[5, 5, 0, 1, 0, 0], [5, 5, 1, 1, 0, 2]]
    model = Model(layers, (2, 6, 1))
    params = model.init(0, np.float64)
    params["conv1/weight"][...] = 1
    scope = Scope(Workspace(), train=True, gradients=model.layout(np.float64).empty())
    _, saved = model.forward(params, x, scope)
    dx = model.root.backward(params, saved, np.array([7.0, 8.0, 9.0]).reshape(1, 1, 3, 1), scope)
    assert dx is not None
    np.testing.assert_array_equal(dx[0, :, :, 0], [[7, 0, 0, 8, 0, 0], [0, 0, 0, 0, 0, 9]])


@each_case
def test_bits_depend_on_no_buffer_and_no_order_of_the_weight_gradients(layers: list[Layer], shape: Shape) -> None:
    x, dy = drawn(layers, shape, np.float32)
    workspace, jobs = Workspace(), list[Callable[[], None]]()
    first = passed(layers, x, dy)
    passed(layers, dy=dy + 1, x=x[:, ::-1].copy(), workspace=workspace)
    later = passed(layers, x, dy, workspace, jobs.append)
    for job in jobs:
        job()
    for name, expected in first.items():
        np.testing.assert_array_equal(later[name], expected, err_msg=name)


def test_a_steady_pass_allocates_nothing_large() -> None:
    layers: list[Layer] = [Conv2D(8, 5), ReLU(), MaxPool2D(2)]
    x, dy = drawn(layers, (56, 56, 3), np.float32, 16)
    model = Model(layers, x.shape[1:])
    params, gradients = model.init(0), model.layout().empty()
    scope = Scope(Workspace(), train=True, gradients=gradients)

    def step() -> None:
        _, saved = model.forward(params, x, scope)
        model.root.backward(params, saved, dy, scope)

    step()
    tracemalloc.start()
    try:
        step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_a_dense_layer_and_its_relu_agree_with_one_after_the_other() -> None:
    layers: list[Layer] = [Dense(7), ReLU()]
    x, dy = drawn(layers, (5,), np.float64)
    together, in_turn = passed(layers, x, dy), passed(apart(layers), x, dy)
    assert (together["y"] == 0).any()
    for name, expected in in_turn.items():
        np.testing.assert_array_equal(together[name], expected, err_msg=name)
    check_gradients(Sequential(layers), (5,))


@dataclass(frozen=True)
class _Falling(ReLU):
    """An activation of somebody's own, of which nothing is known."""


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([Conv2D(4), Tanh(), MaxPool2D(2)], (8, 8, 1)),
        ([Conv2D(4), _Falling(), MaxPool2D(2)], (8, 8, 1)),
        ([Conv2D(4), BatchNorm(), ReLU(), MaxPool2D(2)], (8, 8, 1)),  # a negative scale makes a minimum of the maximum
        ([Conv2D(4), ReLU(), ReLU(), MaxPool2D(2)], (8, 8, 1)),
        ([Conv2D(4, stride=2), ReLU(), MaxPool2D(2)], (8, 8, 1)),
        ([Conv2D(4, dilation=2), ReLU(), MaxPool2D(2)], (8, 8, 1)),
        ([Conv2D(4, groups=2), ReLU(), MaxPool2D(2)], (8, 8, 2)),
        ([Conv2D(4), ReLU(), MaxPool2D(2, stride=1)], (8, 8, 1)),
        ([Conv2D(4), ReLU(), MaxPool2D(2, dilation=2)], (8, 8, 1)),
        ([Conv2D(4), ReLU(), MaxPool2D(2, padding="same")], (7, 8, 1)),
        ([Conv2D(4), ReLU(), MaxPool2D(2)], (8, 8, 16)),  # many channels: the zeros among the weights cost more
    ],
)
def test_what_would_be_wrong_or_slower_is_not_fused(layers: list[Layer], shape: Shape) -> None:
    assert not is_fused(layers, shape)


def test_lenet_is_fused_as_far_as_it_goes_and_each_other_layer_is_left_as_it_is() -> None:
    model = models.lenet(num_classes=10, image_shape=(28, 28, 1))
    steps = dict(fused(model.root.children, model.input_shape))
    assert list(steps) == ["conv1", "conv2", "flatten1", "dense1", "dense2", "dense3"]
    assert [type(step) for step in steps.values()][:5] == [PooledConv2D] * 2 + [Flatten] + [RectifiedDense] * 2
    assert all(steps[name] is model.root.children[name] for name in ("flatten1", "dense3"))


def test_only_neighbours_hand_planes_on() -> None:
    layers = [Conv2D(2), MaxPool2D(2), Conv2D(2), ReLU(), MaxPool2D(2), Conv2D(2), LeakyReLU(), MaxPool2D(2)]
    steps = [step for _, step in fused(Sequential([*layers, *layers[:2]]).children, (32, 32, 1))]
    planes = [(step.takes_planes, step.gives_planes) for step in steps if isinstance(step, PooledConv2D)]
    assert planes == [(False, True), (True, True), (True, False), (False, False)]


def test_it_is_a_matter_of_execution_alone() -> None:
    layers = [Conv2D(6, 5), ReLU(), MaxPool2D(2), Flatten(), Dense(3)]
    model = Model(layers, (10, 10, 1))
    before = model.to_json(), model.leaves, model.summary(), list(model.parameters), repr(model), hash(model)
    scope = Scope(Workspace(), train=False)
    model.forward(model.init(0), np.zeros((2, 10, 10, 1), np.float32), scope)
    assert before == (
        model.to_json(),
        model.leaves,
        model.summary(),
        list(model.parameters),
        repr(model),
        hash(model),
    )
    assert Model.from_json(model.to_json()) == model
    assert list(model.parameters) == ["conv1/weight", "conv1/bias", "dense1/weight", "dense1/bias"]
