"""Model: names, shapes, JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from asynctrain.arena import digest
from asynctrain.nn import Conv2D, Dense, Dropout, Flatten, MaxPool2D, Model, ReLU, Scope, Sequential, Workspace, models
from asynctrain.nn.losses import softmax_cross_entropy

BLOCK = Sequential([Conv2D(4), ReLU()])
MODEL = Model([BLOCK, Conv2D(5, stride=2), MaxPool2D(), Flatten(), Dropout(0.5), Dense(3)], (8, 8, 1))


def test_children_are_named_by_kind_and_count_and_parameters_by_their_path() -> None:
    assert MODEL.leaves == (
        *("sequential1/conv1", "sequential1/relu1"),
        *("conv1", "max_pool1", "flatten1", "dropout1", "dense1"),
    )
    assert MODEL.layers_with_parameters == {
        "sequential1/conv1": ("sequential1/conv1/weight", "sequential1/conv1/bias"),
        "conv1": ("conv1/weight", "conv1/bias"),
        "dense1": ("dense1/weight", "dense1/bias"),
    }
    assert {name: array.shape for name, array in MODEL.init(0).items()} == {
        "sequential1/conv1/weight": (3, 3, 1, 4),
        "sequential1/conv1/bias": (4,),
        "conv1/weight": (3, 3, 4, 5),
        "conv1/bias": (5,),
        "dense1/weight": (20, 3),
        "dense1/bias": (3,),
    }


def test_a_model_comes_back_from_its_json_with_the_same_parameters() -> None:
    again = Model.from_json(json.loads(json.dumps(MODEL.to_json())))
    assert again == MODEL
    assert hash(again) == hash(MODEL)
    assert digest(again.init(1)) == digest(MODEL.init(1))
    assert again != Model(MODEL.root, (9, 9, 1))


@pytest.mark.parametrize("name", ["lenet", "vgg_small", "resnet8", "mobilenet"])
def test_repeated_passes_are_equal_to_the_bit(name: str) -> None:
    model = models.get(name)(num_classes=10, image_shape=(28, 28, 1))
    params, rng = model.init(0), np.random.default_rng(0)
    x = rng.standard_normal((9, 28, 28, 1)).astype(np.float32)

    def results(workspace: Workspace) -> tuple[str, str]:
        gradients, statistics = model.layout().empty(), model.statistics_layout.empty()
        scope = Scope(workspace, train=True, gradients=gradients, statistics=statistics)
        y, saved = model.forward(params, x, scope)
        model.backward(params, saved, softmax_cross_entropy()(y, np.arange(9)).gradient, scope)
        return digest(gradients), digest(statistics)

    used = Workspace()
    assert results(used) == results(used) == results(Workspace())


def test_the_repr_tells_shapes_layers_and_parameters() -> None:
    assert repr(Model([Flatten(), Dense(10)], (8, 8, 1))) == "<Model 8x8x1 -> 10, 2 layers, 650 parameters>"


def test_an_input_that_does_not_fit_is_told() -> None:
    with pytest.raises(ValueError, match=r"x must have shape \(N, 8, 8, 1\), got \(2, 8, 8, 3\)"):
        MODEL.forward(MODEL.init(0), np.zeros((2, 8, 8, 3), np.float32), Scope(Workspace(), train=False))


@pytest.mark.parametrize("shape", [(), (8, 0, 1), (8, 8.5, 1)])
def test_a_shape_that_is_none_is_told(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="input_shape must be positive integers"):
        Model([Flatten()], shape)


def test_json_that_is_no_model_is_told() -> None:
    with pytest.raises(ValueError, match="a model's JSON must have input_shape and layers, got layers"):
        Model.from_json({"layers": []})
