"""The ready-made models: they fit their images, and say when they do not."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from asynctrain import optim
from asynctrain.arena import Shape
from asynctrain.nn import MaxPool2D, Model, Scope, Workspace, models
from asynctrain.nn.losses import softmax_cross_entropy
from asynctrain.randomness import Purpose, generator

NAMES = ["linear", "mlp", "lenet", "small_cnn"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("image_shape", [(28, 28, 1), (32, 48, 3), (12, 13, 2)])
def test_a_model_gives_one_logit_per_class_for_images_of_its_shape(name: str, image_shape: Shape) -> None:
    model = models.get(name)(num_classes=7, image_shape=image_shape)
    y, _ = model.forward(model.init(0), np.zeros((2, *image_shape), np.float32), Scope(Workspace(), train=False))
    assert y.shape == (2, 7)
    assert Model.from_json(model.to_json()) == model


@pytest.mark.parametrize("name", NAMES)
def test_a_model_learns_a_few_random_images_by_heart(name: str) -> None:
    model = models.get(name)(num_classes=4, image_shape=(12, 12, 1))
    rng, optimizer, workspace = np.random.default_rng(0), optim.adam(3e-3), Workspace()
    images, labels = rng.standard_normal((16, 12, 12, 1)).astype(np.float32), np.arange(16) % 4
    params, gradients = model.init(0), model.layout().empty()
    state = optim.initial_state(optimizer, params)
    for step in range(100):
        scope = Scope(workspace, train=True, rng=partial(generator, 0, Purpose.DROPOUT, step), gradients=gradients)
        y, saved = model.forward(params, images, scope)
        model.backward(params, saved, softmax_cross_entropy(y, labels).gradient, scope)
        optim.update_into(optimizer, params, params, gradients, state, step, params, state)
    y, _ = model.forward(params, images, Scope(workspace, train=False))
    assert softmax_cross_entropy(y, labels).correct == 16


@pytest.mark.parametrize(("side", "pools"), [(2, 1), (8, 1), (16, 2), (28, 2), (32, 3), (64, 4), (224, 4)])
def test_small_cnn_has_pools_to_suit_the_image(side: int, pools: int) -> None:
    model = models.small_cnn(num_classes=2, image_shape=(side, side + 3, 1))
    assert sum(isinstance(layer, MaxPool2D) for layer in model.root.layers) == pools


def test_lenet_has_the_layers_of_the_paper() -> None:
    parameters = models.lenet(num_classes=10, image_shape=(28, 28, 1)).parameters
    assert [parameter.shape for name, parameter in parameters.items() if name.endswith("weight")] == [
        (5, 5, 1, 6),
        (5, 5, 6, 16),
        (400, 120),
        (120, 84),
        (84, 10),
    ]


def test_mlp_takes_the_units_of_its_hidden_layers() -> None:
    model = models.mlp(num_classes=3, image_shape=(4, 4, 1), hidden=(5,))
    assert [p.shape for p in model.parameters.values()] == [(16, 5), (5,), (5, 3), (3,)]


def test_images_that_are_too_small_are_told() -> None:
    with pytest.raises(ValueError, match=r"image_shape must be at least 2x2 pixels for small_cnn, got \(1, 9, 1\)"):
        models.small_cnn(num_classes=10, image_shape=(1, 9, 1))
    with pytest.raises(ValueError, match=r"image_shape must be at least 12x12 pixels for lenet, got \(8, 20, 1\)"):
        models.lenet(num_classes=10, image_shape=(8, 20, 1))


@pytest.mark.parametrize("name", NAMES)
def test_arguments_that_do_not_fit_are_told(name: str) -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        models.get(name)(num_classes=1, image_shape=(28, 28, 1))
    with pytest.raises(ValueError, match=r"image_shape must be \(height, width, channels\), got \(28, 28\)"):
        models.get(name)(num_classes=10, image_shape=(28, 28))


def test_an_unknown_model_is_told() -> None:
    with pytest.raises(ValueError, match="model must be one of linear, mlp, lenet, small_cnn, got 'vgg'"):
        models.get("vgg")
