"""The ready-made models: they fit their images, say when they do not, and learn."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import numpy as np
import pytest

from asynctrain import optim
from asynctrain.arena import Arena, Array, Shape
from asynctrain.nn import Conv2D, MaxPool2D, Model, Residual, Scope, Workspace, losses, models
from asynctrain.randomness import Purpose, generator

SMALL_IMAGES = [name for name in models.NAMES if name != "resnet18"]
LEAST = {"lenet": 12, "small_cnn": 2, "vgg_small": 8, "resnet8": 4, "resnet18": 64, "mobilenet": 8}

loss_of = losses.softmax_cross_entropy()


@pytest.mark.parametrize("name", SMALL_IMAGES)
@pytest.mark.parametrize("image_shape", [(28, 28, 1), (32, 48, 3), (12, 13, 2)])
def test_a_model_gives_one_logit_per_class_for_images_of_its_shape(name: str, image_shape: Shape) -> None:
    assert_gives_logits(models.get(name)(num_classes=7, image_shape=image_shape))


def test_resnet18_takes_images_from_64_pixels_on() -> None:
    assert_gives_logits(models.get("resnet18")(num_classes=7, image_shape=(64, 71, 1)))


@pytest.mark.parametrize(("name", "side"), LEAST.items())
def test_the_least_images_that_are_taken_can_be_trained_on(name: str, side: int) -> None:
    model = models.get(name)(num_classes=2, image_shape=(side, side, 1))
    gradients = Training(model, np.zeros((2, side, side, 1), np.float32), np.array([0, 1])).gradients(0)
    assert np.all(np.isfinite(gradients.vector))


def assert_gives_logits(model: Model) -> None:
    x = np.zeros((2, *model.input_shape), np.float32)
    scope = Scope(Workspace(), train=False, state=model.init_state())
    y, _ = model.forward(model.init(0), x, scope)
    assert y.shape == (2, 7)
    assert Model.from_json(json.loads(json.dumps(model.to_json()))) == model


class Training:
    """A model that is trained on the same few images again and again, without anything around it."""

    def __init__(self, model: Model, images: Array, labels: Array) -> None:
        self.model, self.images, self.labels = model, images, labels
        self.params, self.state = model.init(0), model.init_state()
        self._gradients, self._statistics = model.layout().empty(), model.statistics_layout.empty()
        self._optimizer = optim.adam(3e-3)
        self._optimizer_state = optim.initial_state(self._optimizer, self.params)
        self._workspace = Workspace()

    def gradients(self, step: int) -> Arena:
        rng = partial(generator, 0, Purpose.DROPOUT, step)
        scope = Scope(self._workspace, train=True, rng=rng, gradients=self._gradients, statistics=self._statistics)
        y, saved = self.model.forward(self.params, self.images, scope)
        self.model.backward(self.params, saved, loss_of(y, self.labels).gradient, scope)
        return self._gradients

    def step(self, step: int) -> None:
        gradients, state = self.gradients(step), self._optimizer_state
        optim.update_into(self._optimizer, self.params, self.params, gradients, state, step, self.params, state)
        self.model.fold(self.state, self._statistics, len(self.images), out=self.state)

    def correct(self) -> int:
        scope = Scope(self._workspace, train=False, state=self.state)
        y, _ = self.model.forward(self.params, self.images, scope)
        return loss_of(y, self.labels).correct


@pytest.mark.parametrize(
    ("name", "arguments", "steps"),
    [
        *((name, {}, 100) for name in ("linear", "mlp", "lenet", "small_cnn")),
        ("vgg_small", {}, 40),
        ("resnet8", {}, 40),
        ("mobilenet", {"width": 0.5}, 40),
    ],
)
def test_a_model_learns_a_few_random_images_by_heart(name: str, arguments: dict[str, Any], steps: int) -> None:
    """And recognises them in prediction, by its running statistics."""
    count = 32 if name in ("resnet8", "mobilenet") else 16
    images = np.random.default_rng(0).standard_normal((count, 12, 12, 1)).astype(np.float32)
    training = Training(
        models.get(name)(num_classes=4, image_shape=(12, 12, 1), **arguments), images, np.arange(count) % 4
    )
    for step in range(steps):
        training.step(step)
    assert training.correct() == count


@pytest.mark.parametrize(("side", "pools"), [(2, 1), (8, 1), (16, 2), (28, 2), (32, 3), (64, 4), (224, 4)])
def test_small_cnn_has_pools_to_suit_the_image(side: int, pools: int) -> None:
    model = models.small_cnn(num_classes=2, image_shape=(side, side + 3, 1))
    assert sum(isinstance(layer, MaxPool2D) for layer in model.root.layers) == pools


def weights(model: Model) -> list[Shape]:
    return [parameter.shape for name, parameter in model.parameters.items() if name.endswith("weight")]


def outputs(model: Model, kind: str) -> list[Shape]:
    return [row.output_shape for row in model.costs().rows if kind in row.path]


def test_lenet_has_the_layers_of_the_paper() -> None:
    assert weights(models.lenet(num_classes=10, image_shape=(28, 28, 1))) == [
        (5, 5, 1, 6),
        (5, 5, 6, 16),
        (400, 120),
        (120, 84),
        (84, 10),
    ]


def test_mlp_takes_the_units_of_its_hidden_layers() -> None:
    model = models.mlp(num_classes=3, image_shape=(4, 4, 1), hidden=(5,))
    assert [p.shape for p in model.parameters.values()] == [(16, 5), (5,), (5, 3), (3,)]


def test_vgg_small_has_six_convolutions_and_three_pools() -> None:
    model = models.vgg_small(num_classes=10, image_shape=(32, 32, 3))
    assert [shape[2:] for shape in weights(model)[:-1]] == [
        (3, 32),
        (32, 32),
        (32, 64),
        (64, 64),
        (64, 128),
        (128, 128),
    ]
    assert weights(model)[-1] == (128, 10)
    assert outputs(model, "max_pool") == [(16, 16, 32), (8, 8, 64), (4, 4, 128)]


@pytest.mark.parametrize(("depth", "parameters"), [(8, 78_042), (20, 272_474), (32, 466_906)])
def test_a_resnet_for_small_images_has_as_many_layers_as_its_depth_and_the_papers_stages(
    depth: int, parameters: int
) -> None:
    model = models.get(f"resnet{depth}")(num_classes=10, image_shape=(32, 32, 3))
    assert len([name for name in model.parameters if name.endswith("weight") and "shortcut" not in name]) == depth
    assert model.costs().parameters == parameters
    blocks = (depth - 2) // 6
    assert outputs(model, "/add") == [*[(32, 32, 16)] * blocks, *[(16, 16, 32)] * blocks, *[(8, 8, 64)] * blocks]
    projections = [name for name in model.parameters if name.endswith("weight") and "shortcut" in name]
    assert projections == [f"residual{blocks * stage + 1}/shortcut/conv1/weight" for stage in (1, 2)]


def test_resnet18_is_that_of_the_paper() -> None:
    """With 11,689,512 parameters and 1.81 billion multiply-adds in its weights, as in torchvision."""
    model = models.resnet(num_classes=1000, image_shape=(224, 224, 3), depth=18)
    costs = model.costs()
    assert costs.parameters == 11_689_512
    assert sum(row.flops for row in costs.rows if "conv" in row.path or "dense" in row.path) == 2 * 1_814_073_344
    assert outputs(model, "max_pool") == [(56, 56, 64)]
    assert outputs(model, "/add") == [
        *[(56, 56, 64)] * 2,
        *[(28, 28, 128)] * 2,
        *[(14, 14, 256)] * 2,
        *[(7, 7, 512)] * 2,
    ]


def test_resnet_is_found_by_name_and_depth() -> None:
    arguments = {"num_classes": 3, "image_shape": (64, 64, 3)}
    assert models.get("resnet")(**arguments) == models.get("resnet20")(**arguments)
    for depth in (8, 18, 20, 32):
        assert models.get("resnet")(depth=depth, **arguments) == models.get(f"resnet{depth}")(**arguments)


def test_mobilenet_separates_its_convolutions() -> None:
    model = models.mobilenet(num_classes=10, image_shape=(32, 32, 3))
    convolutions = [layer for layer in model.root.layers if isinstance(layer, Conv2D)]
    assert [layer.groups for layer in convolutions[1::2]] == [32, 64, 128, 128, 256, 256, 512]
    assert {layer.groups for layer in convolutions[::2]} == {1}
    assert weights(model)[1:4] == [(3, 3, 1, 32), (1, 1, 32, 64), (3, 3, 1, 64)]
    assert outputs(model, "conv15") == [(4, 4, 512)]


@pytest.mark.parametrize(("side", "first"), [(63, 63), (64, 32)])
def test_mobilenet_begins_large_images_with_a_stride(side: int, first: int) -> None:
    assert outputs(models.mobilenet(num_classes=2, image_shape=(side, 80, 1)), "relu1")[0][0] == first


@pytest.mark.parametrize(("width", "filters"), [(0.01, 8), (0.25, 128), (0.3, 152), (1.0, 512), (1.5, 768)])
def test_the_width_of_mobilenet_multiplies_its_filters(width: float, filters: int) -> None:
    assert weights(models.mobilenet(num_classes=2, image_shape=(8, 8, 1), width=width))[-1] == (filters, 2)


@pytest.mark.parametrize("name", ["vgg_small", "resnet8", "resnet18", "mobilenet"])
def test_a_convolution_before_a_batch_norm_has_no_bias(name: str) -> None:
    model = models.get(name)(num_classes=2, image_shape=(64, 64, 3))
    assert [name for name in model.parameters if "conv" in name and name.endswith("bias")] == []
    assert any(isinstance(layer, Residual) for layer in model.root.layers) == name.startswith("resnet")


@pytest.mark.parametrize(("name", "side"), LEAST.items())
def test_images_that_are_too_small_are_told(name: str, side: int) -> None:
    told = name.replace("resnet", "resnet with depth ")
    shape = (side - 1, side + 9, 1)
    message = f"image_shape must be at least {side}x{side} pixels for {told}, got {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        models.get(name)(num_classes=10, image_shape=shape)


@pytest.mark.parametrize("name", models.NAMES)
def test_arguments_that_do_not_fit_are_told(name: str) -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        models.get(name)(num_classes=1, image_shape=(64, 64, 1))
    with pytest.raises(ValueError, match=r"image_shape must be \(height, width, channels\), got \(64, 64\)"):
        models.get(name)(num_classes=10, image_shape=(64, 64))


def test_arguments_of_single_models_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="depth must be 8, 18, 20 or 32 for resnet, got 50"):
        models.get("resnet")(num_classes=10, image_shape=(64, 64, 3), depth=50)
    with pytest.raises(ValueError, match="width must be above 0 for mobilenet, got 0"):
        models.mobilenet(num_classes=10, image_shape=(64, 64, 3), width=0)


def test_an_unknown_model_is_told() -> None:
    with pytest.raises(ValueError, match=r"model must be one of linear, mlp, lenet, small_cnn, .*, got 'vgg'"):
        models.get("vgg")
