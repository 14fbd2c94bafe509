"""Ready-made classifiers of images. Each returns logits; ``get`` finds them by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from asynctrain.arena import Shape
from asynctrain.nn.layers import Conv2D, Dense, Dropout, Flatten, Layer, MaxPool2D, ReLU
from asynctrain.nn.model import Model


class ModelFactory(Protocol):
    """What every function here can be called as."""

    def __call__(self, *, num_classes: int, image_shape: Shape) -> Model:
        """Return a model for images (H, W, C) of ``num_classes`` classes."""
        ...


def linear(*, num_classes: int, image_shape: Shape) -> Model:
    """Return logistic regression on the pixels: the yardstick that everything else must beat."""
    _check(num_classes, image_shape)
    return Model([Flatten(), _head(num_classes)], image_shape)


def mlp(*, num_classes: int, image_shape: Shape, hidden: Sequence[int] = (512, 256)) -> Model:
    """Return a multilayer perceptron with ReLUs between layers of ``hidden`` units."""
    _check(num_classes, image_shape)
    layers: list[Layer] = [Flatten()]
    for units in hidden:
        layers += [Dense(units), ReLU()]
    return Model([*layers, _head(num_classes)], image_shape)


def lenet(*, num_classes: int, image_shape: Shape) -> Model:
    """Return LeNet-5 (LeCun et al. 1998, doi:10.1109/5.726791), ReLUs and max pooling, for 12x12 pixels and more."""
    _check(num_classes, image_shape)
    if min(image_shape[:2]) < 12:
        raise ValueError(f"image_shape must be at least 12x12 pixels for lenet, got {image_shape}")
    layers = [
        *(Conv2D(6, 5), ReLU(), MaxPool2D(2)),
        *(Conv2D(16, 5, padding="valid"), ReLU(), MaxPool2D(2)),
        *(Flatten(), Dense(120), ReLU(), Dense(84), ReLU(), _head(num_classes)),
    ]
    return Model(layers, image_shape)


def small_cnn(*, num_classes: int, image_shape: Shape, dropout: float = 0.5) -> Model:
    """Return blocks of two 3x3 convolutions and a pool, then one hidden layer with ``dropout`` on both its sides.

    There are as many blocks as the smaller side can be halved down to 4 pixels, at least 1 and at most 4. The second
    convolution of each doubles the channels, up to 64 at the end, or 128 after more than two blocks.
    """
    _check(num_classes, image_shape)
    if min(image_shape[:2]) < 2:
        raise ValueError(f"image_shape must be at least 2x2 pixels for small_cnn, got {image_shape}")
    layers: list[Layer] = []
    for filters in _widths(min(image_shape[:2])):
        layers += [Conv2D(filters), ReLU(), Conv2D(2 * filters), ReLU(), MaxPool2D(2)]
    head = [Flatten(), Dropout(dropout), Dense(128), ReLU(), Dropout(dropout), _head(num_classes)]
    return Model([*layers, *head], image_shape)


def _widths(side: int) -> list[int]:
    """Return the channels that each block begins with, for images whose smaller side has ``side`` pixels."""
    blocks = min(4, max(1, side.bit_length() - 3))
    last = 64 if blocks <= 2 else 128
    return [last >> block for block in range(blocks, 0, -1)]


def _head(num_classes: int) -> Dense:
    return Dense(num_classes, initializer="glorot_uniform")


def _check(num_classes: int, image_shape: Shape) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if len(image_shape) != 3:
        raise ValueError(f"image_shape must be (height, width, channels), got {image_shape}")


_BY_NAME: dict[str, ModelFactory] = {"linear": linear, "mlp": mlp, "lenet": lenet, "small_cnn": small_cnn}


def get(name: str) -> ModelFactory:
    """Return the model factory called ``name``.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _BY_NAME:
        raise ValueError(f"model must be one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]
