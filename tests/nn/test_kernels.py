"""Kernels against direct sums in float64, at sizes that need many tiles."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from asynctrain.arena import Array
from asynctrain.nn import Conv2D, MaxPool2D, Model, Scope, Workspace, softmax
from asynctrain.nn.kernels import activations, conv


def direct_convolution(x: Array, weight: Array, bias: Array, stride: tuple[int, int]) -> Array:
    """Return the valid convolution by its definition, in float64."""
    windows = sliding_window_view(x.astype(np.float64), weight.shape[:2], axis=(1, 2))
    windows = windows[:, :: stride[0], :: stride[1]]  # (N, h, w, C, kh, kw)
    y: Array = np.einsum("nhwcij,ijcf->nhwf", windows, weight.astype(np.float64)) + bias
    return y


@pytest.mark.parametrize(
    ("batch", "height", "width", "channels", "filters", "window", "stride"),
    [
        (9, 33, 29, 3, 7, (3, 3), (1, 1)),  # several images in a tile, a smaller tile at the end
        (2, 64, 60, 16, 8, (3, 3), (1, 1)),  # several tiles in an image
        (5, 40, 31, 1, 5, (5, 5), (1, 1)),  # columns stored across
        (3, 61, 47, 9, 4, (3, 2), (2, 3)),
        (2, 30, 30, 2, 3, (5, 5), (7, 8)),
        (1, 6, 3000, 40, 2, (5, 5), (1, 1)),  # one row of the output is more than a tile should hold
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tiled_convolution_agrees_with_the_direct_sum(
    batch: int,
    height: int,
    width: int,
    channels: int,
    filters: int,
    window: tuple[int, int],
    stride: tuple[int, int],
    dtype: type,
) -> None:
    layer = Conv2D(filters, window, stride=stride, padding="valid")
    model = Model([layer], (height, width, channels))
    rng = np.random.default_rng(0)
    params = model.init(0, dtype)
    params["conv1/bias"][...] = rng.standard_normal(filters)
    x: Array = rng.standard_normal((batch, height, width, channels)).astype(dtype)
    y, _ = model.forward(params, x, Scope(Workspace(), train=False))
    expected = direct_convolution(x, params["conv1/weight"], params["conv1/bias"], stride)
    np.testing.assert_allclose(y, expected, rtol=0, atol=np.abs(expected).max() * 20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("channels", [1, 24])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_three_parts_of_a_tiled_convolution_are_transposes_of_one_another(channels: int, stride: int) -> None:
    """For a bilinear y(x, W): <dy, y(x, W)> = <dx, x> = <dW, W>, which many tiles must not change."""
    layer = Conv2D(8, 3, stride=stride)
    model = Model([layer], (40, 45, channels))
    rng = np.random.default_rng(0)
    params, arena = model.init(0, "float64"), model.layout("float64").empty()
    scope = Scope(Workspace(), train=True, gradients=arena)
    x = rng.standard_normal((6, 40, 45, channels))
    y, saved = model.forward(params, x, scope)
    dy = rng.standard_normal(y.shape)
    dx = model.root.backward(params, saved, dy, scope)
    assert dx is not None
    product = np.vdot(dy, y)
    assert np.vdot(dx, x) == pytest.approx(product, rel=1e-10)
    assert np.vdot(arena["conv1/weight"], params["conv1/weight"]) == pytest.approx(product, rel=1e-10)
    np.testing.assert_allclose(arena["conv1/bias"], dy.sum(axis=(0, 1, 2)), rtol=1e-10)


def test_tiles_cover_each_output_once_and_keep_their_columns_small() -> None:
    for output in [(32, 28, 28, 6), (1, 1, 1, 1), (7, 100, 90, 32), (3, 5, 4000, 8)]:
        for window, channels in [((3, 3), 1), ((5, 5), 6), ((1, 1), 3), ((3, 3), 64)]:
            plan = conv.tiling(output, conv.Geometry(window), channels, 4)
            covered = np.zeros(output[:2], int)
            for tile in plan.cut(output):
                covered[tile] += 1
            assert (covered == 1).all()
            one_row = output[2] * plan.depth
            assert plan.scratch * 4 <= max(conv.TILE_BYTES, one_row * 4)


def test_placing_pads_dilates_and_crops() -> None:
    x = np.arange(1.0, 5.0).reshape(1, 4, 1, 1)

    def placed(room: int, corner: int, stride: int) -> list[float]:
        out = np.full((1, room, 1, 1), np.nan)
        values: list[float] = conv.place(x, (corner, 0), (stride, 1), out=out).ravel().tolist()
        return values

    assert placed(7, 2, 1) == [0, 0, 1, 2, 3, 4, 0]
    assert placed(8, 1, 2) == [0, 1, 0, 2, 0, 3, 0, 4]
    assert placed(4, -3, 2) == [0, 3, 0, 4]
    assert placed(3, -2, 1) == [3, 4, 0]
    assert placed(2, 5, 1) == [0, 0]
    assert placed(2, -9, 1) == [0, 0]
    assert placed(9, -9, 1) == [0] * 9


def test_max_pooling_agrees_with_the_maximum_of_each_window() -> None:
    x = np.random.default_rng(0).standard_normal((3, 17, 14, 5)).astype(np.float32)
    y, _ = MaxPool2D(3, stride=2).forward({}, x, Scope(Workspace(), train=False))
    expected = sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max(axis=(-1, -2))
    np.testing.assert_array_equal(y, expected)


def test_relu_passes_no_gradient_at_zero_of_either_sign() -> None:
    x = np.array([-1.0, -0.0, 0.0, 2.0])
    y = activations.relu(x, out=np.empty(4))
    dx = activations.relu_backward(y, np.full(4, 3.0), out=np.empty(4), positive=np.empty(4, bool))
    np.testing.assert_array_equal(y, [0, 0, 0, 2])
    np.testing.assert_array_equal(dx, [0, 0, 0, 3])


def test_softmax_stays_finite_for_large_logits_and_sums_to_one() -> None:
    probabilities = softmax(np.array([[1e4, 0.0, -1e4], [2.0, 2.0, 2.0]], np.float32))
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, [[1.0, 0.0, 0.0], [1 / 3] * 3], rtol=1e-6)
