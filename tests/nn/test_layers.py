"""Layers: gradients against central differences, shapes, JSON, and what a pass may rely on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest

from asynctrain.arena import Array, Shape
from asynctrain.nn import (
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    Layer,
    MaxPool2D,
    Model,
    Parameter,
    ReLU,
    Scope,
    Sequential,
    Tanh,
    Workspace,
    layer_from_json,
    layers,
    register_layer,
)
from asynctrain.testing import check_gradients
from asynctrain.types import Params

CASES: list[tuple[Layer, Shape]] = [
    (Dense(3), (5,)),
    (Dense(1), (1,)),
    (ReLU(), (3, 2, 2)),
    (Flatten(), (3, 2, 2)),
    (Dropout(0.5), (4, 3)),
    (Dropout(0.0), (4, 3)),
    (MaxPool2D(2), (4, 6, 3)),
    (MaxPool2D(2), (5, 7, 1)),  # leftovers at the edge
    (MaxPool2D(3, stride=2), (7, 5, 2)),  # windows overlap
    (MaxPool2D(2, stride=3), (8, 6, 2)),  # pixels between windows
    (MaxPool2D(2, stride=5), (3, 3, 1)),  # stride beyond the image
    (MaxPool2D(1), (2, 3, 2)),
    (Conv2D(3), (5, 4, 2)),
    (Conv2D(1, 1), (1, 1, 1)),
    (Conv2D(2, 3), (1, 1, 3)),  # a window larger than the image
    (Conv2D(2, 3, padding="valid"), (3, 3, 2)),
    (Conv2D(2, (3, 2), padding="valid"), (4, 5, 1)),
    (Conv2D(2, (1, 4)), (3, 5, 2)),
    (Conv2D(2, 3, stride=2), (6, 5, 2)),
    (Conv2D(2, 3, stride=(1, 2), padding="valid"), (5, 6, 2)),  # the last column is in no window
    (Conv2D(2, 2, stride=3), (7, 8, 2)),  # stride beyond the window
    (Conv2D(2, 2, stride=3, padding="valid"), (7, 6, 2)),
    (Conv2D(2, 2, padding=3), (2, 3, 1)),  # windows that see nothing but padding
    (Conv2D(2, 2, stride=2, padding=3), (3, 2, 1)),
    (Conv2D(2, 5, stride=4, padding=2), (6, 3, 1)),
    (Sequential([Conv2D(2), ReLU(), MaxPool2D(2), Flatten(), Dense(3)]), (4, 4, 1)),
    (Sequential([Sequential([Dense(3), ReLU()]), Sequential([Dropout(0.3), Dense(2)])]), (4,)),
    (Sequential([]), (3,)),
]


@pytest.mark.parametrize(("layer", "input_shape"), CASES, ids=[f"{layer}-{shape}" for layer, shape in CASES])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_agree_with_central_differences(layer: Layer, input_shape: Shape, batch: int) -> None:
    check_gradients(layer, input_shape, batch=batch)


def test_the_gradient_check_finds_a_wrong_gradient() -> None:
    @dataclass(frozen=True)
    class Wrong(ReLU):
        def backward_input(self, params: Params, saved: Array, dy: Array, scope: Scope) -> Array:
            return 1.001 * super().backward_input(params, saved, dy, scope)

    with pytest.raises(AssertionError, match="the gradient of x is wrong by"):
        check_gradients(Wrong(), (3,))


@pytest.mark.parametrize(("layer", "input_shape"), CASES, ids=[f"{layer}-{shape}" for layer, shape in CASES])
def test_outputs_have_the_shape_that_was_told_and_the_dtype_of_the_input(layer: Layer, input_shape: Shape) -> None:
    model = Model([layer], input_shape)
    for dtype in (np.float32, np.float64):
        y, _ = model.forward(model.init(0, dtype), np.ones((3, *input_shape), dtype), predicting())
        assert y.shape == (3, *layer.output_shape(input_shape))
        assert y.dtype == dtype
        assert y.flags.c_contiguous


@pytest.mark.parametrize(("layer", "input_shape"), CASES, ids=[f"{layer}-{shape}" for layer, shape in CASES])
def test_a_layer_comes_back_from_its_json(layer: Layer, input_shape: Shape) -> None:
    assert layer_from_json(json.loads(json.dumps(layer.to_json()))) == layer


def predicting() -> Scope:
    return Scope(Workspace(), train=False)


def test_dropout_lets_everything_through_in_prediction() -> None:
    x = np.ones((2, 3), np.float32)
    assert Dropout(0.5).forward({}, x, predicting())[0] is x


def test_dropout_keeps_the_mean_and_drops_at_its_rate() -> None:
    x = np.ones((100, 1000))
    scope = Scope(Workspace(), train=True, rng=np.random.default_rng)
    y, _ = Dropout(0.25).forward({}, x, scope)
    assert set(np.unique(y)) == {0.0, 1 / 0.75}
    assert np.mean(y == 0) == pytest.approx(0.25, abs=0.01)


def test_dropout_draws_the_same_mask_for_every_dtype_and_another_for_every_layer() -> None:
    model = Model([Dropout(0.5), Dropout(0.5)], (1000,))

    def pattern(dtype: type, depth: int) -> Array:
        scope = Scope(Workspace(), train=True, rng=np.random.default_rng)
        _, saved = model.forward({}, np.ones((1, 1000), dtype), scope)
        kept: Array = saved[depth].saved > 0
        return kept

    np.testing.assert_array_equal(pattern(np.float32, 0), pattern(np.float64, 0))
    assert np.any(pattern(np.float32, 0) != pattern(np.float32, 1))


def test_ties_in_a_pooling_window_go_to_its_first_element() -> None:
    layer = MaxPool2D(2)
    scope = predicting()
    x = np.zeros((1, 2, 4, 1))
    x[0, :, :, 0] = [[0, 5, 1, 1], [5, 5, 0, 1]]
    _, saved = layer.forward({}, x, scope)
    dx = layer.backward_input({}, saved, np.array([[[[7.0], [9.0]]]]), scope)
    np.testing.assert_array_equal(dx[0, :, :, 0], [[0, 7, 9, 0], [0, 0, 0, 0]])


def test_same_padding_with_an_even_window_puts_the_odd_pixel_at_the_end() -> None:
    params = {"weight": np.array([1.0, 10.0]).reshape(1, 2, 1, 1), "bias": np.zeros(1)}
    y, _ = Conv2D(1, (1, 2)).forward(params, np.array([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1), predicting())
    np.testing.assert_array_equal(y.ravel(), [21, 32, 3])


class Recorder:
    """Counts the checks of a pass, and holds back or reorders its jobs."""

    def __init__(self) -> None:
        self.checks = 0
        self.jobs: list[Callable[[], None]] = []

    def check(self) -> None:
        self.checks += 1


CNN = Model([Conv2D(4), ReLU(), MaxPool2D(), Conv2D(6), ReLU(), Flatten(), Dropout(0.5), Dense(5)], (6, 6, 2))


def gradients(recorder: Recorder | None = None, order: slice = slice(None), model: Model = CNN) -> Mapping[str, Array]:
    params, arena = model.init(0), model.layout().empty()
    recorder = recorder or Recorder()
    scope = Scope(
        Workspace(),
        train=True,
        rng=np.random.default_rng,
        check=recorder.check,
        emit=recorder.jobs.append,
        gradients=arena,
    )
    x = np.random.default_rng(1).standard_normal((3, *model.input_shape)).astype(np.float32)
    y, saved = model.forward(params, x, scope)
    model.backward(params, saved, np.ones_like(y), scope)
    for job in recorder.jobs[order]:
        job()
    return arena


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["in order", "in reverse"])
def test_jobs_run_after_the_chain_in_any_order_give_the_bits_of_jobs_run_at_once(order: slice) -> None:
    at_once, arena = CNN.init(0), CNN.layout().empty()
    scope = Scope(Workspace(), train=True, rng=np.random.default_rng, gradients=arena)
    x = np.random.default_rng(1).standard_normal((3, *CNN.input_shape)).astype(np.float32)
    y, saved = CNN.forward(at_once, x, scope)
    CNN.backward(at_once, saved, np.ones_like(y), scope)
    for name, gradient in gradients(order=order).items():
        np.testing.assert_array_equal(gradient, arena[name])
        assert np.any(gradient != 0)


def test_a_pass_is_checked_before_each_kernel_of_each_layer() -> None:
    recorder = Recorder()
    gradients(recorder)
    forward = len(CNN.leaves) - 2  # the first convolution, its ReLU and the pooling of its outputs are one kernel
    weight_gradients = len(CNN.layers_with_parameters)
    input_gradients = forward  # nobody wants the first layer's, but those of its outputs are a kernel of their own
    assert recorder.checks == forward + weight_gradients + input_gradients
    assert len(recorder.jobs) == weight_gradients


def test_a_check_that_raises_stops_the_pass_before_the_next_kernel() -> None:
    ran: list[int] = []

    @dataclass(frozen=True)
    class Noting(ReLU):
        number: int = 0

        def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array]:
            ran.append(self.number)
            return super().forward(params, x, scope)

    def check() -> None:
        if len(ran) == 2:
            raise InterruptedError

    scope = Scope(Workspace(), train=False, check=check)
    with pytest.raises(InterruptedError):
        Sequential([Noting(n) for n in range(5)]).forward({}, np.ones((1, 1)), scope)
    assert ran == [0, 1]


def test_input_gradients_stop_at_the_first_layer_with_parameters() -> None:
    recorder = Recorder()
    gradients(recorder, model=Model([Flatten(), Dropout(0.1), Dense(3), Tanh()], (4,)))
    assert recorder.checks == 4 + 1 + 1  # forward, the weight gradient, the input gradient of Tanh


def test_nothing_that_a_layer_is_handed_is_overwritten() -> None:
    """Else jobs that run beside the chain would read something else."""
    for layer, input_shape in CASES:
        model = Model([layer], input_shape)
        params, arena = model.init(0), model.layout().empty()
        scope = Scope(Workspace(), train=True, rng=np.random.default_rng, gradients=arena)
        x = np.random.default_rng(0).standard_normal((2, *input_shape)).astype(np.float32)
        x.flags.writeable = False
        y, saved = model.forward(params.read_only(), x, scope)
        kept, dy = y.copy(), np.ones_like(y)
        dy.flags.writeable = False
        model.root.backward(params.read_only(), saved, dy, scope)
        np.testing.assert_array_equal(y, kept)


def test_a_registered_layer_of_ones_own_works_in_a_model_and_in_json() -> None:
    @register_layer("test_scale")
    @dataclass(frozen=True)
    class Scale(Layer):
        """y = x * weight, element by element."""

        start: str = "he_normal"

        def output_shape(self, input_shape: Shape) -> Shape:
            return input_shape

        def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
            return {"weight": Parameter((1, *input_shape), self.start)}

        def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array]:
            return x * params["weight"], x

        def backward_input(self, params: Params, saved: Array, dy: Array, scope: Scope) -> Array:
            product: Array = dy * params["weight"]
            return product

        def backward_params(self, params: Params, saved: Array, dy: Array, scope: Scope) -> None:
            scope.gradient("weight")[...] = np.sum(saved * dy, axis=0)

    try:
        model = Model([Scale(), Scale("glorot_uniform"), Dense(2)], (3,))
        assert Model.from_json(model.to_json()) == model
        assert list(model.layers_with_parameters) == ["test_scale1", "test_scale2", "dense1"]
        check_gradients(model.root, (3,))
        with pytest.raises(ValueError, match="kind must be a name that no other layer has, got 'test_scale'"):
            register_layer("test_scale")(Scale)
    finally:
        del layers.base._KINDS["test_scale"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Dense(0), ValueError, "dense: units must be at least 1, got 0"),
        (
            lambda: layer_from_json({"layer": "dense", "units": 2.5}),
            TypeError,
            "dense: units must be an integer, got 2.5",
        ),
        (lambda: Dense(True), TypeError, "dense: units must be an integer, got True"),
        (lambda: Dense(2, initializer="magic"), ValueError, "initializer must be one of .*, got 'magic'"),
        (lambda: Conv2D(0), ValueError, "conv2d: filters must be at least 1, got 0"),
        (
            lambda: layer_from_json({"layer": "conv2d", "filters": 1, "kernel_size": [3, 3, 3]}),
            ValueError,
            r"conv2d: kernel_size must be one number or two, got \(3, 3, 3\)",
        ),
        (lambda: Conv2D(1, stride=(1, 0)), ValueError, "conv2d: stride must be at least 1, got 0"),
        (
            lambda: layer_from_json({"layer": "conv2d", "filters": 1, "padding": "full"}),
            ValueError,
            "padding must be 'same', 'valid', an integer, two, or two pairs, got 'full'",
        ),
        (lambda: Conv2D(1, padding=-1), ValueError, "conv2d: padding must be at least 0, got -1"),
        (lambda: MaxPool2D(0), ValueError, "max_pool2d: size must be at least 1, got 0"),
        (lambda: Dropout(1.0), ValueError, "dropout: rate must be at least 0 and below 1, got 1.0"),
        (
            lambda: layer_from_json({"layer": "sequential", "layers": [3]}),
            TypeError,
            r"layers must be layers, such as Dense\(10\), got 3",
        ),
        (lambda: Model([Dense(3)], (4, 4, 1)), ValueError, r"dense1: dense needs an input of shape \(features,\)"),
        (
            lambda: Model([Conv2D(3), Conv2D(3, 5, padding="valid")], (4, 4, 1)),
            ValueError,
            "conv2: conv2d with kernel_size 5x5 needs an input of at least that size, padding included, got 4x4",
        ),
        (
            lambda: Model([Sequential([Flatten(), MaxPool2D()])], (4, 4, 1)),
            ValueError,
            r"sequential1: max_pool1: max_pool2d needs an input of shape \(height, width, channels\), got \(16,\)",
        ),
        (lambda: Model([MaxPool2D(5)], (4, 4, 1)), ValueError, "max_pool1: max_pool2d with size 5x5 .*, got 4x4"),
        (lambda: layer_from_json({"layer": "conv3d"}), ValueError, "layer must be one of .*, conv2d, .*, got 'conv3d'"),
        (
            lambda: layer_from_json({"layer": "dense", "unit": 3}),
            ValueError,
            "dense takes the arguments units, initializer, got unit",
        ),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(make: object, error: type[Exception], message: str) -> None:
    assert callable(make)
    with pytest.raises(error, match=message):
        make()
