"""The kernels that numba compiles: against numpy's and float64, their bits, threads and cache."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import product
from math import prod
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="numba is not installed: it is an extra")

from numba import njit

from asynctrain import nn
from asynctrain.arena import Arena, Array
from asynctrain.executors import InlineExecutor, ThreadExecutor
from asynctrain.executors.fingerprint import numeric_fingerprint
from asynctrain.executors.worker import GradientWorker, StopFlag
from asynctrain.nn.kernels import choice, winograd
from asynctrain.nn.kernels import pool as reference_pool
from asynctrain.nn.kernels.backend import NUMPY, Kernels
from asynctrain.nn.kernels.compiled import NUMBA, activations, conv, depthwise, lanes, norm, pool, pooled
from asynctrain.nn.kernels.compiled import winograd as compiled_winograd
from asynctrain.nn.kernels.compiled.jit import compiled
from asynctrain.nn.kernels.pool import Span
from asynctrain.testing import check_gradients
from asynctrain.types import ForwardWork, GradientWork, Params, Program

pytestmark = pytest.mark.one_loop

MODULES: tuple[ModuleType, ...] = (activations, conv, depthwise, norm, pool, pooled, compiled_winograd)
TOLERANCE = 1e-5  # relative to the largest
SHAPES = [(7, 3), (4096, 16), (1000, 300), (30000, 1), (1, 5), (129, 64)]


def dispatchers() -> Iterator[Any]:
    for module in MODULES:
        yield from (value for value in vars(module).values() if hasattr(value, "py_func"))


def close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE * max(1e-30, float(np.abs(expected).max())))


def drawn(*shape: int) -> Array:
    """Return different float32 numbers, from -0.4 to 0.6."""
    count = prod(shape)
    x: Array = (np.random.default_rng(0).permutation(count) / count - 0.4).reshape(shape).astype(np.float32)
    return x


# Agreement


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("far", [0.0, 1000.0])
def test_moments_are_those_of_float64_also_far_from_zero(shape: tuple[int, int], far: float) -> None:
    x = (np.random.default_rng(0).standard_normal(shape) + far).astype(np.float32)
    mean, variance = NUMBA.norm_moments(x, scratch=x)
    np.testing.assert_allclose(mean, x.mean(axis=0, dtype=np.float64), rtol=TOLERANCE, atol=TOLERANCE)
    np.testing.assert_allclose(variance, x.astype(np.float64).var(axis=0), rtol=TOLERANCE, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_map_of_a_normalisation_its_sums_and_its_derivative_are_those_of_float64(
    shape: tuple[int, int], dtype: type
) -> None:
    rng = np.random.default_rng(1)
    x: Array = rng.standard_normal(shape).astype(dtype)
    dy: Array = rng.standard_normal(shape).astype(dtype)
    a, b, c = rng.standard_normal((3, shape[1]))
    X, DY = x.astype(np.float64), dy.astype(np.float64)
    close(NUMBA.norm_affine(x, a, b, out=np.empty_like(x)), X * a + b)
    plain, products = NUMBA.norm_sums(x, dy)
    np.testing.assert_allclose(plain, DY.sum(axis=0), rtol=0, atol=TOLERANCE * np.abs(DY).sum(axis=0).max())
    np.testing.assert_allclose(
        products, (X * DY).sum(axis=0), rtol=0, atol=TOLERANCE * np.abs(X * DY).sum(axis=0).max()
    )
    close(NUMBA.norm_combination(x, dy, a, b, c, out=np.empty_like(x), scratch=x), a * X + b * DY + c)
    y = NUMBA.norm_affine_relu(x, a, b, out=np.empty_like(x))
    close(y, np.maximum(X * a + b, 0))
    g, positive = np.where(y > 0, dy, 0), np.empty(x.size, np.bool_)
    expected = NUMBA.norm_sums(x, g)
    for found, sums in zip(NUMBA.norm_relu_sums(x, y, dy, out=dy, positive=positive), expected, strict=True):
        np.testing.assert_array_equal(found, sums)
    np.testing.assert_array_equal(dy, g)


@pytest.mark.parametrize("size", [1, 33, 5000])
def test_the_rectifier_has_the_bits_of_numpys_and_keeps_a_nan(size: int) -> None:
    x, dy = drawn(size), drawn(size)[::-1].copy()
    x[0] = np.nan
    y, dx, positive = np.empty_like(x), np.empty_like(x), np.empty(size, np.bool_)
    np.testing.assert_array_equal(NUMBA.relu(x, out=y), NUMPY.relu(x, out=np.empty_like(x)))
    expected = NUMPY.relu_backward(y, dy, out=np.empty_like(x), positive=positive)
    np.testing.assert_array_equal(NUMBA.relu_backward(y, dy, out=dx, positive=positive), expected)


SPANS = [
    (Span(2, 2, 1, 0, 0, 8), Span(2, 2, 1, 0, 0, 6)),  # tiles
    (Span(2, 2, 1, 0, 0, 7), Span(3, 3, 1, 0, 0, 9)),  # a row is left out
    (Span(3, 2, 1, 1, 1, 7), Span(3, 1, 1, 1, 1, 5)),  # padded, and overlapping
    (Span(2, 1, 3, 2, 1, 6), Span(2, 3, 2, 1, 2, 9)),  # dilated
    (Span(1, 2, 1, 0, 0, 5), Span(1, 1, 1, 0, 0, 4)),
]


@pytest.mark.parametrize("window", SPANS)
@pytest.mark.parametrize("ties", [False, True])
def test_max_pooling_and_its_derivative_are_numpys_also_where_there_are_ties(
    window: tuple[Span, Span], ties: bool
) -> None:
    x = drawn(3, window[0].length, window[1].length, 5)
    if ties:
        x = np.round(4 * x)
    N, _, _, C = x.shape
    y = np.empty((N, window[0].windows, window[1].windows, C), np.float32)
    expected = NUMPY.max_pool(x, window, out=np.empty_like(y))
    np.testing.assert_array_equal(NUMBA.max_pool(x, window, out=y), expected)
    dy = drawn(*y.shape)
    samples = reference_pool.samples_at_once(y), *y.shape[1:]
    rest, hit = np.empty((2, *samples), np.float32), np.empty(samples, np.bool_)
    dx, dx_of_numpy = (
        kernels.max_pool_backward(x, y, dy, window, out=np.full_like(x, np.nan), rest=rest, hit=hit)
        for kernels in (NUMBA, NUMPY)
    )
    close(dx, dx_of_numpy)


def by_blocks(a: Array, b: Array, c: Array, rows: int, columns: int, depth: int, more: bool) -> None:
    """Multiply a transposed (depth, rows) by b (depth, columns) into the middle of c."""
    lanes.multiply(
        (a, 0, 1, rows), (b, 0, columns, 1), (c, 2 * c.shape[1] + 3, c.shape[1], 1), rows, columns, depth, more
    )


multiplied: Any = njit(by_blocks)  # not kept on disk, where it would outlive a change in lanes


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 23])
@pytest.mark.parametrize("columns", [16, 32, 48, 64])
def test_a_product_is_that_of_float64_and_nothing_beside_it_is_written(rows: int, columns: int, dtype: type) -> None:
    rng = np.random.default_rng(0)
    for depth, more in product((0, 1, 5), (False, True)):
        a: Array = rng.standard_normal((depth, rows)).astype(dtype)
        b: Array = rng.standard_normal((depth, columns)).astype(dtype)
        c: Array = rng.standard_normal((rows + 4, columns + 8)).astype(dtype)
        expected = c.astype(np.float64)
        place = expected[2 : rows + 2, 3 : columns + 3]
        place[...] = a.T.astype(np.float64) @ b.astype(np.float64) + (place if more else 0)
        multiplied(a, b, c, rows, columns, depth, more)
        close(c, expected)


def winograd_parts(kernels: Kernels, x: Array, dy: Array, weight: Array, bias: Array, keep: bool) -> list[Array]:
    """Return y, dx and dweight of a convolution with padding 1."""
    C, F = weight.shape[2:]
    plan = winograd.blocks(dy.shape)
    scratch = np.empty(plan.scratch(max(C, F)), x.dtype)
    seen = np.empty(plan.seen(len(x), C), x.dtype) if keep else None
    spectrum, partial = np.empty((2, 36, C, F), x.dtype)
    y, dx, dweight = np.empty_like(dy), np.empty_like(x), np.empty_like(weight)
    kernels.winograd_correlate(x, weight, (1, 1), out=y, spectrum=spectrum, scratch=scratch, bias=bias, seen=seen)
    kernels.winograd_correlate_backward_params(
        x, dy, (1, 1), out=dweight, spectrum=spectrum, partial=partial, scratch=scratch, seen=seen
    )
    flipped, spectrum = np.empty((3, 3, F, C), x.dtype), np.empty((36, F, C), x.dtype)
    kernels.winograd_correlate_backward_input(
        weight, dy, (1, 1), out=dx, flipped=flipped, spectrum=spectrum, scratch=scratch
    )
    return [y, dx, dweight]


def by_definition(x: Array, dy: Array, weight: Array, bias: Array) -> list[Array]:
    """Return the same in float64, place by place of the window."""
    H, W = x.shape[1:3]
    padded = np.pad(x.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    y, dx, dweight = np.zeros(dy.shape) + bias, np.zeros(padded.shape), np.zeros(weight.shape)
    for i, j in product(range(3), range(3)):
        pixels = padded[:, i : i + H, j : j + W]
        y += pixels @ weight[i, j].astype(np.float64)
        dx[:, i : i + H, j : j + W] += dy @ weight[i, j].T.astype(np.float64)
        dweight[i, j] = np.einsum("nhwc,nhwf->cf", pixels, dy.astype(np.float64))
    return [y, dx[:, 1:-1, 1:-1], dweight]


@pytest.mark.parametrize(("images", "height", "width"), [(2, 7, 9), (5, 8, 8), (3, 33, 3), (1, 1, 1)])
@pytest.mark.parametrize(("channels", "filters"), [(16, 48), (32, 16), (5, 16)])  # the last are left to numpy
@pytest.mark.parametrize("keep", [False, True])
def test_winograd_agrees_with_the_definition_in_float64(
    images: int, height: int, width: int, channels: int, filters: int, keep: bool
) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, height, width, channels)).astype(np.float32)
    dy = rng.standard_normal((images, height, width, filters)).astype(np.float32)
    weight = rng.standard_normal((3, 3, channels, filters)).astype(np.float32) / np.sqrt(9 * channels, dtype=np.float32)
    bias = rng.standard_normal(filters).astype(np.float32)
    found = winograd_parts(NUMBA, x, dy, weight, bias, keep)
    for part, expected in zip(found, by_definition(x, dy, weight, bias), strict=True):
        close(part, expected)


class Counted:
    """A kernel, and how often it was called."""

    def __init__(self, kernel: Callable[..., Any]) -> None:
        self.kernel, self.calls = kernel, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.kernel(*arguments)


CONVOLUTIONS = [
    (nn.Conv2D(16, 3), (7, 9, 3), {"_correlate", "_correlate_backward_params"}),
    (nn.Conv2D(48, (3, 2), stride=2, padding=1), (9, 8, 16), {"_correlate", "_scatter", "_correlate_backward_params"}),
    (nn.Conv2D(32, 1, stride=2), (7, 8, 16), {"_correlate", "_scatter", "_correlate_backward_params"}),
    (nn.Conv2D(16, 5, padding="valid"), (9, 12, 16), {"_correlate", "_correlate_backward_params"}),
    (nn.Conv2D(5, 3), (6, 6, 16), {"_correlate"}),  # its transpose; the rest is left to numpy
    (nn.Conv2D(16, 3, dilation=2), (7, 7, 16), set()),
    (nn.Conv2D(32, 3, groups=2), (7, 7, 16), set()),
    (nn.Conv2D(32, 3, groups=32, stride=(2, 1)), (7, 6, 32), {"_correlate", "_correlate_backward_params"}),
    (nn.Conv2D(16, 3, groups=16, dilation=2), (7, 6, 16), {"_correlate", "_correlate_backward_params"}),
    (nn.Conv2D(5, 3, groups=5), (7, 6, 5), set()),
]


def count_calls(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, Counted]:
    """Count the calls of the module's own kernels from Python."""
    module.warm_up(np.dtype(np.float32))  # before what kernels call is no kernel any more
    counted = {
        name: Counted(value)
        for name, value in vars(module).items()
        if name.startswith("_") and hasattr(value, "py_func")
    }
    for name, kernel in counted.items():
        monkeypatch.setattr(module, name, kernel)
    return counted


def passed(model: nn.Model, params: Arena, samples: int, kernels: Kernels, dtype: type) -> list[Array]:
    """Return y, dx and all weight gradients."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((samples, *model.input_shape)).astype(np.float32)
    dy = rng.standard_normal((samples, *model.output_shape)).astype(np.float32)
    typed: Params = {name: array.astype(dtype) for name, array in params.items()}
    gradients = model.layout(dtype).empty()
    scope = nn.Scope(nn.Workspace(), train=True, gradients=gradients, kernels=kernels)
    y, saved = model.forward(typed, x.astype(dtype), scope)
    y = y.copy()
    dx = model.root.backward(typed, saved, dy.astype(dtype), scope)
    assert dx is not None
    return [y, dx, *gradients.values()]


@pytest.mark.parametrize(("layer", "shape", "used"), CONVOLUTIONS, ids=str)
def test_convolutions_without_tiles_are_those_of_numpy_in_float64(
    layer: nn.Conv2D, shape: tuple[int, ...], used: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = count_calls(depthwise if layer.groups == layer.filters else conv, monkeypatch)
    model = nn.Model([layer], shape)
    params = model.init(0)
    params["conv1/bias"][...] = np.random.default_rng(1).standard_normal(layer.filters)
    for found, expected in zip(
        passed(model, params, 3, NUMBA, np.float32), passed(model, params, 3, NUMPY, np.float64), strict=True
    ):
        close(found, expected)
    assert {name for name, kernel in counted.items() if kernel.calls} == used


@pytest.mark.parametrize(("samples", "calls"), [(16, 2), (48, 2), (5, 0)])  # the last are left to numpy
@pytest.mark.parametrize("rectify", [False, True])
def test_pooled_convolutions_are_those_of_numpy_in_float64(
    samples: int, calls: int, rectify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = count_calls(pooled, monkeypatch)
    relu = [nn.ReLU()] if rectify else []
    first, second = nn.Conv2D(6, (5, 4)), nn.Conv2D(5, 5, padding="valid", use_bias=False)
    model = nn.Model([first, *relu, nn.MaxPool2D(2), second, *relu, nn.MaxPool2D((2, 1))], (15, 13, 1))
    params = model.init(0)
    params["conv1/bias"][...] = np.random.default_rng(1).standard_normal(6)
    found, expected = (passed(model, params, samples, *by) for by in ((NUMBA, np.float32), (NUMPY, np.float64)))
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)
    assert {name: kernel.calls for name, kernel in counted.items() if kernel.calls} == dict.fromkeys(
        ("_correlate", "_spread_maxima", "_correlate_backward_input") if calls else (), calls
    )


def test_of_equal_outputs_under_a_window_the_first_takes_the_gradient_as_with_numpy() -> None:
    model = nn.Model([nn.Conv2D(3, 2, padding="valid"), nn.MaxPool2D(2)], (7, 7, 1))
    params = model.init(0)
    params["conv1/weight"][...] = 0  # all outputs are
    found, expected = (passed(model, params, 16, kernels, np.float32) for kernels in (NUMBA, NUMPY))
    assert np.abs(expected[2]).max() > 1  # a tie handed to another pixel would show here
    for ours, theirs in zip(found, expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("place", range(4))
def test_a_nan_under_a_pooling_window_is_its_maximum(place: int) -> None:
    model = nn.Model([nn.Conv2D(1, 1, use_bias=False), nn.ReLU(), nn.MaxPool2D(2)], (2, 2, 1))
    x = np.arange(4 * 16, dtype=np.float32).reshape(16, 2, 2, 1)
    x[3, place // 2, place % 2] = np.nan
    params = model.init(0)
    params["conv1/weight"][...] = 1
    y, _ = model.forward(params, x, nn.Scope(nn.Workspace(), train=True, kernels=NUMBA))
    assert np.flatnonzero(np.isnan(y)).tolist() == [3]


LAYERS = [
    (nn.Conv2D(16, 3, stride=2), (5, 4, 16)),
    (nn.Conv2D(16, 3, groups=16), (4, 3, 16)),
    (nn.BatchNorm(), (3, 2, 4)),
    (nn.ReLU(), (3, 5)),
    (nn.MaxPool2D(2), (4, 6, 3)),
    (nn.MaxPool2D(3, stride=2, padding="same"), (5, 4, 2)),
    (nn.Sequential([nn.Conv2D(16, 3), nn.BatchNorm(), nn.ReLU(), nn.MaxPool2D(2)]), (4, 4, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_gradients_agree_with_central_differences(layer: nn.Layer, shape: tuple[int, ...]) -> None:
    check_gradients(layer, shape, kernels="numba")


# Bits


def program(name: str = "resnet8", kernels: str = "numba", dtype: str = "float32") -> Program:
    model = nn.models.get(name)(num_classes=10, image_shape=(20, 20, 3))
    return Program(model.to_json(), dtype=dtype, kernels=kernels)


def work() -> GradientWork:
    rng = np.random.default_rng(0)
    return GradientWork(0, 0, 1, rng.integers(0, 256, (9, 20, 20, 3), np.uint8), rng.integers(0, 10, 9))


def gradients(of: Program) -> Array:
    params = nn.Model.from_json(of.architecture).init(0, of.dtype)
    return GradientWorker(of).gradients(params, work(), StopFlag()).gradients.vector.copy()


def predictions(of: Program) -> Array:
    """Return a model's outputs for parameters that refuse to be written, as those of a snapshot do."""
    model = nn.Model.from_json(of.architecture)
    params, state = model.init(0, of.dtype).read_only(), model.init_state().read_only()
    return GradientWorker(of).forward(params, state, ForwardWork(work().images), StopFlag()).outputs


@pytest.mark.parametrize("name", ["resnet8", "vgg_small"])
def test_the_same_work_gives_the_same_bits_each_time(name: str) -> None:
    first = gradients(program(name))
    assert all(gradients(program(name)).tobytes() == first.tobytes() for _ in range(3))


@pytest.mark.parametrize("name", ["resnet8", "vgg_small"])
def test_a_model_has_numpys_gradients_to_rounding_and_other_bits(name: str) -> None:
    numpy, numba = (gradients(program(name, kernels, "float64")) for kernels in ("numpy", "numba"))
    np.testing.assert_allclose(numba, numpy, rtol=0, atol=1e-9 * np.abs(numpy).max())
    assert numba.tobytes() != numpy.tobytes()


async def test_threads_give_the_bits_of_the_inline_executor() -> None:
    params = nn.Model.from_json(program().architecture).init(0)
    found = set()
    for executor in (InlineExecutor(), ThreadExecutor(2, split="microbatches"), ThreadExecutor(2, split="layers")):
        async with executor, executor.open(program()) as session:
            await session.broadcast(params, {}, 0)
            found.add((await session.compute(work(), 0)).gradients.vector.tobytes())
    assert len(found) == 1


# Choice


def test_kernels_are_chosen_by_the_program_and_travel_with_it() -> None:
    assert Program.from_json(program().to_json()).kernels == "numba"
    assert program().digest != program(kernels="numpy").digest
    assert choice.get("numba") is NUMBA
    assert choice.get("numpy") is NUMPY
    with pytest.raises(ValueError, match=r"kernels must be one of numpy, numba, got 'cuda'"):
        choice.get("cuda")


def test_the_compiler_is_part_of_the_fingerprint_only_where_it_is_used() -> None:
    assert {"numba", "llvmlite", "target"} == numeric_fingerprint("numba").keys() - numeric_fingerprint().keys()


def run(code: str, **environment: str) -> str:
    """Return what a process of its own prints."""
    import os

    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=100, text=True, stdout=-1, env=os.environ | environment
    )
    return done.stdout


WITHOUT = """
import sys
{before}
from asynctrain.nn.kernels import choice
import asynctrain as at
from asynctrain.executors.worker import GradientWorker
model = at.models.linear(num_classes=2, image_shape=(2, 2, 1))
GradientWorker(at.Program(model.to_json())).warm_up()
assert not sys.modules.get("numba") and not sys.modules.get("llvmlite")
{after}
"""
REFUSED = """
try:
    choice.get("numba")
except ImportError as error:
    print(error)
"""


def test_numba_is_not_imported_for_a_program_that_does_not_want_it_nor_needed() -> None:
    told = run(WITHOUT.format(before="sys.modules['numba'] = None", after=REFUSED))
    assert told == "kernels 'numba' need numba: install asynctrain[numba], or choose 'numpy'\n"
    run(WITHOUT.format(before="", after=""))


# Compiling


def spin(go: Array, turns: Array, limit: int) -> bool:
    """Count in ``turns`` until ``go`` is set; tell whether it was."""
    while turns[0] < limit:
        turns[0] += 1
        if go[0] != 0:
            return True
    return False


def test_a_kernel_lets_other_threads_run() -> None:
    """This thread sees the kernel turn, and only then lets it go: if that held the interpreter, it could not."""
    kernel: Callable[[Array, Array, int], bool] = compiled(spin)
    kernel(np.zeros(1), np.zeros(1), 1)  # compiled
    go, turns, seen = np.zeros(1), np.zeros(1), []
    thread = threading.Thread(target=lambda: seen.append(kernel(go, turns, 3_000_000_000)))
    thread.start()
    while turns[0] == 0:
        pass
    go[0] = 1
    thread.join()
    assert seen == [True]


def test_every_kernel_lets_go_of_the_interpreter() -> None:
    kernels = [kernel for kernel in dispatchers() if kernel.targetoptions.get("inline") != "always"]
    assert len(kernels) >= 12
    assert all(kernel.targetoptions["nogil"] for kernel in kernels)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_after_warming_up_nothing_is_left_to_compile(dtype: str) -> None:
    NUMBA.warm_up(dtype)
    compiled_before = {kernel: len(kernel.signatures) for kernel in dispatchers()}
    for name in ("resnet8", "vgg_small", "lenet", "mobilenet"):
        gradients(program(name, dtype=dtype))
        predictions(program(name, dtype=dtype))
    assert {kernel: len(kernel.signatures) for kernel in dispatchers()} == compiled_before


async def test_opening_a_session_compiles_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    monkeypatch.setattr(GradientWorker, "warm_up", lambda self: threads.append(threading.current_thread()))
    async with InlineExecutor() as executor, executor.open(program()):
        assert threads
        assert threads != [threading.current_thread()]


def test_a_second_process_finds_what_the_first_has_compiled(tmp_path: Any) -> None:
    code = (
        "from asynctrain.nn.kernels.compiled import activations\n"
        "import numpy as np\n"
        "activations.warm_up(np.dtype('float32'))\n"
        "print(sum(activations._relu.stats.cache_hits.values()), sum(activations._relu.stats.cache_misses.values()))\n"
    )
    assert [run(code, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2)] == ["0 1\n", "1 0\n"]


def test_where_no_cache_can_be_written_kernels_are_compiled_all_the_same() -> None:
    namespace: dict[str, Any] = {}
    exec(compile("def double(x):\n    return 2 * x", "no/such/folder/module.py", "exec"), namespace)  # noqa: S102
    assert compiled(namespace["double"])(4) == 8
