"""Pooling against maxima and means of each window by itself, and against central differences."""

from __future__ import annotations

import json
import tracemalloc
from itertools import product

import numpy as np
import pytest

from asynctrain.arena import Array, Shape
from asynctrain.nn import (
    AvgPool2D,
    Flatten,
    GlobalAveragePool,
    GlobalMaxPool,
    Layer,
    MaxPool2D,
    Model,
    Scope,
    Workspace,
    layer_from_json,
)
from asynctrain.nn.kernels import pool
from asynctrain.testing import check_gradients

Margins = tuple[tuple[int, int], tuple[int, int]]

# size, stride, margins that the padding means, dilation; as arguments, and as they are meant
GEOMETRIES: list[tuple[dict[str, object], Shape]] = [
    ({"size": 2}, (4, 6, 3)),
    ({"size": 2}, (5, 7, 1)),  # leftovers at the edge
    ({"size": 1}, (3, 2, 2)),
    ({"size": 3}, (3, 3, 1)),  # a single window
    ({"size": (2, 3)}, (5, 6, 2)),
    ({"size": 3, "stride": 2}, (7, 5, 2)),  # windows overlap
    ({"size": (1, 3), "stride": (1, 1)}, (2, 5, 1)),
    ({"size": 2, "stride": 3}, (8, 6, 2)),  # pixels between windows
    ({"size": 2, "stride": 5}, (3, 3, 1)),  # stride beyond the image
    ({"size": 2, "padding": 1}, (4, 5, 2)),
    ({"size": 3, "stride": 2, "padding": 1}, (6, 5, 2)),
    ({"size": 3, "stride": 2, "padding": "same"}, (5, 4, 2)),
    ({"size": 2, "stride": 1, "padding": "same"}, (1, 1, 2)),
    ({"size": 5, "stride": 3, "padding": "same"}, (4, 7, 1)),
    ({"size": 3, "stride": 1, "padding": (2, 0)}, (3, 4, 1)),
    ({"size": 2, "stride": 2, "padding": ((0, 1), (1, 0))}, (5, 5, 2)),
    ({"size": 2, "dilation": 2}, (5, 6, 1)),
    ({"size": (2, 3), "stride": 1, "dilation": (3, 1), "padding": 1}, (4, 4, 2)),
]
POOLS: list[tuple[Layer, Shape]] = [
    *((MaxPool2D(**arguments), shape) for arguments, shape in GEOMETRIES),  # type: ignore[arg-type]
    *((AvgPool2D(**arguments), shape) for arguments, shape in GEOMETRIES),  # type: ignore[arg-type]
    *((AvgPool2D(**arguments, count_include_pad=False), shape) for arguments, shape in GEOMETRIES),  # type: ignore[arg-type]
]
CASES: list[tuple[Layer, Shape]] = [
    *POOLS,
    *((layer, shape) for layer in (GlobalAveragePool(), GlobalMaxPool()) for shape in [(1, 1, 1), (4, 3, 2)]),
]


def ids(cases: list[tuple[Layer, Shape]]) -> list[str]:
    return [f"{layer}-{shape}" for layer, shape in cases]


@pytest.mark.parametrize(("layer", "input_shape"), CASES, ids=ids(CASES))
def test_gradients_agree_with_central_differences(layer: Layer, input_shape: Shape) -> None:
    check_gradients(layer, input_shape, batch=2)


@pytest.mark.parametrize(("layer", "input_shape"), CASES, ids=ids(CASES))
def test_a_layer_comes_back_from_its_json(layer: Layer, input_shape: Shape) -> None:
    assert layer_from_json(json.loads(json.dumps(layer.to_json()))) == layer


def two(value: object) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def margins(layer: MaxPool2D | AvgPool2D, shape: Shape) -> Margins:
    if layer.padding == "valid":
        return (0, 0), (0, 0)
    if layer.padding == "same":  # ceil(length / stride) windows, the odd pixel at the end
        totals = []
        for axis in (0, 1):
            stride = two(layer.stride or layer.size)[axis]
            reach = (two(layer.size)[axis] - 1) * two(layer.dilation)[axis] + 1
            totals.append(max(0, (-(-shape[axis] // stride) - 1) * stride + reach - shape[axis]))
        high, wide = ((total // 2, (total + 1) // 2) for total in totals)
        return high, wide
    high, wide = (two(margin) for margin in two(layer.padding))
    return high, wide


def pooled(layer: MaxPool2D | AvgPool2D, x: Array) -> Array:
    """Window by window, the padding being NaN where it does not count, else 0."""
    counts = isinstance(layer, AvgPool2D) and layer.count_include_pad
    around = ((0, 0), *margins(layer, x.shape[1:]), (0, 0))
    padded = np.pad(x.astype(np.float64), around, constant_values=0 if counts else np.nan)
    size, stride, dilation = two(layer.size), two(layer.stride or layer.size), two(layer.dilation)
    starts = [range(0, padded.shape[1 + axis] - (size[axis] - 1) * dilation[axis], stride[axis]) for axis in (0, 1)]
    take = np.nanmax if isinstance(layer, MaxPool2D) else np.nanmean
    windows = [
        take(
            padded[:, h : h + size[0] * dilation[0] : dilation[0], w : w + size[1] * dilation[1] : dilation[1]], (1, 2)
        )
        for h, w in product(*starts)
    ]
    return np.stack(windows, axis=1).reshape(len(x), len(starts[0]), len(starts[1]), x.shape[3])


@pytest.mark.parametrize(("layer", "input_shape"), POOLS, ids=ids(POOLS))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pooling_agrees_with_each_window_by_itself(
    layer: MaxPool2D | AvgPool2D, input_shape: Shape, dtype: type
) -> None:
    x: Array = np.random.default_rng(0).standard_normal((3, *input_shape)).astype(dtype)
    y, _ = Model([layer], input_shape).forward({}, x, Scope(Workspace(), train=False))
    expected = pooled(layer, x)
    assert y.dtype == dtype
    assert y.shape == expected.shape == (3, *layer.output_shape(input_shape))
    tolerance = 4 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layer", [GlobalAveragePool(), GlobalMaxPool()], ids=str)
def test_global_pooling_makes_a_vector_of_an_image(layer: Layer) -> None:
    x = np.random.default_rng(0).standard_normal((3, 17, 9, 5)).astype(np.float32)
    y, _ = Model([layer], (17, 9, 5)).forward({}, x, Scope(Workspace(), train=False))
    expected = x.mean((1, 2), dtype=np.float64) if isinstance(layer, GlobalAveragePool) else x.max((1, 2))
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("arguments", [{"size": 2}, {"size": 3, "stride": 2, "padding": 1}], ids=str)
def test_ties_go_to_the_first_in_row_order_and_to_no_other(arguments: dict[str, int]) -> None:
    layer = MaxPool2D(**arguments)
    x = np.zeros((1, 2, 2, 1))
    x[0, :, :, 0] = [[0, 5], [5, 5]]
    scope = Scope(Workspace(), train=True)
    _, saved = layer.forward({}, x, scope)
    dx = layer.backward_input({}, saved, np.full((1, 1, 1, 1), 7.0), scope)
    np.testing.assert_array_equal(dx[0, :, :, 0], [[0, 7], [0, 0]])


def test_what_windows_receive_goes_back_whole_over_many_blocks() -> None:
    """The sum of dx is the sum of dy, in batches that are worked on in several parts, the last one smaller."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (37, 34, 34, 32)).astype(np.float64)  # ties everywhere
    for layer in (MaxPool2D(2), MaxPool2D(3, stride=2, padding=1), MaxPool2D(3)):
        scope = Scope(Workspace(), train=True)
        y, saved = layer.forward({}, x, scope)
        assert len(x) % pool.samples_at_once(y) != 0
        dy = rng.integers(-9, 9, y.shape).astype(np.float64)
        dx = layer.backward_input({}, saved, dy, scope)
        np.testing.assert_array_equal(dx.sum((1, 2)), dy.sum((1, 2)))
        assert np.count_nonzero(dx) <= np.count_nonzero(dy)


def test_images_of_negative_pixels_do_not_take_the_padding_for_their_maximum() -> None:
    y, _ = MaxPool2D(3, stride=1, padding=1).forward({}, np.full((1, 2, 2, 1), -3.0), Scope(Workspace(), train=False))
    np.testing.assert_array_equal(y, np.full((1, 2, 2, 1), -3.0))


@pytest.mark.parametrize("layer", [MaxPool2D(), MaxPool2D(3, stride=2), AvgPool2D(), GlobalAveragePool()], ids=str)
def test_a_steady_step_allocates_nothing_large(layer: Layer) -> None:
    x = np.random.default_rng(0).standard_normal((32, 32, 32, 32)).astype(np.float32)
    scope = Scope(Workspace(), train=True)
    dy = np.ones((32, *layer.output_shape(x.shape[1:])), np.float32)
    for attempt in range(2):
        tracemalloc.start()
        _, saved = layer.forward({}, x, scope)
        layer.backward_input({}, saved, dy, scope)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert attempt == 0 or peak < 2**20


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: MaxPool2D(0), ValueError, "max_pool2d: size must be at least 1, got 0"),
        (lambda: AvgPool2D((2, 0)), ValueError, "avg_pool2d: size must be at least 1, got 0"),
        (lambda: AvgPool2D(stride=0), ValueError, "avg_pool2d: stride must be at least 1, got 0"),
        (lambda: MaxPool2D(dilation=0), ValueError, "max_pool2d: dilation must be at least 1, got 0"),
        (lambda: MaxPool2D(padding=-1), ValueError, "max_pool2d: padding must be at least 0, got -1"),
        (
            lambda: layer_from_json({"layer": "avg_pool2d", "padding": "full"}),
            ValueError,
            "avg_pool2d: padding must be 'same', 'valid', an integer, two, or two pairs, got 'full'",
        ),
        (
            lambda: layer_from_json({"layer": "avg_pool2d", "count_include_pad": 1}),
            TypeError,
            "avg_pool2d: count_include_pad must be true or false, got 1",
        ),
        (
            lambda: Model([MaxPool2D(3, dilation=2)], (4, 9, 1)),
            ValueError,
            "max_pool2d with size 3x3 and dilation 2x2, which reaches 5x5, needs .* padding included, got 4x9",
        ),
        (
            lambda: Model([MaxPool2D(2, padding=2)], (4, 4, 1)),
            ValueError,
            "max_pool2d: padding must leave a pixel of the image in each window, got 2 for an image of 4x4",
        ),
        (
            lambda: Model([Flatten(), GlobalAveragePool()], (4, 4, 1)),
            ValueError,
            r"global_average_pool needs an input of shape \(height, width, channels\), got \(16,\)",
        ),
        (lambda: GlobalMaxPool().output_shape((3,)), ValueError, "global_max_pool needs an input of shape"),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(make: object, error: type[Exception], message: str) -> None:
    assert callable(make)
    with pytest.raises(error, match=message):
        make()
