"""What models cost: parameters, operations and memory against figures worked out by hand, and as a table."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from asynctrain.arena import Shape
from asynctrain.nn import (
    BatchNorm,
    Conv2D,
    Dense,
    Flatten,
    Layer,
    MaxPool2D,
    Model,
    Parallel,
    ReLU,
    Residual,
    Scope,
    Sequential,
    Tanh,
    Workspace,
    models,
)


def flops(model: Model) -> Mapping[str, int]:
    return {row.path: row.flops for row in model.costs().rows}


def test_lenet_costs_what_is_worked_out_by_hand() -> None:
    model = models.lenet(num_classes=10, image_shape=(28, 28, 1))
    costs = model.costs()
    assert costs.parameters == 61_706
    assert costs.parameter_bytes == 4 * 61_706
    counted = flops(model)
    assert {path: counted[path] for path in ("conv1", "relu1", "conv2", "dense1", "dense2", "dense3")} == {
        "conv1": 2 * 5 * 5 * 1 * (28 * 28 * 6),
        "relu1": 28 * 28 * 6,
        "conv2": 2 * 5 * 5 * 6 * (10 * 10 * 16),
        "dense1": 2 * 400 * 120,
        "dense2": 2 * 120 * 84,
        "dense3": 2 * 84 * 10,
    }
    kept = {row.path: row.activations for row in costs.rows}
    assert kept["input"] == 28 * 28
    assert kept["conv1"] == 28 * 28 * 6 + 32 * 32  # y, and x with two pixels around it
    assert kept["conv2"] == 10 * 10 * 16  # nothing to pad
    assert kept["flatten1"] == 0  # a view
    assert kept["dense1"] == 120


def test_a_residual_block_costs_what_is_worked_out_by_hand() -> None:
    main = [Conv2D(8, stride=2, padding=1, use_bias=False), BatchNorm(), ReLU(), Conv2D(8, use_bias=False), BatchNorm()]
    block = Residual(main, projection=[Conv2D(8, 1, stride=2, use_bias=False), BatchNorm()])
    model = Model([block, ReLU()], (16, 16, 4))
    pixels = 8 * 8
    assert flops(model) == {
        "input": 0,
        "residual1/main/conv1": 2 * 9 * 4 * 8 * pixels,
        "residual1/main/batch_norm1": 2 * 8 * pixels,
        "residual1/main/relu1": 8 * pixels,
        "residual1/main/conv2": 2 * 9 * 8 * 8 * pixels,
        "residual1/main/batch_norm2": 2 * 8 * pixels,
        "residual1/shortcut/conv1": 2 * 4 * 8 * pixels,
        "residual1/shortcut/batch_norm1": 2 * 8 * pixels,
        "residual1/add": 8 * pixels,
        "relu1": 8 * pixels,
    }
    assert model.costs().parameters == 9 * 4 * 8 + 9 * 8 * 8 + 4 * 8 + 3 * 2 * 8


def test_a_depthwise_convolution_costs_its_share_of_a_full_one() -> None:
    full, depthwise = (Model([Conv2D(8, groups=groups)], (5, 6, 8)).costs() for groups in (1, 8))
    assert depthwise.flops * 8 == full.flops == 2 * 9 * 8 * 8 * 5 * 6
    assert depthwise.parameters == 9 * 8 + 8


def test_an_addition_is_counted_for_each_branch_but_the_first_and_a_copy_for_none() -> None:
    branches = [ReLU(), ReLU(), ReLU()]
    assert flops(Model([Parallel(branches, join="add")], (5,)))["parallel1/add"] == 2 * 5
    assert flops(Model([Parallel(branches)], (5,)))["parallel1/concat"] == 0


def test_totals_are_those_of_a_microbatch_and_a_dtype() -> None:
    model = models.lenet(num_classes=10, image_shape=(28, 28, 1))
    one, many = model.costs(), model.costs(microbatch=48, dtype="float64")
    assert many.flops == 48 * one.flops
    assert many.activation_bytes == 48 * 2 * one.activation_bytes
    assert many.parameters == one.parameters
    assert many.parameter_bytes == 2 * one.parameter_bytes
    assert many.rows == one.rows


SMALL: list[tuple[Layer, Shape]] = [
    (Sequential([Conv2D(6, 5), ReLU(), MaxPool2D(2, stride=1), Flatten(), Dense(40), Tanh()]), (28, 28, 1)),
    (Sequential([Conv2D(6, 1), ReLU(), Conv2D(4, stride=2, padding=3)]), (17, 20, 5)),
    (Residual([Conv2D(8), BatchNorm(), ReLU()], Conv2D(8, 1)), (30, 20, 3)),
    (Parallel([Sequential([]), Conv2D(2)]), (20, 20, 6)),
]


@pytest.mark.parametrize(("layer", "input_shape"), SMALL, ids=[str(layer) for layer, _ in SMALL])
def test_activations_are_at_most_the_memory_that_grows_with_the_samples_of_a_forward_pass(
    layer: Layer, input_shape: Shape
) -> None:
    model = Model([layer], input_shape)
    params, statistics = model.init(0), model.statistics_layout.empty()

    def held(samples: int) -> int:
        workspace = Workspace()
        scope = Scope(workspace, train=True, statistics=statistics)
        x = np.zeros((samples, *input_shape), np.float32)
        model.forward(params, x, scope)
        return workspace.nbytes + x.nbytes

    told = model.costs(microbatch=64).activation_bytes
    assert 0.4 * told <= held(128) - held(64) <= 1.25 * told  # tiles, of a size with a bound, may still grow


@pytest.mark.parametrize("name", ["lenet", "small_cnn", "vgg_small", "resnet8", "mobilenet"])
def test_a_whole_pass_of_a_small_model_holds_once_to_twice_the_activations(name: str) -> None:
    model = models.get(name)(num_classes=10, image_shape=(32, 32, 3))
    workspace = Workspace()
    gradients, statistics = model.layout().empty(), model.statistics_layout.empty()
    scope = Scope(workspace, train=True, rng=np.random.default_rng, gradients=gradients, statistics=statistics)
    x = scope.empty("images", (32, 32, 32, 3), np.dtype(np.float32))
    x.fill(0)
    y, saved = model.forward(model.init(0), x, scope)
    model.backward(model.init(0), saved, np.zeros_like(y), scope)
    assert 0.75 <= workspace.nbytes / model.costs(microbatch=32).activation_bytes <= 2.25


def test_a_model_too_large_for_any_machine_is_costed_without_allocating_anything() -> None:
    costs = Model([Flatten(), Dense(10**9), Dense(10**9)], (1000, 1000, 3)).costs(microbatch=256)
    assert costs.parameter_bytes > 10**18
    assert costs.flops > 10**20
    assert costs.activation_bytes == 4 * 256 * (3 * 10**6 + 2 * 10**9)


def test_the_summary_is_a_table_of_all_leaf_layers_with_totals() -> None:
    block = Residual([Dense(64), ReLU()])
    assert Model([Flatten(), block, Dense(1000), ReLU(), Dense(10)], (8, 8, 1)).summary(microbatch=16) == "\n".join(
        [
            "layer                  output  parameters      FLOPs  activation bytes",
            "input                  8x8x1                                       256",
            "flatten1               64",
            "residual1/main/dense1  64           4,160      8,192               256",
            "residual1/main/relu1   64                         64               256",
            "residual1/add          64                         64               256",
            "dense1                 1000        65,000    128,000             4,000",
            "relu1                  1000                    1,000             4,000",
            "dense2                 10          10,010     20,000                40",
            "total                              79,170    157,320             9,064",
            "16 samples                                 2,517,120           145,024",
        ]
    )


def test_a_microbatch_without_samples_is_told() -> None:
    with pytest.raises(ValueError, match="microbatch must be at least 1, got 0"):
        Model([Dense(2)], (2,)).costs(microbatch=0)
