"""Non-linearities: values, slopes, extremes; and the layers that only reshape."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from asynctrain.arena import Array, Shape
from asynctrain.nn import (
    ELU,
    GELU,
    Dense,
    Flatten,
    Layer,
    LeakyReLU,
    LogSoftmax,
    Model,
    ReLU,
    Reshape,
    Scope,
    Sequential,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
    Workspace,
    layer_from_json,
)
from asynctrain.nn.kernels import activations
from asynctrain.testing import check_gradients


def phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def tanh_gelu(x: float) -> float:
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Each with its definition in plain Python
ELEMENTWISE: list[tuple[Layer, Callable[[float], float]]] = [
    (ReLU(), lambda x: max(x, 0.0)),
    (LeakyReLU(), lambda x: x if x > 0 else 0.01 * x),
    (LeakyReLU(0.3), lambda x: x if x > 0 else 0.3 * x),
    (ELU(), lambda x: x if x > 0 else math.expm1(x)),
    (ELU(2.5), lambda x: x if x > 0 else 2.5 * math.expm1(x)),
    (GELU(), lambda x: x * phi(x)),
    (GELU("tanh"), tanh_gelu),
    (SiLU(), lambda x: x / (1 + math.exp(-x))),
    (Sigmoid(), lambda x: 1 / (1 + math.exp(-x))),
    (Tanh(), math.tanh),
]
LAYERS = [*(layer for layer, _ in ELEMENTWISE), LeakyReLU(0.0), LeakyReLU(1), Softmax(), LogSoftmax()]
RESHAPING: list[tuple[Layer, Shape]] = [
    (Reshape((3, 2)), (6,)),
    (Reshape((4,)), (2, 1, 2)),
    (Sequential([Flatten(), Dense(6), Reshape([1, 2, 3])]), (2, 2, 1)),
]


def predicting() -> Scope:
    return Scope(Workspace(), train=False)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 1, 4)])
def test_gradients_agree_with_central_differences(layer: Layer, shape: Shape) -> None:
    check_gradients(layer, shape, batch=3)


@pytest.mark.parametrize(("layer", "shape"), RESHAPING, ids=str)
def test_reshaping_moves_gradients_back_to_where_they_belong(layer: Layer, shape: Shape) -> None:
    check_gradients(layer, shape)
    assert layer_from_json(json.loads(json.dumps(layer.to_json()))) == layer


def test_reshape_copies_nothing() -> None:
    x = np.arange(12.0).reshape(2, 6)
    y, _ = Reshape((2, 3)).forward({}, x, predicting())
    assert np.shares_memory(x, y)
    np.testing.assert_array_equal(y[1], [[6, 7, 8], [9, 10, 11]])


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_layer_comes_back_from_its_json(layer: Layer) -> None:
    assert layer_from_json(json.loads(json.dumps(layer.to_json()))) == layer


@pytest.mark.parametrize(("layer", "definition"), ELEMENTWISE, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_agree_with_the_definition(layer: Layer, definition: Callable[[float], float], dtype: type) -> None:
    x: Array = np.linspace(-9, 9, 10_001).astype(dtype)
    y, _ = layer.forward({}, x.reshape(1, -1), predicting())
    expected = np.array([definition(float(value)) for value in x])
    assert y.dtype == dtype
    eps = float(np.finfo(dtype).eps)
    np.testing.assert_allclose(y[0], expected, rtol=8 * eps, atol=4 * eps)


def test_the_tail_of_the_normal_distribution_keeps_its_digits() -> None:
    for dtype, lowest in ((np.float32, -12), (np.float64, -37)):
        x: Array = np.linspace(lowest, 9, 20_001).astype(dtype)
        found = activations.normal_cdf(x, out=np.empty_like(x), scratch=np.empty((3, x.size), dtype))
        relative = np.abs(found / np.array([phi(float(value)) for value in x]) - 1)
        assert (relative <= (4 + np.square(x)) * 1.5 * np.finfo(dtype).eps).all()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_large_arrays_have_the_values_and_gradients_of_their_parts(layer: Layer) -> None:
    """What is computed block by block has no seams: several samples are what each of them is by itself."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((3, 30_000)).astype(np.float32) for _ in range(2))
    assert x.size > activations.BLOCK

    def both(part: slice) -> tuple[Array, Array]:
        scope = predicting()
        y, saved = layer.forward({}, x[part], scope)
        return y, layer.backward_input({}, saved, dy[part], scope)

    whole = both(slice(None))
    for n in range(3):
        for all_of_it, alone in zip(whole, both(slice(n, n + 1)), strict=True):
            np.testing.assert_allclose(all_of_it[n : n + 1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_extreme_inputs_neither_overflow_nor_give_nan(layer: Layer, dtype: type) -> None:
    x: Array = np.array([[-1e30, -1e4, -100, -0.0, 0.0, 100, 1e4, 1e30]], dtype)
    scope = Scope(Workspace(), train=True)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y, saved = layer.forward({}, x, scope)
        dx = layer.backward_input({}, saved, np.ones_like(y), scope)
    assert np.isfinite(y).all()
    assert np.isfinite(dx).all()
    if isinstance(layer, (ReLU, LeakyReLU, ELU, GELU, SiLU)):
        np.testing.assert_array_equal(y[0, -3:], x[0, -3:])
        np.testing.assert_array_equal(dx[0, -3:], [1, 1, 1])


def test_softmax_is_over_the_last_axis_and_its_logarithm_keeps_small_probabilities() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 5)) * 300
    y, _ = Softmax().forward({}, x, predicting())
    np.testing.assert_allclose(y.sum(axis=-1), 1, rtol=1e-12)
    logarithm, _ = LogSoftmax().forward({}, x, predicting())
    largest = x.max(axis=-1, keepdims=True)
    expected = x - largest - np.log(np.exp(x - largest).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(logarithm, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(np.exp(logarithm), y, rtol=1e-9, atol=1e-300)
    assert (logarithm < -700).any()


def test_at_zero_of_either_sign_the_slopes_are_those_of_the_left_where_there_is_a_kink() -> None:
    x, dy = np.array([[-0.0, 0.0]]), np.ones((1, 2))
    smooth = [(GELU(), 0.5), (GELU("tanh"), 0.5), (SiLU(), 0.5), (Sigmoid(), 0.25), (Tanh(), 1.0)]
    for layer, slope in [(ReLU(), 0.0), (LeakyReLU(0.3), 0.3), (ELU(2.5), 2.5), *smooth]:
        scope = predicting()
        _, saved = layer.forward({}, x, scope)
        np.testing.assert_allclose(layer.backward_input({}, saved, dy, scope), [[slope, slope]], rtol=1e-15)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_a_steady_step_allocates_nothing_large_and_leaves_its_inputs_alone(layer: Layer) -> None:
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((4, 32, 32, 100)).astype(np.float32) for _ in range(2))
    before: tuple[Array, Array] = (x.copy(), dy.copy())
    scope = Scope(Workspace(), train=True)
    for attempt in range(2):
        tracemalloc.start()
        _, saved = layer.forward({}, x, scope)
        layer.backward_input({}, saved, dy, scope)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert attempt == 0 or peak < 2**20
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(dy, before[1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LeakyReLU(-0.1), ValueError, "leaky_relu: slope must be at least 0 and at most 1, got -0.1"),
        (lambda: ELU(0), ValueError, "elu: alpha must be above 0, got 0"),
        (
            lambda: layer_from_json({"layer": "gelu", "approximate": "erf"}),
            ValueError,
            "gelu: approximate must be 'none' or 'tanh', got 'erf'",
        ),
        (lambda: Reshape((2, 0)), ValueError, "reshape: shape must be at least 1, got 0"),
        (lambda: layer_from_json({"layer": "reshape", "shape": 6}), TypeError, "must be a sequence of integers, got 6"),
        (
            lambda: Model([Reshape((2, 4))], (6,)),
            ValueError,
            "reshape1: reshape: shape must have the 6 elements of the input 6, got 2x4",
        ),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(make: object, error: type[Exception], message: str) -> None:
    assert callable(make)
    with pytest.raises(error, match=message):
        make()
