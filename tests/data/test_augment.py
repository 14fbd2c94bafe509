from __future__ import annotations

import json
import math
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynctrain.arena import Array
from asynctrain.data.augment import (
    Augmentation,
    Draws,
    Mixing,
    affine,
    color_jitter,
    compose,
    cutmix,
    horizontal_flip,
    mixup,
    random_crop,
    random_erasing,
    random_resized_crop,
    register,
    rotation,
    standard,
    vertical_flip,
)
from asynctrain.randomness import Purpose, generator

EVERYTHING: list[Augmentation] = [
    horizontal_flip(),
    vertical_flip(),
    random_crop(padding=3, fill=9),
    random_resized_crop(),
    affine(degrees=20, translate=0.2, scale=(0.8, 1.2), shear=10, fill=50),
    color_jitter(0.3, 0.3, 0.3, 0.1),
    random_erasing(),
    standard(),
    compose(random_crop(), horizontal_flip(), random_erasing(p=0.7), rotation(15), color_jitter(0.5)),
]

each_augmentation = pytest.mark.parametrize("augmentation", EVERYTHING, ids=lambda augmentation: augmentation.name)


@register("test_invert")
@dataclass(frozen=True)
class Invert(Augmentation):
    """Makes a negative with probability ``p``: an augmentation as users write them."""

    p: float

    def __call__(self, images: Array, draws: Draws) -> Array:
        return np.where(draws.chance(self.p)[:, None, None, None], 255 - images, images)


@register("test_unmixed")
@dataclass(frozen=True)
class Unmixed(Mixing):
    def __call__(self, images: Array, labels: Array, num_classes: int, rng: np.random.Generator) -> tuple[Array, Array]:
        return images, np.eye(num_classes, dtype=np.float32)[labels]


def noise(*shape: int) -> Array:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def drawn(count: int = 8, first: int = 0, *, seed: int = 1, epoch: int = 2) -> Draws:
    return Draws(seed, epoch, np.arange(first, first + count))


# Draws


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.lists(st.integers(0, 2**63 - 1), max_size=5))
def test_the_kth_numbers_are_those_at_each_samples_own_counter(seed: int, epoch: int, positions: list[int]) -> None:
    draws = Draws(seed, epoch, np.array(positions, np.int64))
    for block in range(9):
        own = [at_counter(seed, [position, epoch, block, 0]) for position in positions]
        for number in range(4):
            assert draws.uniform().tolist() == [numbers[number] for numbers in own]


def at_counter(seed: int, counter: list[int]) -> list[float]:
    philox = np.random.Philox(key=np.array([seed, Purpose.AUGMENT], np.uint64), counter=np.array(counter, np.uint64))
    return np.random.Generator(philox).random(4).tolist()  # type: ignore[no-any-return]


def test_neighbours_share_the_stream_of_their_block_four_numbers_each() -> None:
    stream = [generator(1, Purpose.AUGMENT, 2, block).random(4 * 50).reshape(50, 4) for block in range(3)]
    draws = drawn(50)
    for k in range(12):
        assert np.array_equal(draws.uniform(), stream[k // 4][:, k % 4])


def test_uniform_numbers_integers_and_chances_are_made_of_the_same_numbers() -> None:
    plain, other = drawn(1000), drawn(1000)
    numbers = plain.uniform()
    assert np.allclose(other.uniform(-3, 5), numbers * 8 - 3)
    numbers = plain.uniform()
    assert np.array_equal(other.integers(-2, 3), np.floor(numbers * 5).astype(np.int64) - 2)
    numbers = plain.uniform()
    assert np.array_equal(other.chance(0.3), numbers < 0.3)


def test_numbers_are_uniform_and_in_range() -> None:
    draws = drawn(20_000)
    assert np.histogram(draws.uniform(2, 4), 4, (2, 4))[0] == pytest.approx([5000] * 4, abs=300)
    assert np.bincount(draws.integers(0, 5)) == pytest.approx([4000] * 5, abs=300)
    assert draws.chance(0.25).mean() == pytest.approx(0.25, abs=0.02)
    assert not draws.chance(0).any()
    assert draws.chance(1).all()
    assert draws.integers(7, 8).tolist() == [7] * 20_000


def test_a_wrong_seed_is_told() -> None:
    with pytest.raises(ValueError, match=r"seed must be between 0 and 2\*\*64 - 1, got -1"):
        Draws(-1, 0, np.arange(3))


# What holds for every augmentation


@each_augmentation
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_the_pixels_are_the_same_however_the_epoch_is_cut(
    augmentation: Augmentation, channels: int, chunk: int
) -> None:
    images = noise(37, 14, 11, channels)
    whole = augmentation(images.copy(), drawn(37))
    cut = [
        augmentation(images[start : start + chunk].copy(), drawn(len(images[start : start + chunk]), start))
        for start in range(0, 37, chunk)
    ]
    assert np.array_equal(np.concatenate(cut), whole)


@each_augmentation
def test_a_sample_is_the_same_in_any_company(augmentation: Augmentation) -> None:
    images, order = noise(20, 9, 10, 3), np.random.default_rng(1).permutation(20)
    straight = augmentation(images.copy(), Draws(5, 0, np.arange(20)))
    shuffled = augmentation(images[order], Draws(5, 0, order))
    assert np.array_equal(shuffled, straight[order])


@each_augmentation
@pytest.mark.parametrize("shape", [(5, 12, 8, 3), (3, 1, 1, 1), (2, 1, 7, 3), (0, 12, 8, 3)])
def test_shape_and_dtype_stay_and_the_result_is_contiguous(augmentation: Augmentation, shape: tuple[int, ...]) -> None:
    images = augmentation(noise(*shape), drawn(shape[0]))
    assert images.shape == shape
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous


@each_augmentation
def test_seed_epoch_and_position_each_make_a_difference(augmentation: Augmentation) -> None:
    images = noise(30, 16, 16, 3)
    results = [
        augmentation(images.copy(), draws)
        for draws in (drawn(30), drawn(30, seed=2), drawn(30, epoch=3), drawn(30, first=30))
    ]
    digests = {result.tobytes() for result in [images, *results]}
    assert len(digests) == 5


@pytest.mark.parametrize("described", [*EVERYTHING, Invert(0.5), compose(), mixup(0.3), cutmix(), Unmixed()])
def test_json_and_pickle_bring_back_the_same(described: Augmentation | Mixing) -> None:
    value = json.loads(json.dumps(described.to_json()))
    assert type(described).from_json(value) == described
    assert (Mixing if isinstance(described, Mixing) else Augmentation).from_json(value) == described
    assert pickle.loads(pickle.dumps(described)) == described  # noqa: S301


def test_json_is_the_name_and_the_arguments() -> None:
    assert compose(horizontal_flip(0.3), random_resized_crop()).to_json() == {
        "name": "compose",
        "augmentations": [
            {"name": "horizontal_flip", "p": 0.3},
            {"name": "random_resized_crop", "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3]},
        ],
    }


def test_an_augmentation_of_ones_own_goes_along_with_the_others() -> None:
    images = noise(6, 5, 4, 1)
    both = compose(vertical_flip(p=1), Invert(p=1))
    assert np.array_equal(both(images.copy(), drawn(6)), 255 - images[:, ::-1])


def test_names_that_are_unknown_or_taken_are_told() -> None:
    with pytest.raises(ValueError, match=r"name must be one of compose, horizontal_flip, .* be registered, got 'blur'"):
        Augmentation.from_json({"name": "blur"})
    with pytest.raises(ValueError, match=r"name must be one of mixup, cutmix.*, got 'affine'"):
        Mixing.from_json({"name": "affine"})
    with pytest.raises(TypeError, match="strength"):
        Augmentation.from_json({"name": "affine", "strength": 3})
    with pytest.raises(ValueError, match="name must be one that no other class has, got 'affine'"):
        register("affine")(Invert)


# Each of them


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_flips_mirror_those_images_that_chance_chose(channels: int) -> None:
    images, chosen = noise(40, 7, 6, channels), drawn(40).chance(0.3)[:, None, None, None]
    assert 3 < chosen.sum() < 25
    for flip, mirrored in ((horizontal_flip, images[:, :, ::-1]), (vertical_flip, images[:, ::-1])):
        assert np.array_equal(flip(0.3)(images.copy(), drawn(40)), np.where(chosen, mirrored, images))
        assert np.array_equal(flip(0)(images.copy(), drawn(40)), images)
        assert np.array_equal(flip(1)(images.copy(), drawn(40)), mirrored)


def test_a_random_crop_is_one_of_all_the_windows_of_the_padded_image() -> None:
    images = noise(400, 5, 6, 2)
    cropped = random_crop(padding=2, fill=7)(images.copy(), drawn(400))
    seen = set()
    for image, crop in zip(images, cropped, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), constant_values=7)
        windows = {(top, left): padded[top : top + 5, left : left + 6] for top in range(5) for left in range(5)}
        (place,) = [place for place, window in windows.items() if np.array_equal(crop, window)]
        seen.add(place)
    assert len(seen) == 25


def test_a_resized_crop_shows_a_part_of_the_area_and_proportions_asked_for_anywhere_in_the_image() -> None:
    """Two gradients show what part of the width, and of the height, is seen."""
    height, width, count = 120, 200, 200
    columns, rows = np.arange(width, dtype=np.uint8), np.arange(height, dtype=np.uint8)
    crop = random_resized_crop(scale=(0.2, 0.6), ratio=(0.8, 1.5))
    across = crop(np.tile(columns[None, None, :, None], (count, height, 1, 1)), drawn(count))[:, 60, :, 0].astype(float)
    down = crop(np.tile(rows[None, :, None, None], (count, 1, width, 1)), drawn(count))[:, :, 100, 0].astype(float)
    wide, high = (across[:, 180] - across[:, 20]) * width / 160, (down[:, 110] - down[:, 10]) * height / 100
    share, ratio = wide * high / (width * height), wide / high
    assert share.min() == pytest.approx(0.2, abs=0.02)
    assert share.max() == pytest.approx(0.6, abs=0.02)
    assert np.median(share) == pytest.approx(0.4, abs=0.05)
    assert ratio.min() == pytest.approx(0.8, abs=0.03)
    assert ratio.max() == pytest.approx(1.5, abs=0.06)
    assert across.min() < 5
    assert across.max() > width - 6
    assert down.min() < 5
    assert down.max() > height - 6


@pytest.mark.parametrize(("ratio", "wide", "high"), [(4, 1, 0.5), (1 / 4, 0.5, 1)])
def test_a_crop_whose_proportions_do_not_fit_keeps_its_area(ratio: float, wide: float, high: float) -> None:
    """Half of the area at 4 : 1 does not fit into a square: it becomes all of the width and half of the height."""
    gradient = np.tile(np.arange(100, dtype=np.uint8)[None, :, None, None], (20, 1, 100, 1))
    crop = random_resized_crop(scale=(0.5, 0.5), ratio=(ratio, ratio))
    across = crop(gradient.swapaxes(1, 2).copy(), drawn(20))[:, 50, :, 0].astype(float)
    down = crop(gradient.copy(), drawn(20))[:, :, 50, 0].astype(float)
    assert (across[:, 90] - across[:, 10]) / 80 == pytest.approx([wide] * 20, abs=0.02)
    assert (down[:, 90] - down[:, 10]) / 80 == pytest.approx([high] * 20, abs=0.02)


def test_a_crop_of_everything_changes_nothing() -> None:
    images = noise(4, 12, 9, 3)
    assert np.array_equal(random_resized_crop(scale=(1, 1))(images.copy(), drawn(4)), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_affine_map_moves_points_as_drawn(channels: int) -> None:
    """A bright spot is found where rotation, scale, shear and shift, multiplied out, put it."""
    height, width, count = 60, 80, 50
    x, y = 50.5, 22.5
    images = np.zeros((count, height, width, channels), np.uint8)
    images[:, 21:24, 49:52] = 250  # 3 x 3 about it
    moved = affine(degrees=40, translate=0.1, scale=(0.8, 1.3), shear=15)(images, drawn(count))
    draws = drawn(count)
    angle = np.radians(draws.uniform(-40, 40))
    right, down = draws.uniform(-0.1, 0.1) * width, draws.uniform(-0.1, 0.1) * height
    scale = 0.8 * (1.3 / 0.8) ** draws.uniform()
    shear = np.tan(np.radians(draws.uniform(-15, 15)))
    from_centre = np.array([x - width / 2, y - height / 2])
    for number in range(count):
        c, s = math.cos(angle[number]), math.sin(angle[number])
        turned = np.array([[c, s], [-s, c]]) @ np.array([[1, shear[number]], [0, 1]]) @ from_centre
        expected = scale[number] * turned + (width / 2 + right[number], height / 2 + down[number])
        weights = moved[number, :, :, 0].astype(float)
        rows, columns = np.mgrid[0:height, 0:width] + 0.5
        found = (weights * columns).sum() / weights.sum(), (weights * rows).sum() / weights.sum()
        assert found == pytest.approx(expected, abs=0.3)


def test_a_positive_rotation_is_counterclockwise() -> None:
    images = np.zeros((30, 41, 41, 1), np.uint8)
    images[:, 20, 21:] = 255  # a hand that points to the right
    turned = rotation(30)(images, drawn(30))[..., 0]
    rises = turned[:, :20].sum(axis=(1, 2)) > turned[:, 21:].sum(axis=(1, 2))
    assert np.array_equal(rises, drawn(30).uniform(-30, 30) > 0)


def test_what_comes_in_from_outside_is_the_fill() -> None:
    images = np.full((20, 30, 30, 3), 200, np.uint8)
    turned = rotation(45, fill=77)(images, drawn(20))
    assert set(np.unique(turned)) == {77, 200}
    assert (turned[:, 15, 15] == 200).all()


def test_an_affine_map_without_arguments_changes_nothing() -> None:
    images = noise(4, 12, 9, 3)
    assert np.array_equal(affine()(images.copy(), drawn(4)), images)


def jittered(image: Array, brightness: float, contrast: float, saturation: float, turn: float) -> Array:
    """Return (H, W, 3) float64 after one change at a time, not clipped."""
    luma = np.array([0.299, 0.587, 0.114])
    x = image * brightness
    mean = (x @ luma).mean()
    x = mean + contrast * (x - mean)
    grey = (x @ luma)[..., None]
    x = grey + saturation * (x - grey)
    cb, cr = (x[..., 2] - x @ luma) / 1.772, (x[..., 0] - x @ luma) / 1.402
    cb, cr = (
        cb * math.cos(turn) - cr * math.sin(turn),
        cb * math.sin(turn) + cr * math.cos(turn),
    )
    red, blue = (x @ luma) + 1.402 * cr, (x @ luma) + 1.772 * cb
    green = ((x @ luma) - 0.299 * red - 0.114 * blue) / 0.587
    return np.stack([red, green, blue], axis=-1)


@pytest.mark.parametrize(
    "strength", [(0.4, 0, 0, 0), (0, 0.7, 0, 0), (0, 0, 1.5, 0), (0, 0, 0, 0.5), (0.2, 0.5, 0.3, 0.1)]
)
def test_colours_change_as_one_change_after_the_other_would(strength: tuple[float, float, float, float]) -> None:
    images = noise(10, 8, 9, 3)
    result = color_jitter(*strength)(images.copy(), drawn(10)).astype(float)
    draws = drawn(10)
    factors = [draws.uniform(max(0, 1 - most), 1 + most) for most in strength[:3]]
    turn = draws.uniform(-strength[3], strength[3]) * 2 * math.pi
    for image, changed, *parts in zip(images, result, *factors, turn, strict=True):
        assert np.abs(jittered(image, *parts).clip(0, 255) - changed).max() < 0.51


def test_grey_images_of_one_channel_become_what_grey_ones_of_three_do() -> None:
    grey = noise(10, 8, 9, 1)
    jitter = color_jitter(0.4, 0.6, 0.9, 0.3)
    one, three = jitter(grey.copy(), drawn(10)), jitter(grey.repeat(3, axis=3), drawn(10))
    assert np.abs(three.astype(int) - one).max() <= 1
    assert (one != grey).any()


def test_colours_that_are_not_to_change_stay() -> None:
    images = noise(5, 8, 9, 3)
    assert np.array_equal(color_jitter()(images.copy(), drawn(5)), images)


def test_erasing_paints_one_rectangle_of_the_area_and_proportions_asked_for() -> None:
    images = np.full((600, 80, 100, 3), 200, np.uint8)
    erased = random_erasing(p=1, scale=(0.1, 0.3), ratio=(0.5, 2), fill=9)(images, drawn(600)) == 9
    shares, ratios = [], []
    for image in erased:
        assert np.array_equal(image[..., 0], image[..., 2])
        rows, columns = np.flatnonzero(image[..., 0].any(axis=1)), np.flatnonzero(image[..., 0].any(axis=0))
        assert image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert image[..., 0].sum() == len(rows) * len(columns)
        shares.append(image[..., 0].mean())
        ratios.append(len(columns) / len(rows))
    assert 0.09 < min(shares) < 0.12 < 0.28 < max(shares) < 0.31
    assert 0.47 < min(ratios) < 0.6 < 1.8 < max(ratios) < 2.1
    assert erased.any(axis=0)[3:-3, 3:-3].all()  # it gets everywhere


def test_erasing_spares_the_images_that_chance_does_not_choose() -> None:
    images = np.full((2000, 6, 6, 1), 200, np.uint8)
    erased = random_erasing(p=0.3, scale=(0.3, 0.5))(images, drawn(2000))
    assert (erased == 0).any(axis=(1, 2, 3)).mean() == pytest.approx(0.3, abs=0.04)
    assert (random_erasing(p=0)(np.ones((9, 6, 6, 1), np.uint8), drawn(9)) == 1).all()


# Mixing


def test_mixup_blends_pixels_exactly_as_the_labels_say() -> None:
    images, labels = noise(16, 5, 6, 3), np.arange(16)
    shares = set()
    for seed in range(20):
        mixed, soft = mixup(alpha=1.0)(images.copy(), labels, 16, np.random.default_rng(seed))
        assert mixed.dtype == np.uint8
        assert soft.dtype == np.float32
        assert (soft.sum(axis=1) == 1).all()
        blend = np.tensordot(soft.astype(float), images.astype(float), axes=1)
        assert np.abs(mixed - blend).max() <= 0.5
        assert (np.count_nonzero(soft, axis=1) <= 2).all()
        shares.add(soft[soft > 0].min())
    assert len(shares) > 10


def test_cutmix_labels_say_what_share_of_the_pixels_is_whose() -> None:
    labels = np.arange(12)
    images = np.tile(labels.astype(np.uint8)[:, None, None, None], (1, 20, 30, 3))  # each pixel tells whose it is
    shares = []
    for seed in range(200):
        mixed, soft = cutmix()(images.copy(), labels, 12, np.random.default_rng(seed))
        counts = np.stack([np.bincount(image.ravel(), minlength=12) for image in mixed]) / images[0].size
        assert np.abs(counts - soft).max() < 1e-6
        foreign = (mixed != images)[..., 0].any(axis=0)
        assert foreign.sum() == foreign.any(axis=1).sum() * foreign.any(axis=0).sum()  # a rectangle
        shares.append(1 - foreign.mean())
    assert min(shares) < 0.2 < 0.9 < max(shares)
    assert np.mean(shares) == pytest.approx(0.68, abs=0.05)  # half is cut out, a third of that sticks out


@pytest.mark.parametrize("mixing", [mixup(), cutmix()])
def test_a_mixing_is_a_function_of_its_generator(mixing: Mixing) -> None:
    def mixed(position: int) -> tuple[Array, Array]:
        rng = generator(3, Purpose.MIX, 0, position)
        return mixing(noise(9, 8, 8, 1), np.arange(9) % 4, 4, rng)

    (images, soft), (again, soft_again), (others, _) = mixed(64), mixed(64), mixed(128)
    assert np.array_equal(images, again)
    assert np.array_equal(soft, soft_again)
    assert not np.array_equal(images, others)


@pytest.mark.parametrize("mixing", [mixup(), cutmix()])
def test_samples_of_one_class_keep_their_label(mixing: Mixing) -> None:
    _, soft = mixing(noise(7, 8, 8, 1), np.full(7, 2), 3, np.random.default_rng(0))
    assert np.array_equal(soft, np.tile(np.array([0, 0, 1], np.float32), (7, 1)))


@pytest.mark.parametrize("mixing", [mixup(), cutmix()])
@pytest.mark.parametrize("label", [-1, 3])
def test_labels_out_of_range_are_told(mixing: Mixing, label: int) -> None:
    with pytest.raises(ValueError, match=rf"labels must be from 0 to 2, got {min(label, 1)} to {max(label, 1)}"):
        mixing(noise(2, 8, 8, 1), np.array([1, label]), 3, np.random.default_rng(0))


# Wrong arguments


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (horizontal_flip, {"p": 1.5}, r"horizontal_flip: p must be a number from 0 to 1, got 1.5"),
        (vertical_flip, {"p": "often"}, r"vertical_flip: p must be a number from 0 to 1, got 'often'"),
        (random_crop, {"padding": -1}, r"random_crop: padding must be a number of 0 or more, got -1"),
        (random_crop, {"fill": 256}, r"random_crop: fill must be a number from 0 to 255, got 256"),
        (random_crop, {"padding": 1.5}, r"random_crop: padding must be an integer, got 1.5"),
        (random_resized_crop, {"scale": (0, 1)}, r"scale must be \(low, high\), above 0 and at most 1, got \(0, 1\)"),
        (random_resized_crop, {"scale": 0.5}, r"scale must be \(low, high\)"),
        (random_resized_crop, {"ratio": (2, 1)}, r"ratio must be \(low, high\), above 0, got \(2, 1\)"),
        (affine, {"degrees": -3}, r"affine: degrees must be a number from 0 to 360, got -3"),
        (affine, {"translate": 2}, r"affine: translate must be a number from 0 to 1, got 2"),
        (affine, {"shear": 90}, r"affine: shear must be a number from 0 to 89, got 90"),
        (affine, {"scale": (1, float("inf"))}, r"affine: scale must be \(low, high\)"),
        (color_jitter, {"contrast": float("nan")}, r"color_jitter: contrast must be a number of 0 or more, got nan"),
        (color_jitter, {"hue": 0.6}, r"color_jitter: hue must be a number from 0 to 0.5, got 0.6"),
        (random_erasing, {"scale": (0.1, 2)}, r"random_erasing: scale must be \(low, high\)"),
        (mixup, {"alpha": 0}, r"mixup: alpha must be a number above 0, got 0"),
        (cutmix, {"alpha": float("inf")}, r"cutmix: alpha must be a number above 0, got inf"),
    ],
)
def test_wrong_arguments_are_told(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        kind(**arguments)


def test_what_is_no_augmentation_cannot_be_composed() -> None:
    with pytest.raises(TypeError, match=r"compose: augmentations must be such as horizontal_flip\(\), got .*Mixup"):
        compose(horizontal_flip(), mixup())  # type: ignore[arg-type]


@pytest.mark.parametrize("augmentation", [rotation(3), random_resized_crop(), color_jitter(0.1)])
def test_a_number_of_channels_that_is_not_supported_is_told(augmentation: Augmentation) -> None:
    with pytest.raises(ValueError, match="images must have 1 or 3 channels, got 2"):
        augmentation(noise(2, 4, 4, 2), drawn(2))
