"""Ready-made classifiers of images. Each returns logits; ``get`` finds them by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

from asynctrain.arena import Shape
from asynctrain.nn.layers import (
    BatchNorm,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalAveragePool,
    Layer,
    MaxPool2D,
    ReLU,
    Residual,
)
from asynctrain.nn.model import Model

ModelFactory = Callable[..., Model]  # takes num_classes and image_shape (H, W, C) by name, each and nothing else needed


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
    _check_side(12, image_shape, "lenet")
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
    _check_side(2, image_shape, "small_cnn")
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


def vgg_small(*, num_classes: int, image_shape: Shape) -> Model:
    """Return a small VGG (Simonyan and Zisserman 2015, arXiv:1409.1556) with batch norm, for 8x8 pixels and more.

    Three blocks of two 3x3 convolutions and a 2x2 max pool, of 32, 64 and 128 filters; batch norm and a ReLU after each
    convolution, which has no bias. The mean over all pixels and one dense layer make the logits.

    In PyTorch: ``Conv2d(c, f, 3, padding=1, bias=False), BatchNorm2d(f), ReLU()`` six times, ``MaxPool2d(2)`` after
    every second, then ``AdaptiveAvgPool2d(1), Flatten(), Linear(128, num_classes)``.
    """
    _check(num_classes, image_shape)
    _check_side(8, image_shape, "vgg_small")
    layers: list[Layer] = []
    for filters in (32, 64, 128):
        layers += [*_convolution(filters), ReLU(), *_convolution(filters), ReLU(), MaxPool2D(2)]
    return Model([*layers, GlobalAveragePool(), _head(num_classes)], image_shape)


def resnet(*, num_classes: int, image_shape: Shape, depth: Literal[8, 18, 20, 32] = 20) -> Model:
    """Return a residual network of basic blocks (He et al. 2016, arXiv:1512.03385).

    With 8, 20 or 32 layers it is the one of the paper's section 4.2, for 4x4 pixels and more: a 3x3 convolution, three
    stages of (depth - 2) / 6 blocks of 16, 32 and 64 filters. With 18 it is the one of its table 1, for 64x64 pixels
    and more: a 7x7 convolution of stride 2, a 3x3 max pool of stride 2, four stages of two blocks of 64 to 512 filters.
    The mean over all pixels and one dense layer make the logits.

    A block is two 3x3 convolutions with batch norm, the first followed by a ReLU, added to its input, and a ReLU. The
    first block of a later stage has stride 2, and in its shortcut a 1x1 convolution of that stride with batch norm (the
    paper's option B). Convolutions have no bias; paddings are PyTorch's, (kernel - 1) / 2 on each side.

    Args:
        num_classes: at least 2.
        image_shape: (H, W, C).
        depth: the layers with weights, projections not counted.
    """
    _check(num_classes, image_shape)
    if depth == 18:
        _check_side(64, image_shape, "resnet with depth 18")
        stem = [*_convolution(64, 7, stride=2), ReLU(), MaxPool2D(3, stride=2, padding=1)]
        stages = _stages((64, 128, 256, 512), blocks=2)
    elif depth in (8, 20, 32):
        _check_side(4, image_shape, f"resnet with depth {depth}")
        stem = [*_convolution(16), ReLU()]
        stages = _stages((16, 32, 64), blocks=(depth - 2) // 6)
    else:
        raise ValueError(f"depth must be 8, 18, 20 or 32 for resnet, got {depth}")
    return Model([*stem, *stages, GlobalAveragePool(), _head(num_classes)], image_shape)


def _stages(widths: Sequence[int], blocks: int) -> list[Layer]:
    """Return residual blocks, ``blocks`` for each width; the first of each stage but the first halves the image."""
    layers: list[Layer] = []
    for stage, filters in enumerate(widths):
        for block in range(blocks):
            halves = stage > 0 and block == 0
            layers += [_basic_block(filters, halves), ReLU()]
    return layers


def _basic_block(filters: int, halves: bool) -> Residual:
    stride = 2 if halves else 1
    main = [*_convolution(filters, stride=stride), ReLU(), *_convolution(filters)]
    return Residual(main, projection=_convolution(filters, 1, stride=stride) if halves else ())


def mobilenet(*, num_classes: int, image_shape: Shape, width: float = 1.0) -> Model:
    """Return a MobileNet (Howard et al. 2017, arXiv:1704.04861) cut to small images, for 8x8 pixels and more.

    A 3x3 convolution of 32 filters, of stride 2 where both sides have 64 pixels or more; then seven blocks of a 3x3
    depthwise and a 1x1 convolution, to 64, 128, 128, 256, 256, 512 and 512 filters, the second, fourth and sixth of
    stride 2. Each convolution has batch norm, a ReLU and no bias; paddings are PyTorch's. The mean over all pixels and
    one dense layer make the logits.

    Args:
        num_classes: at least 2.
        image_shape: (H, W, C).
        width: multiplies all filters, which are then rounded to multiples of 8; above 0.
    """
    _check(num_classes, image_shape)
    _check_side(8, image_shape, "mobilenet")
    if not width > 0:
        raise ValueError(f"width must be above 0 for mobilenet, got {width}")

    def scaled(filters: int) -> int:
        return max(8, round(filters * width / 8) * 8)

    channels = scaled(32)
    layers: list[Layer] = [*_convolution(channels, stride=2 if min(image_shape[:2]) >= 64 else 1), ReLU()]
    for filters, stride in ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)):
        layers += [*_convolution(channels, stride=stride, groups=channels), ReLU()]
        channels = scaled(filters)
        layers += [*_convolution(channels, 1), ReLU()]
    return Model([*layers, GlobalAveragePool(), _head(num_classes)], image_shape)


def _convolution(filters: int, size: int = 3, *, stride: int = 1, groups: int = 1) -> list[Layer]:
    """Return a convolution and the batch norm that makes its bias idle."""
    padding = size // 2
    convolution = Conv2D(filters, size, stride=stride, padding=padding, groups=groups, use_bias=False)
    return [convolution, BatchNorm()]


def _head(num_classes: int) -> Dense:
    return Dense(num_classes, initializer="glorot_uniform")


def _check(num_classes: int, image_shape: Shape) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if len(image_shape) != 3:
        raise ValueError(f"image_shape must be (height, width, channels), got {image_shape}")


def _check_side(least: int, image_shape: Shape, name: str) -> None:
    if min(image_shape[:2]) < least:
        raise ValueError(f"image_shape must be at least {least}x{least} pixels for {name}, got {image_shape}")


_BY_NAME: dict[str, ModelFactory] = {
    "linear": linear,
    "mlp": mlp,
    "lenet": lenet,
    "small_cnn": small_cnn,
    "vgg_small": vgg_small,
    "resnet": resnet,
    "resnet8": partial(resnet, depth=8),
    "resnet18": partial(resnet, depth=18),
    "resnet20": partial(resnet, depth=20),
    "resnet32": partial(resnet, depth=32),
    "mobilenet": mobilenet,
}

NAMES = tuple(_BY_NAME)


def get(name: str) -> ModelFactory:
    """Return the model factory called ``name``; ``resnet8`` is ``resnet`` with depth 8, and so on.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _BY_NAME:
        raise ValueError(f"model must be one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]
