"""Layers made of layers: what they compute, how they nest, and what a pass may rely on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from asynctrain.arena import Arena, Array, Shape, digest
from asynctrain.nn import (
    BatchNorm,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    Layer,
    MaxPool2D,
    Model,
    Parallel,
    ReLU,
    Residual,
    Scope,
    Sequential,
    Workspace,
    layer_from_json,
)
from asynctrain.nn.layers import Parameter
from asynctrain.testing import check_gradients
from asynctrain.types import Params

IDENTITY = Sequential([])

CASES: list[tuple[Layer, Shape]] = [
    (Residual([Dense(4), ReLU()]), (4,)),
    (Residual([Dense(3), ReLU(), Dense(3)], projection=Dense(3)), (5,)),
    (Residual([Conv2D(2), BatchNorm(), ReLU(), Conv2D(3)], [Conv2D(3, 1), BatchNorm()]), (3, 4, 2)),
    (Residual([Conv2D(3, stride=2, padding=1)], Conv2D(3, 1, stride=2, padding=0)), (5, 3, 2)),
    (Residual([]), (1,)),
    (Residual([Flatten()], Flatten()), (2, 1, 2)),  # both branches give views of x
    (Parallel([Dense(3), IDENTITY, Sequential([ReLU(), Dense(1)])]), (4,)),
    (Parallel([Conv2D(1, 1), Conv2D(2, 3), Sequential([MaxPool2D(3, stride=1), Conv2D(2, 1, padding=1)])]), (4, 3, 2)),
    (Parallel([IDENTITY, IDENTITY]), (1,)),
    (Parallel([Dense(2)]), (3,)),
    (Parallel([Dense(4), IDENTITY, ReLU()], join="add"), (4,)),
    (Parallel([Dropout(0.5), Dropout(0.5)], join="add"), (6,)),
    (Parallel([ReLU()], join="add"), (3,)),
    (
        Sequential(
            [
                Residual([Parallel([Dense(2), Sequential([Residual([Dense(3)])])]), ReLU()], projection=Dense(5)),
                Parallel([Residual([Dense(5)]), IDENTITY]),
            ]
        ),
        (3,),
    ),
]
IDS = [f"{layer}-{shape}" for layer, shape in CASES]
each_case = pytest.mark.parametrize(("layer", "input_shape"), CASES, ids=IDS)


@each_case
@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_agree_with_central_differences(layer: Layer, input_shape: Shape, batch: int) -> None:
    check_gradients(layer, input_shape, batch=batch)


@each_case
def test_a_container_comes_back_from_its_json(layer: Layer, input_shape: Shape) -> None:
    assert layer_from_json(json.loads(json.dumps(layer.to_json()))) == layer


def passed(
    model: Model, emit: Callable[[Callable[[], None]], None] = lambda job: job(), dtype: type = np.float32
) -> tuple[Arena, Array, Scope]:
    """Return the weight gradients of one pass of training, its outputs and its scope."""
    params, gradients, statistics = model.init(0, dtype), model.layout(dtype).empty(), model.statistics_layout.empty()
    scope = Scope(
        Workspace(), train=True, rng=np.random.default_rng, emit=emit, gradients=gradients, statistics=statistics
    )
    x: Array = np.random.default_rng(1).standard_normal((3, *model.input_shape)).astype(dtype)
    x.flags.writeable = False
    y, saved = model.forward(params.read_only(), x, scope)
    dy: Array = np.random.default_rng(2).standard_normal(y.shape).astype(dtype)
    dy.flags.writeable = False
    kept = y.copy()
    model.root.backward(params.read_only(), saved, dy, scope)
    np.testing.assert_array_equal(y, kept)  # outputs are read by jobs: nobody may write over them
    return gradients, y, scope


@each_case
def test_outputs_have_the_shape_that_was_told_and_the_dtype_of_the_input(layer: Layer, input_shape: Shape) -> None:
    for dtype in (np.float32, np.float64):
        _, y, _ = passed(Model([layer], input_shape), dtype=dtype)
        assert y.shape == (3, *layer.output_shape(input_shape))
        assert y.dtype == dtype
        assert y.flags.c_contiguous


@each_case
@pytest.mark.parametrize("order", [1, -1], ids=["in order", "in reverse"])
def test_jobs_run_after_the_chain_in_any_order_give_the_bits_of_jobs_run_at_once(
    layer: Layer, input_shape: Shape, order: int
) -> None:
    model = Model([layer, *([] if len(layer.output_shape(input_shape)) == 1 else [Flatten()]), Dense(2)], input_shape)
    jobs: list[Callable[[], None]] = []
    later, _, _ = passed(model, jobs.append)
    for job in jobs[::order]:
        job()
    at_once, _, _ = passed(model)
    assert digest(later) == digest(at_once)


@dataclass(frozen=True)
class _Shift(Layer):
    """y = x + b, of somebody's own: dx is dy itself, which the job of db reads, perhaps later."""

    def output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def parameters(self, input_shape: Shape) -> dict[str, Parameter]:
        return {"bias": Parameter(input_shape, "zeros")}

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, None]:
        return x + params["bias"], None

    def backward_input(self, params: Params, saved: None, dy: Array, scope: Scope) -> Array:
        return dy

    def backward_params(self, params: Params, saved: None, dy: Array, scope: Scope) -> None:
        scope.gradient("bias")[...] = dy.sum(axis=0)


WRITING: list[Sequence[Layer]] = [
    [Dense(4), ReLU(), _Shift(), Dense(4)],
    [Dense(4), ReLU(), Sequential([_Shift()]), Dense(4)],
    [Dense(4), ReLU(), Residual([_Shift()]), Dense(4)],
    [Dense(4), Residual([_Shift(), ReLU(), _Shift()]), Dense(4)],
    [Dense(4), Parallel([_Shift(), BatchNorm()], join="add"), ReLU()],
    [Dense(4), Parallel([IDENTITY, Sequential([Dense(4)]), ReLU()], join="add"), ReLU(), Dense(4)],
    [Dense(4), BatchNorm(), Dropout(0), ReLU(), Residual([BatchNorm(), ReLU()]), ReLU(), Dense(4)],
    [Dense(4), Flatten(), ReLU(), Sequential([]), ReLU(), Flatten(), _Shift(), Dense(4)],
]


@pytest.mark.parametrize("layers", WRITING, ids=str)
def test_what_is_written_over_is_needed_by_nobody_else(layers: Sequence[Layer]) -> None:
    """Not by another branch, nor by a job to come: the same with every layer in buffers of its own."""
    model, jobs = Model(layers, (3,)), list[Callable[[], None]]()
    later, _, _ = passed(model, jobs.append, np.float64)
    for job in jobs:
        job()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scope, "over", lambda scope, name, array: scope.empty(name, array.shape, array.dtype))
        apart, _, _ = passed(model, dtype=np.float64)
    assert digest(later) == digest(apart)


def test_arrays_are_written_over_where_nobody_else_needs_them() -> None:
    written: list[str] = []
    over = Scope.over

    def recorded(scope: Scope, name: str, array: Array) -> Array:
        result = over(scope, name, array)
        if result is array:
            written.append(f"{scope.path} {name}")
        return result

    model = Model([Dense(4), Residual([Dense(4), BatchNorm(), ReLU(), Dense(4), BatchNorm()]), ReLU(), Dense(2)], (3,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scope, "over", recorded)
        passed(model)
    assert written == [
        "residual1/add y", "relu1 y", "relu1 dx", "residual1/main/batch_norm1 dx", "residual1 dx"
    ]  # fmt: skip


def test_a_residual_adds_what_its_layers_and_its_shortcut_give() -> None:
    x = np.array([[1.0, -2.0]])
    scope = Scope(Workspace(), train=False)
    params = {"main/dense1/weight": np.array([[1.0, 2.0], [3.0, 4.0]]), "main/dense1/bias": np.array([10.0, 20.0])}
    y, _ = Residual([Dense(2), ReLU()]).forward(params, x, scope)
    np.testing.assert_array_equal(y, [[1 + 5, -2 + 14]])
    params |= {"shortcut/dense1/weight": np.array([[1.0, 0.0], [0.0, 100.0]]), "shortcut/dense1/bias": np.zeros(2)}
    y, _ = Residual([Dense(2), ReLU()], projection=Dense(2)).forward(params, x, scope)
    np.testing.assert_array_equal(y, [[1 + 5, -200 + 14]])


def test_a_parallel_puts_its_branches_side_by_side_or_adds_them() -> None:
    x = np.array([[[[1.0, -2.0]]]])
    scope = Scope(Workspace(), train=False)
    branches = [ReLU(), IDENTITY, ReLU()]
    y, _ = Parallel(branches).forward({}, x, scope)
    np.testing.assert_array_equal(y, [[[[1, 0, 1, -2, 1, 0]]]])
    y, _ = Parallel(branches, join="add").forward({}, x, scope)
    np.testing.assert_array_equal(y, [[[[3, -2]]]])


def test_children_are_named_by_their_place_and_the_join_is_a_leaf() -> None:
    block = Residual([Conv2D(3), Parallel([Conv2D(1, 1), Conv2D(2, 1)])], projection=Conv2D(3, 1))
    model = Model([Conv2D(2), block, ReLU()], (4, 4, 1))
    assert model.leaves == (
        "conv1",
        "residual1/main/conv1",
        "residual1/main/parallel1/conv1",
        "residual1/main/parallel1/conv2",
        "residual1/main/parallel1/concat",
        "residual1/shortcut/conv1",
        "residual1/add",
        "relu1",
    )
    assert [path for path in model.layers_with_parameters if "residual1" in path] == [
        "residual1/main/conv1",
        "residual1/main/parallel1/conv1",
        "residual1/main/parallel1/conv2",
        "residual1/shortcut/conv1",
    ]
    assert model.parameters["residual1/main/conv1/weight"].shape == (3, 3, 2, 3)


def test_running_statistics_are_kept_and_folded_in_every_branch() -> None:
    model = Model([Residual([Dense(3), BatchNorm()], projection=[Dense(3), BatchNorm()])], (2,))
    assert list(model.state) == [
        f"residual1/{branch}/batch_norm1/{name}" for branch in ("main", "shortcut") for name in ("mean", "variance")
    ]
    state, statistics = model.init_state(), model.statistics_layout.empty()
    scope = Scope(Workspace(), train=True, statistics=statistics)
    model.forward(model.init(0), np.random.default_rng(0).standard_normal((8, 2)).astype(np.float32), scope)
    before = state.copy()
    model.fold(state, statistics, 8, out=state)
    assert all(np.all(state[name] != before[name]) for name in state)


def test_no_input_gradient_is_computed_in_any_branch_where_none_is_wanted() -> None:
    checks: list[None] = []
    model = Model([Parallel([ReLU(), Dense(2), Sequential([ReLU(), Dropout(0.0)])])], (3,))
    params, gradients = model.init(0), model.layout().empty()
    scope = Scope(Workspace(), train=True, check=lambda: checks.append(None), gradients=gradients)
    y, saved = model.forward(params, np.ones((1, 3), np.float32), scope)
    checks.clear()
    model.backward(params, saved, np.ones_like(y), scope)
    assert len(checks) == 2  # the join, and Dense's weight gradient
    assert np.all(gradients["parallel1/dense1/weight"] == 1)


def test_a_pass_is_stopped_before_any_branch_and_before_the_join() -> None:
    layer, x = Parallel([ReLU(), ReLU()]), np.ones((1, 2))

    def stopped_at(allowed: int) -> int:
        seen: list[None] = []

        def check() -> None:
            if len(seen) == allowed:
                raise InterruptedError
            seen.append(None)

        workspace = Workspace()
        with pytest.raises(InterruptedError):
            layer.forward({}, x, Scope(workspace, train=False, check=check))
        return workspace.nbytes // x.nbytes

    assert [stopped_at(allowed) for allowed in range(3)] == [0, 1, 2]  # buffers that were written by then


def test_a_steady_pass_takes_no_new_buffers() -> None:
    model = Model(
        [Residual([Conv2D(4)], Conv2D(4, 1)), Parallel([Conv2D(2), IDENTITY]), Flatten(), Dense(2)], (5, 5, 3)
    )
    params, gradients, workspace = model.init(0), model.layout().empty(), Workspace()
    sizes, buffers = [], []
    for _ in range(3):
        scope = Scope(workspace, train=True, gradients=gradients)
        y, saved = model.forward(params, np.ones((2, 5, 5, 3), np.float32), scope)
        model.backward(params, saved, np.ones_like(y), scope)
        sizes.append(workspace.nbytes)
        buffers.append(y.ctypes.data)
    assert len(set(sizes)) == 1
    assert len(set(buffers)) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Model([Residual([Conv2D(8, stride=2)])], (8, 8, 4)),
            ValueError,
            "residual1: residual: outputs that are added must have one shape, got 4x4x8 from main, 8x8x4 from shortcut",
        ),
        (
            lambda: Model([Parallel([Conv2D(8), Conv2D(8, stride=2)])], (8, 8, 4)),
            ValueError,
            "parallel1: parallel: outputs that are concatenated may differ in the last axis only, got 8x8x8 from "
            "conv1, 4x4x8 from conv2",
        ),
        (
            lambda: Model([Parallel([Flatten(), IDENTITY])], (2, 2, 1)),
            ValueError,
            "may differ in the last axis only, got 4 from flatten1, 2x2x1 from sequential1",
        ),
        (
            lambda: Model([Residual([Flatten(), MaxPool2D()])], (4, 4, 1)),
            ValueError,
            r"residual1: main: max_pool1: max_pool2d needs an input of shape \(height, width, channels\), got \(16,\)",
        ),
        (lambda: Parallel([]), ValueError, "parallel: branches must be at least one layer, got none"),
        (
            lambda: layer_from_json({"layer": "parallel", "branches": [{"layer": "relu"}], "join": "mean"}),
            ValueError,
            "parallel: join must be 'concat' or 'add', got 'mean'",
        ),
        (
            lambda: layer_from_json({"layer": "parallel", "branches": [[{"layer": "relu"}]]}),
            TypeError,
            r"parallel: branches must be layers, such as Dense\(10\), got \(ReLU\(\),\)",
        ),
        (
            lambda: layer_from_json({"layer": "residual", "layers": [], "projection": 3}),
            TypeError,
            "residual: projection must be a sequence of layers, got 3",
        ),
        (
            lambda: layer_from_json({"layer": "sequential", "layers": {"layer": "relu"}}),
            TypeError,
            r"sequential: layers must be a sequence of layers, got ReLU\(\)",
        ),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(
    make: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make()
