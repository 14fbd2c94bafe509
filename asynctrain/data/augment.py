"""Augmentations: random changes of the training images, the same ones wherever and however often they are computed.

    augment = compose(random_crop(padding=4), horizontal_flip())
    images = augment(images, Draws(seed, epoch, positions))

An augmentation takes a chunk of images (N, H, W, C) uint8, C-contiguous, and returns as many of the same shape and
dtype; it may write into what it was given, and return that. Its random numbers come from ``Draws``: one stream per
sample, keyed by the seed, the epoch and the sample's position in the epoch. So the pixels do not depend on how an epoch
is cut into chunks, on who computes them, or on where a run was resumed.

``mixup`` and ``cutmix`` combine the samples of a whole batch and soften its labels, and hence are no augmentations but
mixings, with a generator for each batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from math import cos, log, pi, radians, sin, tan
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from asynctrain.arena import Array
from asynctrain.randomness import Purpose, require_seed
from asynctrain.types import JSON

Range = tuple[float, float]

LUMA = (0.299, 0.587, 0.114)  # what red, green and blue weigh in grey (ITU-R 601), here as in Pillow


class Draws:
    """The random numbers of some samples: each call takes the next one of every sample's own stream.

    The k-th call takes ``random()`` number ``4 * position + k % 4`` of ``generator(seed, Purpose.AUGMENT, epoch, k //
    4)``. So neighbours lie side by side there, and one call fetches the numbers of a whole chunk.
    Streams stay in step only if everyone asks for as many numbers whatever the images and the numbers before were: draw
    first, decide then.

    Args:
        seed: 0 to 2**64 - 1.
        epoch: from 0.
        positions: (N,) int64, the samples' positions in the order of the epoch, from 0.
    """

    def __init__(self, seed: int, epoch: int, positions: Array) -> None:
        self._seed = require_seed(seed)
        self._epoch = epoch
        self._runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)  # of neighbours
        self._numbers = self._fetched()

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Array:
        """Return (N,) float64, each in [low, high)."""
        return low + (high - low) * next(self._numbers)

    def integers(self, low: int, high: int) -> Array:
        """Return (N,) int64, each in [low, high)."""
        return low + (next(self._numbers) * (high - low)).astype(np.int64)

    def chance(self, p: float) -> Array:
        """Return (N,) bool, each true with probability ``p``."""
        return next(self._numbers) < p

    def _fetched(self) -> Iterator[Array]:
        """Yield (N,) float64 in [0, 1), one number of each stream at a time."""
        for block in count():
            yield from np.concatenate([self._of(run, block) for run in self._runs]).T.copy()

    def _of(self, run: Array, block: int) -> Array:
        """Return four numbers of each of the neighbouring positions ``run``, (n, 4)."""
        if not run.size:
            return np.empty((0, 4))
        counter = np.array([run[0], self._epoch, block, 0], np.uint64)
        philox = np.random.Philox(key=np.array([self._seed, Purpose.AUGMENT], np.uint64), counter=counter)
        return np.random.Generator(philox).random((len(run), 4))


D = TypeVar("D", bound="_Described")

_BY_NAME: dict[str, type[_Described]] = {}


@dataclass(frozen=True)
class _Described:
    """Something whose fields are its JSON, and which is known by a registered name."""

    name: ClassVar[str] = ""

    def to_json(self) -> JSON:
        """Return its name and arguments as JSON values; ``from_json`` reads them."""
        return {"name": self.name} | {field.name: _to_json(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_json(cls: type[D], value: JSON) -> D:
        """Return what ``to_json`` described.

        Raises:
            ValueError: the name is not registered in this process as one of this kind.
            TypeError: the arguments do not fit.
        """
        known = {name: kind for name, kind in _BY_NAME.items() if issubclass(kind, cls)}
        if value.get("name") not in known:
            raise ValueError(f"name must be one of {', '.join(known)} or be registered, got {value.get('name')!r}")
        return known[value["name"]](**{key: _from_json(item) for key, item in value.items() if key != "name"})


class Augmentation(_Described):
    """The base of all augmentations.

    One of your own is a frozen dataclass with fields that JSON can hold, decorated with ``register``; it implements
    ``__call__``. Whatever the images and the numbers drawn, it must draw equally often.
    """

    def __call__(self, images: Array, draws: Draws) -> Array:
        """Return the changed images, (N, H, W, C) uint8, C-contiguous, of the shape of ``images``."""
        raise NotImplementedError


class Mixing(_Described):
    """The base of what mixes the samples of a batch; one of your own is made as an ``Augmentation`` is."""

    def __call__(self, images: Array, labels: Array, num_classes: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Return mixed images and labels.

        Args:
            images: (N, H, W, C) uint8; may be written.
            labels: (N,) int64, each 0 to ``num_classes - 1``.
            num_classes: K.
            rng: of this batch.

        Returns:
            Images as given, and soft labels (N, K) float32, whose rows sum to 1.
        """
        raise NotImplementedError


def register(name: str) -> Callable[[type[D]], type[D]]:
    """Return a class decorator that makes an augmentation or a mixing known as ``name``, by which JSON refers to it.

    Raises:
        ValueError: the name belongs to another class already.
    """

    def registering(cls: type[D]) -> type[D]:
        if name in _BY_NAME:
            raise ValueError(f"name must be one that no other class has, got {name!r}, which is {_BY_NAME[name]}")
        cls.name = name
        _BY_NAME[name] = cls
        return cls

    return registering


@register("compose")
@dataclass(frozen=True)
class Compose(Augmentation):
    """One augmentation after the other."""

    augmentations: Sequence[Augmentation]

    def __post_init__(self) -> None:
        object.__setattr__(self, "augmentations", tuple(self.augmentations))
        for augmentation in self.augmentations:
            if not isinstance(augmentation, Augmentation):
                raise TypeError(f"compose: augmentations must be such as horizontal_flip(), got {augmentation!r}")

    def __call__(self, images: Array, draws: Draws) -> Array:
        """Change the images by each in turn."""
        for augmentation in self.augmentations:
            images = augmentation(images, draws)
        return images


@register("horizontal_flip")
@dataclass(frozen=True)
class HorizontalFlip(Augmentation):
    """Mirrors left and right with probability ``p``."""

    p: float = 0.5

    def __post_init__(self) -> None:
        _check_within(self, "p", 0, 1)

    def __call__(self, images: Array, draws: Draws) -> Array:
        """Mirror those that are chosen."""
        as_it_was = np.empty(images.shape[1:], np.uint8)
        for number in np.flatnonzero(draws.chance(self.p)):
            image = images[number]
            as_it_was[...] = image
            for channel in range(image.shape[2]):  # three times as fast as pixels of three bytes
                image[:, :, channel] = as_it_was[:, ::-1, channel]
        return images


@register("vertical_flip")
@dataclass(frozen=True)
class VerticalFlip(Augmentation):
    """Mirrors top and bottom with probability ``p``."""

    p: float = 0.5

    def __post_init__(self) -> None:
        _check_within(self, "p", 0, 1)

    def __call__(self, images: Array, draws: Draws) -> Array:
        """Mirror those that are chosen."""
        for number in np.flatnonzero(draws.chance(self.p)):
            images[number] = images[number, ::-1].copy()
        return images


@register("random_crop")
@dataclass(frozen=True)
class RandomCrop(Augmentation):
    """Shifts by up to ``padding`` pixels in each direction; what comes in from outside is ``fill`` (0 to 255).

    That is a crop of the original size out of the image with a border of ``padding`` pixels.
    """

    padding: int = 4
    fill: int = 0

    def __post_init__(self) -> None:
        _check_whole(self, "padding", 0)
        _check_whole(self, "fill", 0, 255)

    def __call__(self, images: Array, draws: Draws) -> Array:
        """Cut each out of its copy with a border."""
        _, height, width, channels = images.shape
        pad = self.padding
        tops, lefts = draws.integers(0, 2 * pad + 1), draws.integers(0, 2 * pad + 1)
        padded = np.full((height + 2 * pad, width + 2 * pad, channels), self.fill, np.uint8)
        inside = padded[pad : pad + height, pad : pad + width]
        for image, top, left in zip(images, tops.tolist(), lefts.tolist(), strict=True):
            inside[...] = image
            image[...] = padded[top : top + height, left : left + width]
        return images


@register("random_resized_crop")
@dataclass(frozen=True)
class RandomResizedCrop(Augmentation):
    """Cuts out a part and scales it (bilinear) to the image's own size.

    For images of 1 or 3 channels. The part's share of the area is uniform in ``scale``, the logarithm of its ratio of
    width to height in that of ``ratio``, its place uniform. Where such a ratio does not fit into the image, the nearest
    that does is taken, so that the area is always as drawn.
    """

    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        _check_range(self, "scale", 0, 1)
        _check_range(self, "ratio", 0)

    def __call__(self, images: Array, draws: Draws) -> Array:
        """Replace each by a part of it."""
        _check_channels(self, images)
        _, height, width, _ = images.shape
        for image, box in zip(images, _boxes(draws, height, width, self.scale, self.ratio), strict=True):
            part = _pillow(image).resize((width, height), Image.Resampling.BILINEAR, box)
            _write(part, image)
        return images


@register("affine")
@dataclass(frozen=True)
class Affine(Augmentation):
    """Rotates, shifts, scales and shears about the centre (bilinear); what comes in from outside is ``fill``.

    For images of 1 or 3 channels.

    Attributes:
        degrees: rotated by up to so many either way.
        translate: shifted by up to this share of the width and, independently, of the height, 0 to 1.
        scale: enlarged by a factor in this range, whose logarithm is uniform.
        shear: the vertical edges are inclined by up to so many degrees either way, below 90.
        fill: 0 to 255.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: Range = (1.0, 1.0)
    shear: float = 0.0
    fill: int = 0

    def __post_init__(self) -> None:
        _check_within(self, "degrees", 0, 360)
        _check_within(self, "translate", 0, 1)
        _check_range(self, "scale", 0)
        _check_within(self, "shear", 0, 89)
        _check_whole(self, "fill", 0, 255)

    def __call__(self, images: Array, draws: Draws) -> Array:
        """Move each by a map of its own."""
        _check_channels(self, images)
        _, height, width, channels = images.shape
        parts = (
            draws.uniform(-radians(self.degrees), radians(self.degrees)),
            draws.uniform(-self.translate, self.translate) * width,
            draws.uniform(-self.translate, self.translate) * height,
            np.exp(draws.uniform(log(self.scale[0]), log(self.scale[1]))),
            draws.uniform(-radians(self.shear), radians(self.shear)),
        )
        fill = self.fill if channels == 1 else (self.fill,) * 3
        for image, angle, right, down, scale, shear in zip(images, *(part.tolist() for part in parts), strict=True):
            back = _back(angle, right, down, scale, shear, width / 2, height / 2)
            moved = _pillow(image).transform(
                (width, height), Image.Transform.AFFINE, back, Image.Resampling.BILINEAR, fillcolor=fill
            )
            _write(moved, image)
        return images


def _back(
    angle: float, right: float, down: float, scale: float, shear: float, x: float, y: float
) -> tuple[float, float, float, float, float, float]:
    """Return (a, b, c, d, e, f): what is seen at (u, v) was at (a u + b v + c, d u + e v + f) before.

    Before, there was: shear and scale about the centre (x, y), rotation counterclockwise by ``angle``, and a shift. The
    first two rows of that map's matrix are, in coordinates from the centre, ``scale * [[cos, sin], [-sin, cos]] @
    [[1, tan(shear)], [0, 1]]``; it is inverted here.
    """
    c, s, t = cos(angle) / scale, sin(angle) / scale, tan(shear)
    a, b, d, e = c - t * s, -s - t * c, s, c
    u, v = x + right, y + down  # where the centre goes
    return a, b, x - a * u - b * v, d, e, y - d * u - e * v


@register("color_jitter")
@dataclass(frozen=True)
class ColorJitter(Augmentation):
    """Changes brightness, contrast, saturation and hue, in this order.

    For images of 1 or 3 channels; grey ones have neither saturation nor hue. The first three are multiplied by a factor
    uniform in [1 - x, 1 + x], but not below 0: brightness away from black, contrast away from the image's mean grey,
    saturation away from the pixel's own grey. ``hue`` turns the colours by an angle uniform in [-hue, hue], as a share
    of the full circle, about the axis of the greys, brightness kept. All four are one linear map of each pixel, clipped
    to 0 to 255 only at the end, so that nothing is lost in between.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            _check_within(self, name, 0)
        _check_within(self, "hue", 0, 0.5)

    def __call__(self, images: Array, draws: Draws) -> Array:
        """Map the colours of each."""
        _check_channels(self, images)
        brightness, contrast, saturation = (
            draws.uniform(max(0, 1 - most), 1 + most) for most in (self.brightness, self.contrast, self.saturation)
        )
        angle = draws.uniform(-self.hue, self.hue) * 2 * pi
        gain = brightness * contrast
        offset = brightness * (1 - contrast) * _mean_grey(images)
        if images.shape[3] == 1:
            _apply_tables(images, gain, offset)
        else:
            _apply_matrices(images, gain[:, None, None] * _colour_matrices(saturation, angle), offset)
        return images


def _mean_grey(images: Array) -> Array:
    """Return the mean grey of each image, (N,) float64, of images (N, H, W, 1 or 3)."""
    count, height, width, channels = images.shape
    columns = images.reshape(count, height, width * channels).sum(axis=1, dtype=np.uint32)
    sums = columns.reshape(count, width, channels).sum(axis=1, dtype=np.uint64)  # exact, so the order is no matter
    red, green, blue = sums.T if channels == 3 else (sums[:, 0],) * 3
    mean: Array = (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue) / (height * width)
    return mean


def _colour_matrices(saturation: Array, angle: Array) -> Array:
    """Return the maps (N, 3, 3) of RGB that scale the colour by ``saturation`` and turn it by ``angle`` (radians).

    The colour of a pixel is its blue and its red less its grey, each by the factors of JPEG's Cb and Cr; green follows.
    """
    grey = np.array([LUMA] * 3)  # every row gives the grey
    blue, red = (np.array([0, 0, 1]) - LUMA) / 1.772, (np.array([1, 0, 0]) - LUMA) / 1.402  # Cb and Cr

    def colour(blue: Array, red: Array) -> Array:
        return np.stack([1.402 * red, -(LUMA[2] * 1.772 * blue + LUMA[0] * 1.402 * red) / LUMA[1], 1.772 * blue])

    along, across = saturation * np.cos(angle), saturation * np.sin(angle)
    matrices: Array = grey + along[:, None, None] * colour(blue, red) + across[:, None, None] * colour(-red, blue)
    return matrices


def _apply_matrices(images: Array, matrices: Array, offsets: Array) -> None:
    """Replace each pixel of RGB images by ``matrix @ pixel + offset``, rounded and clipped."""
    rows = np.concatenate([matrices, np.broadcast_to(offsets[:, None, None], (len(images), 3, 1))], axis=2)
    for image, row in zip(images, rows.reshape(-1, 12).tolist(), strict=True):
        _write(_pillow(image).convert("RGB", row), image)


def _apply_tables(images: Array, gain: Array, offset: Array) -> None:
    """Replace each pixel of grey images by ``gain * pixel + offset``, rounded and clipped."""
    tables = gain[:, None] * np.arange(256) + offset[:, None] + 0.5
    for image, table in zip(images, tables.clip(0, 255).astype(np.uint8), strict=True):
        image[...] = table[image]


@register("random_erasing")
@dataclass(frozen=True)
class RandomErasing(Augmentation):
    """Paints a rectangle over with probability ``p`` (Zhong et al., "Random erasing data augmentation", 1708.04896).

    Its share of the area is uniform in ``scale``, the logarithm of its ratio of width to height in that of ``ratio``,
    its place uniform; where the ratio does not fit, the nearest that does is taken. ``fill`` is 0 to 255.
    """

    p: float = 0.5
    scale: Range = (0.02, 0.33)
    ratio: Range = (0.3, 1 / 0.3)
    fill: int = 0

    def __post_init__(self) -> None:
        _check_within(self, "p", 0, 1)
        _check_range(self, "scale", 0, 1)
        _check_range(self, "ratio", 0)
        _check_whole(self, "fill", 0, 255)

    def __call__(self, images: Array, draws: Draws) -> Array:
        """Paint over those that are chosen."""
        _, height, width, _ = images.shape
        chosen = draws.chance(self.p)
        boxes = _boxes(draws, height, width, self.scale, self.ratio)
        for number in np.flatnonzero(chosen):
            left, top, right, bottom = map(round, boxes[number])
            images[number, top:bottom, left:right] = self.fill
        return images


@register("mixup")
@dataclass(frozen=True)
class Mixup(Mixing):
    """Blends each sample with another one (Zhang et al., "mixup: beyond empirical risk minimization", 1710.09412).

    One weight for the whole batch, from the beta distribution of (``alpha``, ``alpha``), rounded to 1/256: that is how
    the pixels are blended, and what the labels say exactly.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        _check_positive(self, "alpha")

    def __call__(self, images: Array, labels: Array, num_classes: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Blend the batch with a permutation of itself."""
        own = round(rng.beta(self.alpha, self.alpha) * 256)
        other = rng.permutation(len(images))
        mixed = np.multiply(images, own, dtype=np.uint16)
        mixed += np.multiply(images[other], 256 - own, dtype=np.uint16)
        mixed += 128
        mixed >>= 8
        np.copyto(images, mixed, casting="unsafe")
        return images, _soft(labels, labels[other], own / 256, num_classes)


@register("cutmix")
@dataclass(frozen=True)
class Cutmix(Mixing):
    """Pastes a part of another sample over each (Yun et al., "CutMix", 1905.04899).

    The same rectangle for the whole batch: its share of the area is from the beta distribution of (``alpha``,
    ``alpha``), its proportions are the image's, its centre is uniform, and what sticks out is cut off. The labels say
    what share of the pixels is whose.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_positive(self, "alpha")

    def __call__(self, images: Array, labels: Array, num_classes: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Paste a part of a permutation of the batch over it."""
        _, height, width, _ = images.shape
        side = np.sqrt(rng.beta(self.alpha, self.alpha))
        other = rng.permutation(len(images))
        top, bottom = _span(height, side, rng)
        left, right = _span(width, side, rng)
        images[:, top:bottom, left:right] = images[other, top:bottom, left:right]
        own = 1 - (bottom - top) * (right - left) / (height * width)
        return images, _soft(labels, labels[other], own, num_classes)


def _span(length: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    """Return begin and end of a stretch of ``share`` of ``length`` about a random centre, what sticks out cut off."""
    half = share * length / 2
    centre = rng.uniform(0, length)
    return max(0, round(centre - half)), min(length, round(centre + half))


def _soft(labels: Array, others: Array, own: float, num_classes: int) -> Array:
    """Return (N, num_classes) float32: ``own`` for the sample's label, the rest for the other's."""
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {labels.min()} to {labels.max()}")
    soft = np.zeros((len(labels), num_classes), np.float32)
    rows = np.arange(len(labels))
    soft[rows, labels] = own
    soft[rows, others] += 1 - own
    return soft


# As they are called: at.augment.compose(at.augment.horizontal_flip(), at.augment.rotation(10))

horizontal_flip = HorizontalFlip
vertical_flip = VerticalFlip
random_crop = RandomCrop
random_resized_crop = RandomResizedCrop
affine = Affine
color_jitter = ColorJitter
random_erasing = RandomErasing
mixup = Mixup
cutmix = Cutmix


def compose(*augmentations: Augmentation) -> Compose:
    """Return the augmentation that does one after the other."""
    return Compose(augmentations)


def rotation(degrees: float, fill: int = 0) -> Affine:
    """Return the augmentation that rotates by up to ``degrees`` either way about the centre."""
    return Affine(degrees=degrees, fill=fill)


def standard() -> Compose:
    """Return a moderate set for photos of things that look alike in a mirror.

    A part of 50 to 100 % of the area, scaled to the full size; mirrored every other time; brightness, contrast and
    saturation changed by up to 20 %. Digits, letters and road signs are not to be mirrored: choose ``random_crop``,
    ``rotation`` or ``affine`` for them.
    """
    return compose(random_resized_crop(scale=(0.5, 1.0)), horizontal_flip(), color_jitter(0.2, 0.2, 0.2))


class _Box(NamedTuple):
    """A part of an image in pixels, fractions included."""

    left: float
    top: float
    right: float
    bottom: float


def _boxes(draws: Draws, height: int, width: int, scale: Range, ratio: Range) -> list[_Box]:
    """Return a random part of each image: four draws.

    ``scale`` is the range of its share of the area, ``ratio`` that of width / height. Of a share s the ratios that fit
    are from s * width / height to width / (s * height).
    """
    share = draws.uniform(*scale)
    wanted = np.exp(draws.uniform(log(ratio[0]), log(ratio[1])))
    fitting = wanted.clip(share * width / height, width / (share * height))
    wide = np.minimum(np.sqrt(share * height * width * fitting), width)
    high = np.minimum(np.sqrt(share * height * width / fitting), height)
    left, top = draws.uniform() * (width - wide), draws.uniform() * (height - high)
    return [_Box(*edges) for edges in np.stack([left, top, left + wide, top + high], axis=1).tolist()]


def _pillow(image: Array) -> Image.Image:
    """Return a copy of (H, W, 1 or 3) uint8 for Pillow."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _write(image: Image.Image, out: Array) -> None:
    out[...] = np.frombuffer(image.tobytes(), np.uint8).reshape(out.shape)


def _to_json(value: Any) -> Any:
    if isinstance(value, _Described):
        return value.to_json()
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _Described.from_json(value)
    return tuple(_from_json(item) for item in value) if isinstance(value, list | tuple) else value


def _check_channels(what: Augmentation, images: Array) -> None:
    if images.shape[3] not in (1, 3):
        raise ValueError(f"{what.name}: images must have 1 or 3 channels, got {images.shape[3]}")


def _check_within(what: _Described, argument: str, low: float, high: float = float("inf")) -> None:
    value = getattr(what, argument)
    if not isinstance(value, int | float) or not low <= value <= high or value == float("inf"):
        limits = f"from {low} to {high}" if high < float("inf") else f"of {low} or more"
        raise ValueError(f"{what.name}: {argument} must be a number {limits}, got {value!r}")


def _check_whole(what: _Described, argument: str, low: int, high: float = float("inf")) -> None:
    if isinstance(getattr(what, argument), bool) or not isinstance(getattr(what, argument), int):
        raise TypeError(f"{what.name}: {argument} must be an integer, got {getattr(what, argument)!r}")
    _check_within(what, argument, low, high)


def _check_positive(what: _Described, argument: str) -> None:
    value = getattr(what, argument)
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{what.name}: {argument} must be a number above 0, got {value!r}")


def _check_range(what: _Described, argument: str, low: float, high: float = float("inf")) -> None:
    """Both ends above ``low`` and up to ``high``, in order."""
    value = getattr(what, argument)
    pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(end, int | float) for end in value)
    if not pair or not low < value[0] <= value[1] <= high or value[1] == float("inf"):
        most = f" and at most {high}" if high < float("inf") else ""
        raise ValueError(f"{what.name}: {argument} must be (low, high), above {low}{most}, got {value!r}")
