"""Convolution in all its variants: gradients, the definition computed independently, arguments."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from asynctrain.arena import Array, Shape
from asynctrain.nn import Conv2D, Layer, Model, Scope, Workspace, layer_from_json
from asynctrain.nn.kernels import winograd
from asynctrain.nn.kernels.backend import NUMPY
from asynctrain.testing import check_gradients

VARIANTS: list[tuple[Conv2D, Shape]] = [
    (Conv2D(2, 3, dilation=2), (5, 6, 2)),
    (Conv2D(2, (2, 3), dilation=(3, 1), padding="valid"), (5, 4, 1)),
    (Conv2D(2, 3, dilation=2), (1, 2, 1)),  # the reach is larger than the image
    (Conv2D(2, 2, dilation=3, stride=2, padding=2), (4, 5, 2)),
    (Conv2D(2, 1, dilation=4), (2, 3, 2)),
    (Conv2D(4, 3, groups=2), (4, 3, 6)),
    (Conv2D(6, (1, 2), groups=3, stride=2, dilation=2), (5, 6, 3)),
    (Conv2D(3, 3, groups=3), (5, 4, 3)),  # depthwise
    (Conv2D(3, (3, 2), groups=3, stride=(2, 3), padding=1), (6, 5, 3)),
    (Conv2D(2, 3, groups=2, dilation=2, use_bias=False), (4, 5, 2)),
    (Conv2D(6, 3, groups=3, stride=2), (5, 4, 3)),  # depthwise, two filters for each channel
    (Conv2D(1, 3, groups=1), (1, 1, 1)),
    (Conv2D(3, 1), (3, 2, 4)),
    (Conv2D(3, 1, stride=2, use_bias=False), (5, 3, 4)),
    (Conv2D(2, 3, use_bias=False), (3, 4, 2)),
    (Conv2D(2, 3, padding=(0, 2)), (4, 3, 2)),
    (Conv2D(2, (2, 3), padding=((0, 3), (1, 0))), (3, 4, 2)),
    (Conv2D(2, 2, padding=((2, 0), (0, 5)), stride=3), (3, 2, 1)),
]
NAMES = [f"{layer}-{shape}" for layer, shape in VARIANTS]


def by_definition(layer: Conv2D, x: Array, weight: Array, bias: Array | float, margins: Array) -> Array:
    """Return the convolution in float64, one pixel of the window and one group after the other."""
    (s, t), (d, e) = np.broadcast_to(layer.stride, 2), np.broadcast_to(layer.dilation, 2)
    kh, kw, per_group, F = weight.shape
    N, H, W, _ = x.shape
    padded = np.pad(x.astype(np.float64), [(0, 0), *margins, (0, 0)])
    h = (H + margins[0].sum() - (kh - 1) * d - 1) // s + 1
    w = (W + margins[1].sum() - (kw - 1) * e - 1) // t + 1
    y = np.zeros((N, h, w, F)) + bias
    for i, j, f in product(range(kh), range(kw), range(F)):
        first = f // (F // layer.groups) * per_group
        seen = padded[:, i * d :, j * e :, first : first + per_group][:, ::s, ::t][:, :h, :w]
        y[..., f] += seen @ weight[i, j, :, f].astype(np.float64)
    return y


def margins_of(layer: Conv2D, shape: Shape) -> Array:
    """Return the padding ((top, bottom), (left, right)) as the documentation defines it."""
    if layer.padding == "valid":
        return np.zeros((2, 2), int)
    if layer.padding != "same":
        padding = np.asarray(layer.padding)
        return np.broadcast_to(padding[:, None] if padding.ndim == 1 else padding, (2, 2))
    rows = []
    for axis in (0, 1):
        k, s, d = (int(np.broadcast_to(value, 2)[axis]) for value in (layer.kernel_size, layer.stride, layer.dilation))
        total = max(0, (-(-shape[axis] // s) - 1) * s + (k - 1) * d + 1 - shape[axis])
        rows.append((total // 2, total - total // 2))
    return np.array(rows)


@pytest.mark.parametrize(("layer", "input_shape"), VARIANTS, ids=NAMES)
def test_gradients_agree_with_central_differences(layer: Conv2D, input_shape: Shape) -> None:
    check_gradients(layer, input_shape, batch=2)


@pytest.mark.parametrize(("layer", "input_shape"), VARIANTS, ids=NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_each_variant_agrees_with_its_definition(layer: Conv2D, input_shape: Shape, dtype: type) -> None:
    model = Model([layer], input_shape)
    params = model.init(0, dtype)
    rng = np.random.default_rng(1)
    if layer.use_bias:
        params["conv1/bias"][...] = rng.standard_normal(layer.filters)
    x: Array = rng.standard_normal((3, *input_shape)).astype(dtype)
    y, _ = model.forward(params, x, Scope(Workspace(), train=False))
    bias = params["conv1/bias"] if layer.use_bias else 0.0
    expected = by_definition(layer, x, params["conv1/weight"], bias, margins_of(layer, input_shape))
    assert y.dtype == dtype
    assert y.shape == (3, *model.output_shape) == expected.shape
    np.testing.assert_allclose(y, expected, rtol=0, atol=20 * np.finfo(dtype).eps * np.abs(expected).max())


@pytest.mark.parametrize(("layer", "input_shape"), VARIANTS, ids=NAMES)
def test_each_variant_comes_back_from_its_json(layer: Conv2D, input_shape: Shape) -> None:
    assert layer_from_json(json.loads(json.dumps(layer.to_json()))) == layer


def test_weights_have_the_channels_of_one_group_and_there_is_a_bias_only_where_it_is_wanted() -> None:
    parameters = Conv2D(8, (3, 5), groups=4).parameters((9, 9, 12))
    assert parameters["weight"].shape == (3, 5, 3, 8)
    assert parameters["bias"].shape == (8,)
    assert set(Conv2D(8, use_bias=False).parameters((9, 9, 12))) == {"weight"}


def transposes_by_definition(layer: Conv2D, x: Array, weight: Array, dy: Array, margins: Array) -> tuple[Array, Array]:
    """Return dx and dW in float64, one place of the window and one group after the other."""
    (s, t), (d, e) = np.broadcast_to(layer.stride, 2), np.broadcast_to(layer.dilation, 2)
    kh, kw, per_group, F = weight.shape
    _, h, w, _ = dy.shape
    padded = np.pad(x.astype(np.float64), [(0, 0), *margins, (0, 0)])
    dpadded, dweight, dy = np.zeros_like(padded), np.zeros(weight.shape), dy.astype(np.float64)
    for i, j, group in product(range(kh), range(kw), range(layer.groups)):
        channels = slice(group * per_group, (group + 1) * per_group)
        filters = slice(group * (F // layer.groups), (group + 1) * (F // layer.groups))
        place = np.s_[:, i * d : i * d + (h - 1) * s + 1 : s, j * e : j * e + (w - 1) * t + 1 : t, channels]
        dweight[i, j, :, filters] = np.tensordot(padded[place], dy[..., filters], axes=([0, 1, 2], [0, 1, 2]))
        dpadded[place] += dy[..., filters] @ weight[i, j, :, filters].T.astype(np.float64)
    (top, _), (left, _) = margins
    return dpadded[:, top : top + x.shape[1], left : left + x.shape[2]], dweight


def relative_error(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# Each takes another way through the kernels; the shapes are large enough for many tiles and blocks.
LARGE: list[tuple[str, Conv2D, tuple[int, ...]]] = [
    ("winograd", Conv2D(64, 3), (10, 16, 16, 64)),
    ("winograd", Conv2D(48, 3), (3, 37, 34, 40)),  # tiles at the edges have fewer pixels
    ("winograd", Conv2D(32, 3), (2, 61, 66, 40)),  # several blocks in an image
    ("winograd", Conv2D(128, 3, padding="valid"), (8, 10, 10, 96)),
    ("winograd", Conv2D(32, 3, padding=((0, 4), (3, 1))), (2, 16, 70, 64)),
    ("columns", Conv2D(32, 3), (8, 32, 32, 3)),
    ("columns", Conv2D(24, 5, stride=2), (4, 31, 33, 16)),
    ("columns", Conv2D(64, 1), (8, 16, 16, 48)),
    ("columns", Conv2D(64, 3, groups=4), (4, 20, 20, 32)),
    ("columns", Conv2D(64, 3, groups=32), (4, 20, 20, 32)),
    ("columns", Conv2D(16, 3, dilation=2), (4, 30, 30, 16)),
    ("depthwise", Conv2D(64, 3, groups=64), (8, 32, 32, 64)),
    ("depthwise", Conv2D(32, 3, groups=32, stride=2), (4, 33, 31, 32)),
    ("depthwise", Conv2D(32, (5, 3), groups=32, dilation=2), (4, 20, 31, 32)),
]


def passed(layer: Conv2D, x: Array, dy: Array, weight: Array, workspace: Workspace, *, later: bool) -> dict[str, Array]:
    """Return y, dx and the weight gradients; these are computed before the chain goes on, or ``later``."""
    model = Model([layer], x.shape[1:])
    params, gradients = model.init(0, x.dtype), model.layout(x.dtype).empty()
    params["conv1/weight"][...] = weight
    gradients.vector.fill(np.nan)
    jobs: list[Callable[[], None]] = []
    emit = jobs.append if later else lambda job: job()
    scope = Scope(workspace, train=True, gradients=gradients, emit=emit)
    y, saved = model.forward(params, x, scope)
    y = y.copy()
    dx = model.root.backward(params, saved, dy, scope)
    assert dx is not None
    for job in jobs:
        job()
    return {"y": y, "dx": dx.copy(), **gradients.copy()}


def drawn(layer: Conv2D, shape: tuple[int, ...], dtype: type) -> tuple[Array, Array, Array]:
    """Return x as after a ReLU, dy and W, as they are in training."""
    rng = np.random.default_rng(0)
    weight_shape = layer.parameters(shape[1:])["weight"].shape
    x = np.maximum(rng.standard_normal(shape), 0)
    dy = rng.standard_normal((shape[0], *layer.output_shape(shape[1:])))
    weight = rng.standard_normal(weight_shape) * np.sqrt(2 / np.prod(weight_shape[:-1]))
    return x.astype(dtype), dy.astype(dtype), weight.astype(dtype)


@pytest.mark.parametrize(("algorithm", "layer", "shape"), LARGE)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 5e-6), (np.float64, 1e-13)])
def test_all_three_parts_agree_with_the_definition_in_float64(
    algorithm: str, layer: Conv2D, shape: tuple[int, ...], dtype: type, tolerance: float
) -> None:
    x, dy, weight = drawn(layer, shape, dtype)
    assert type(layer._algorithm(dy.shape, shape[3], NUMPY)).__name__ == f"_{algorithm.title()}"
    found = passed(layer, x, dy, weight, Workspace(), later=False)
    margins = margins_of(layer, shape[1:])
    dx, dweight = transposes_by_definition(layer, x, weight, dy, margins)
    assert relative_error(found["y"], by_definition(layer, x, weight, 0.0, margins)) < tolerance
    assert relative_error(found["dx"], dx) < tolerance
    assert relative_error(found["conv1/weight"], dweight) < tolerance
    assert relative_error(found["conv1/bias"], dy.sum(axis=(0, 1, 2), dtype=np.float64)) < tolerance


@pytest.mark.parametrize(("algorithm", "layer", "shape"), LARGE)
def test_bits_depend_on_no_buffer_and_no_order_of_the_weight_gradients(
    algorithm: str, layer: Conv2D, shape: tuple[int, ...]
) -> None:
    x, dy, weight = drawn(layer, shape, np.float32)
    used = Workspace()
    more = passed(layer, np.concatenate([x, x]), np.concatenate([dy, dy]), weight, used, later=True)
    assert np.isfinite(more["y"]).all()
    fresh = passed(layer, x, dy, weight, Workspace(), later=False)
    again = passed(layer, x, dy, weight, used, later=True)
    for name, array in fresh.items():
        np.testing.assert_array_equal(array, again[name], err_msg=name)


@pytest.mark.parametrize(("algorithm", "layer", "shape"), LARGE)
def test_a_steady_pass_allocates_nothing_large(algorithm: str, layer: Conv2D, shape: tuple[int, ...]) -> None:
    x, dy, _ = drawn(layer, shape, np.float32)
    model = Model([layer], shape[1:])
    params, gradients = model.init(0, np.float32), model.layout(np.float32).empty()
    workspace = Workspace()

    def one_pass() -> None:
        scope = Scope(workspace, train=True, gradients=gradients)
        _, saved = model.forward(params, x, scope)
        model.root.backward(params, saved, dy, scope)

    one_pass()
    tracemalloc.start()
    try:
        one_pass()
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("layer", "input_shape"),
    [
        (Conv2D(2, 3), (5, 4, 3)),
        (Conv2D(1, 3), (1, 1, 1)),
        (Conv2D(3, 3, padding="valid", use_bias=False), (7, 6, 2)),
        (Conv2D(2, 3, padding="valid"), (3, 3, 1)),
        (Conv2D(1, 3, padding=((4, 0), (1, 3))), (2, 6, 2)),
        (Conv2D(2, 3, padding=5), (1, 2, 1)),  # tiles that see nothing but padding
        (Conv2D(1, 3), (9, 2, 1)),
    ],
)
def test_winograd_gradients_agree_with_central_differences(
    layer: Conv2D, input_shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "pays", lambda output, channels: True)
    check_gradients(layer, input_shape, batch=2)


@pytest.mark.parametrize("shape", [(10, 16, 16, 8), (3, 37, 34, 8), (2, 61, 66, 8)])
def test_winograd_gives_the_same_weight_gradient_from_tiles_that_were_kept_as_from_the_image(
    shape: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(5)
    x, dy = (rng.standard_normal((*shape[:3], channels), np.float32) for channels in (shape[3], 12))
    weight = rng.standard_normal((3, 3, shape[3], 12), np.float32)
    plan = winograd.blocks(dy.shape)
    spectrum, partial = (np.empty((36, shape[3], 12), np.float32) for _ in range(2))
    scratch, seen = np.empty(plan.scratch(12), np.float32), np.full(plan.seen(shape[0], shape[3]), np.nan, np.float32)
    winograd.correlate(x, weight, (1, 1), out=np.empty_like(dy), spectrum=spectrum, scratch=scratch, seen=seen)
    kept, again = [
        winograd.correlate_backward_params(
            image,
            dy,
            (1, 1),
            out=np.empty_like(weight),
            spectrum=spectrum,
            partial=partial,
            scratch=scratch,
            seen=tiles,
        )
        for image, tiles in ((np.full_like(x, np.nan), seen), (x, None))
    ]
    np.testing.assert_array_equal(kept, again)


def test_winograd_blocks_cover_each_row_of_tiles_once() -> None:
    for output in [(32, 32, 32, 8), (70, 7, 5, 8), (1, 1, 1, 1), (3, 400, 90, 2), (2, 6, 700, 2), (5, 64, 64, 2)]:
        plan = winograd.blocks(output)
        covered = np.zeros((output[0], plan.down), int)
        for images, rows in plan.cut(output[0]):
            covered[images, rows] += 1
            tiles = (images.stop - images.start) * (rows.stop - rows.start) * plan.across
            assert tiles <= plan.tiles <= max(winograd.TILES, plan.across)
        assert (covered == 1).all()


def test_winograd_is_taken_where_channels_are_many_and_tiles_are_well_filled() -> None:
    assert winograd.pays((32, 32, 32, 32), 32)
    assert winograd.pays((32, 32, 32, 16), 16)
    assert winograd.pays((32, 4, 4, 128), 128)
    assert winograd.pays((32, 14, 14, 32), 32)
    assert winograd.pays((1, 16, 16, 64), 64)
    assert not winograd.pays((32, 32, 32, 32), 3)
    assert not winograd.pays((32, 32, 32, 16), 8)
    assert not winograd.pays((32, 14, 14, 16), 16)
    assert not winograd.pays((32, 5, 5, 128), 128)
    assert not winograd.pays((1, 4, 4, 128), 128)  # transforming the filters costs more than it saves


def from_json(**arguments: object) -> Layer:
    return layer_from_json({"layer": "conv2d", "filters": 4, **arguments})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Conv2D(4, groups=3), ValueError, "conv2d: groups must divide the 4 filters, got 3"),
        (lambda: Conv2D(4, groups=0), ValueError, "conv2d: groups must be at least 1, got 0"),
        (lambda: Conv2D(4, dilation=(1, 0)), ValueError, "conv2d: dilation must be at least 1, got 0"),
        (lambda: from_json(dilation=1.5), TypeError, "conv2d: dilation must be an integer, got 1.5"),
        (lambda: from_json(use_bias=1), TypeError, "conv2d: use_bias must be true or false, got 1"),
        (lambda: from_json(padding=[1, 2, 3]), ValueError, r"conv2d: padding must be 'same', .*, got \(1, 2, 3\)"),
        (
            lambda: from_json(padding=[[1, 2], 3]),
            ValueError,
            r"conv2d: padding must be 'same', .*, got \(\(1, 2\), 3\)",
        ),
        (lambda: Conv2D(4, padding=(1, -2)), ValueError, "conv2d: padding must be at least 0, got -2"),
        (lambda: from_json(padding=0.5), TypeError, "conv2d: padding must be an integer, got 0.5"),
        (lambda: Conv2D(4, padding=True), TypeError, "conv2d: padding must be an integer, got True"),
        (
            lambda: Model([Conv2D(4, groups=2)], (5, 5, 3)),
            ValueError,
            "conv1: conv2d with groups 2 needs channels in a multiple of that, got 3",
        ),
        (
            lambda: Model([Conv2D(4, 3, dilation=2, padding="valid")], (4, 9, 3)),
            ValueError,
            "kernel_size 3x3 and dilation 2x2, which reaches 5x5, needs an input of at least .*, got 4x9",
        ),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(
    make: Callable[[], Layer | Model], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
