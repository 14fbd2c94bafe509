"""A folder of images as training and test data, with what its images look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high

import numpy as np
from PIL import Image

from asynctrain.data import ImageFolder
from asynctrain.data.datasets import Dataset, FileSource
from asynctrain.data.images import FORMATS, quiet_pillow
from asynctrain.errors import DataError

GREY = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L"})  # Pillow's modes without colour
LARGEST_SIDE = 64  # pixels, where the user names no size
LOOKED_AT = 32  # images


@dataclass(frozen=True, slots=True)
class Data:
    """What to train on, what to test with, and the shape (H, W, C) that every image is brought to."""

    train: Dataset
    test: Dataset
    image_shape: tuple[int, int, int]


def open_data(path: Path, holdout: float, seed: int, side: int | None) -> Data:
    """Return ``path/train`` and ``path/test`` (or ``val``) where they are, else ``path`` with a part held out.

    Blocks while it lists the folders.

    Args:
        path: the folder.
        holdout: the share of each class that is held out, between 0 and 1.
        seed: of that choice.
        side: height and width of the images; by default that of the images there, at most 64.

    Raises:
        DataError: there is no such folder, or it is not one of images in class folders, of at least two classes, with
            images enough to hold some out.
        ValueError: the test folder has other classes than the training folder.
    """
    test_folder = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    train: Dataset
    test: Dataset
    if test_folder is not None and (path / "train").is_dir():
        train, test = ImageFolder(path / "train"), open_folder(test_folder)
        require_classes(test_folder, test.classes, train.classes)
    else:
        train, test = ImageFolder(path).split(1 - holdout, seed=seed)
    if len(train.classes) < 2:
        raise DataError(path, f"holds images of one class, {train.classes[0]}; there must be two to tell apart")
    if not len(test):
        raise DataError(path, "holds one image of each class, so that none are left to test with")
    return Data(train, test, look(train, side))


def open_folder(path: Path) -> ImageFolder:
    """Return the images in class folders of ``path``, or of its ``test`` or ``val`` if it has a ``train`` too."""
    if (path / "train").is_dir():
        path = next((path / name for name in ("test", "val") if (path / name).is_dir()), path)
    return ImageFolder(path)


def require_classes(path: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise ``ValueError`` where the class folders of ``path`` are not those wanted."""
    if tuple(found) != tuple(wanted):
        raise ValueError(
            f"{path} must have the class folders {', '.join(wanted)}; it has {', '.join(found)}",
        )


def look(dataset: Dataset, side: int | None) -> tuple[int, int, int]:
    """Return the image shape (H, W, C) that suits ``dataset``, from a few of its images: grey ones need one channel."""
    images = [seen for index in _spread(len(dataset)) if (seen := _header(dataset, index))]
    channels = 1 if images and all(image.mode in GREY for image in images) else 3
    if side is None:
        side = min(LARGEST_SIDE, median_high(max(image.size) for image in images)) if images else LARGEST_SIDE
    return side, side, channels


def _spread(count: int) -> list[int]:
    """Return up to 32 indices, evenly over ``count``."""
    return sorted({int(index) for index in np.linspace(0, count - 1, min(count, LOOKED_AT))})


@dataclass(frozen=True, slots=True)
class _Header:
    mode: str
    size: tuple[int, int]


def _header(dataset: Dataset, index: int) -> _Header | None:
    """Return mode and size of one image without decoding it; None where it is broken, which training will tell."""
    source = dataset[index].source
    assert isinstance(source, FileSource)  # noqa: S101  # of an ImageFolder
    try:
        with quiet_pillow(), Image.open(source.path, formats=FORMATS) as image:
            return _Header(image.mode, image.size)
    except Exception:  # Pillow raises of all kinds at strange files
        return None
