"""Datasets: random access to labelled images that are not yet read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import index as as_index
from pathlib import Path
from typing import Protocol

import numpy as np

from asynctrain.arena import Array
from asynctrain.errors import DataError, ReadError
from asynctrain.randomness import Purpose, generator
from asynctrain.types import Record

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


class Dataset(Protocol):
    """What a loader needs of a dataset; derive from ``Splitting`` to get ``split`` as well."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels 0, 1, ..."""
        ...

    @property
    def labels(self) -> Array:
        """The label of every record, (len,) int64, without reading any."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Record: ...


TRIES = 3
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)


def read_patiently(read: Callable[[], bytes], name: str) -> bytes:
    """Return ``read()``, called again at once, three times in all, while it raises an ``OSError`` that may pass.

    Such are an input/output error or a stale handle of a network disk. What will not pass is raised the first time: no
    such file, no permission, a folder in its place, a name that no file can have (``ValueError``).

    Raises:
        ReadError: with ``name`` and the reason; what ``read`` raised last is its cause.
    """
    failures = 0
    while True:
        try:
            return read()
        except (OSError, ValueError) as error:
            failures += 1
            if failures == TRIES or isinstance(error, _LASTING):
                raise ReadError(name, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error


@dataclass(frozen=True, slots=True)
class FileSource:
    """An image file."""

    path: str

    def read(self) -> bytes:
        """Return the file's bytes. Blocks; raises ``ReadError``, after three tries where the cause may pass."""
        return read_patiently(self._content, self.path)

    def _content(self) -> bytes:
        with open(self.path, "rb", buffering=0) as file:  # noqa: PTH123 (at 6 us a file, a Path would double it)
            return file.read()

    def identity(self) -> bytes | None:
        """Return what changes with the file: path, size and time of modification; None if it is not there. Blocks."""
        try:
            status = os.stat(self.path)  # noqa: PTH116 (as above)
        except OSError:
            return None
        return os.fsencode(os.path.abspath(self.path)) + f"|{status.st_size}|{status.st_mtime_ns}".encode()  # noqa: PTH100

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True, eq=False)
class ArraySource:
    """An image that is already an array; ``name`` says which."""

    image: Array
    name: str

    def read(self) -> Array:
        """Return the array itself: (H, W) or (H, W, C) uint8."""
        return self.image

    def identity(self) -> None:
        """Return None: what is decoded already need not be kept."""

    def __str__(self) -> str:
        return self.name


class Splitting:
    """Gives a dataset its ``split``."""

    def split(self: Dataset, fraction: float, seed: int = 0) -> tuple[Subset, Subset]:
        """Divide the records at random into two parts with the same mix of classes.

        The division is a pure function of the labels, ``fraction`` and ``seed``. Of a class with n records the first
        part gets about ``fraction * n``, but both parts get at least one if there are two or more.

        Args:
            fraction: the share of the first part, between 0 and 1, both excluded.
            seed: 0 to 2**64 - 1.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1, both excluded, got {fraction}")
        rng = generator(seed, Purpose.SPLIT)
        chosen = np.zeros(len(self), dtype=np.bool_)
        for members in _by_class(self.labels):
            count = min(max(round(fraction * len(members)), 1), max(len(members) - 1, 1))
            chosen[rng.permutation(members)[:count]] = True
        return Subset(self, np.flatnonzero(chosen)), Subset(self, np.flatnonzero(~chosen))


def _by_class(labels: Array) -> Iterator[Array]:
    """Yield the indices of each class that has any, classes and indices ascending."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order])) + 1
    yield from np.split(order, starts)


class Subset(Splitting):
    """Some records of another dataset.

    Args:
        dataset: where they come from.
        indices: (len,) integers, each 0 to ``len(dataset) - 1``; may repeat.
    """

    def __init__(self, dataset: Dataset, indices: Array | Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = np.asarray(indices, dtype=np.int64)
        if self.indices.ndim != 1:
            raise ValueError(f"indices must have one dimension, got {self.indices.ndim}")
        if len(self.indices) and not 0 <= self.indices.min() <= self.indices.max() < len(dataset):
            raise ValueError(
                f"indices must be between 0 and {len(dataset) - 1}, got {self.indices.min()} to {self.indices.max()}"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the whole dataset, whether or not the subset has all of them."""
        return self.dataset.classes

    @property
    def labels(self) -> Array:
        """(len,) int64."""
        return self.dataset.labels[self.indices]

    @property
    def in_flight(self) -> int:
        """How many records to read at once, if the dataset has something to say about that, else ``AttributeError``."""
        return self.dataset.in_flight  # type: ignore[attr-defined, no-any-return]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Record:
        return self.dataset[int(self.indices[index])]

    def __repr__(self) -> str:
        return f"<Subset: {len(self):,} of {self.dataset!r}>"


class ImageFolder(Splitting):
    """Image files in a folder per class: ``path/rose/1.jpg``, ``path/tulip/spring/2.png``, ...

    Classes are the names of the folders directly in ``path``, sorted; files are sorted by their name within the class,
    folders in between included. Files of other kinds, hidden files and hidden folders (``.name``) do not count, and
    links to folders inside a class are not followed. The folder is listed once, when this is created, which blocks:
    about 0.1 s for 60,000 files; a program that must stay responsive does it in a thread:
    ``await asyncio.to_thread(ImageFolder, path)``.

    Args:
        path: the folder that holds the class folders.

    Raises:
        DataError: ``path`` is missing or no folder, holds no class folders, or a class has no image.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.classes: tuple[str, ...] = tuple(_class_folders(Path(path)))
        self._files: list[str] = []  # within the class folder; the class is known from the label
        counts = []
        for name in self.classes:
            files = _image_files(os.path.join(self.path, name))  # noqa: PTH118 (the names stay plain strings)
            counts.append(len(files))
            self._files += files
        self.labels: Array = np.repeat(np.arange(len(counts), dtype=np.int64), counts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int, /) -> Record:
        file = self._files[as_index(index)]
        label = int(self.labels[index])
        return Record(FileSource(os.path.join(self.path, self.classes[label], file)), label)  # noqa: PTH118 (as above)

    def __repr__(self) -> str:
        return f"<ImageFolder {self.path}: {len(self):,} images, {len(self.classes)} classes>"


def _class_folders(path: Path) -> list[str]:
    """Return the sorted names of the folders in ``path``."""
    if not path.exists():
        raise DataError(path, "no such folder")
    if not path.is_dir():
        raise DataError(path, "is not a folder")
    entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
    if not entries:
        raise DataError(path, "is empty; expected a folder of images per class")
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise DataError(path, "holds no class folders; expected a folder of images per class")
    return names


def _image_files(folder: str) -> list[str]:
    """Return the sorted names of the images in ``folder`` and below, relative to it."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = "" if parent == folder else os.path.relpath(parent, folder) + os.sep
        files += [inside + name for name in names if is_image(name)]
    if not files:
        raise DataError(folder, f"holds no image ({', '.join(sorted(SUFFIXES))})")
    return sorted(files)


def is_image(name: str) -> bool:
    """Whether a file of this name, without folders, counts as an image: by its suffix, and it is not hidden."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")  # noqa: PTH122 (60,000 calls)


class ArrayDataset(Splitting):
    """Images and labels that are arrays already; nothing is copied.

    Args:
        images: (N, H, W) or (N, H, W, C) uint8, C being 1, 3 or 4.
        labels: (N,) integers, each 0 to ``len(classes) - 1``.
        classes: the names of the labels; by default "0", "1", ... up to the largest label.
        weights: (N,) numbers of at least 0, how much each image counts in the loss; by default 1.
    """

    def __init__(
        self,
        images: Array,
        labels: Array | Sequence[int],
        classes: Sequence[str] | None = None,
        weights: Array | Sequence[float] | None = None,
    ) -> None:
        self.images = _checked_images(images)
        self.labels: Array = _checked_labels(labels, len(images))
        self.weights: Array | None = None if weights is None else _checked_weights(weights, len(images))
        highest = int(self.labels.max(initial=-1))
        self.classes = tuple(classes) if classes is not None else tuple(str(label) for label in range(highest + 1))
        if highest >= len(self.classes) or self.labels.min(initial=0) < 0:
            raise ValueError(
                f"labels must be between 0 and {len(self.classes) - 1}, got {self.labels.min()} to {highest}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int, /) -> Record:
        weight = 1.0 if self.weights is None else float(self.weights[index])
        return Record(ArraySource(self.images[index], f"array[{index}]"), int(self.labels[index]), weight)

    def __repr__(self) -> str:
        return f"<ArrayDataset: {len(self):,} images, {len(self.classes)} classes>"


def _checked_images(images: object) -> Array:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        raise TypeError(f"images must be an array of uint8, got {_kind(images)}")
    if images.ndim != 3 and (images.ndim != 4 or images.shape[3] not in (1, 3, 4)):
        raise ValueError(f"images must have the shape (N, H, W) or (N, H, W, 1, 3 or 4), got {images.shape}")
    return images


def _checked_labels(labels: Array | Sequence[int], count: int) -> Array:
    labels = np.asarray(labels)
    if labels.size and labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers, got {_kind(labels)}")
    if labels.shape != (count,):
        raise ValueError(f"labels must have the shape ({count},), one for each image, got {labels.shape}")
    return labels.astype(np.int64)


def _checked_weights(weights: Array | Sequence[float], count: int) -> Array:
    weights = np.asarray(weights, dtype=np.float32)
    if weights.shape != (count,):
        raise ValueError(f"weights must have the shape ({count},), one for each image, got {weights.shape}")
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        raise ValueError(f"weights must be finite and at least 0, got {weights[wrong][0]}")
    return weights


def _kind(value: object) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
