"""Decoded images, kept for later epochs: in memory, or in files that outlive the process.

A cache holds rows, each the uint8 pixels of one image as some ``ImageSettings`` made them. A row belongs to a *tag*: a
digest of what the image's source says of its identity (a file's path, size and time of modification), of the settings
and of the decoder's version. A changed file or another setting is another tag, so nothing in a cache is ever out of
date; it is only no longer asked for. Datasets, splits and orders that have images in common share their rows.

Rows lie in *segments*. A segment has a place for each of a fixed set of tags, decided when it is made; whoever opens a
dataset makes one for the tags that have no place yet. Each row has a *mark*, zero until the row is written and then a
checksum of its pixels and its tag, and a row counts only if its mark fits. So there is nothing to lock and nothing to
repair: a row that was half written when the process was killed or the power failed, or that another process is writing
at this moment, is simply missing. The checksum takes no longer than copying the row (0.4 us for 64 x 64 x 3); waiting
for the disk before a row may count, the other way to survive a power cut, would hold up decoding.
"""

from __future__ import annotations

import json
import mmap
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import BinaryIO, Protocol

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.data.datasets import Dataset
from asynctrain.data.images import ImageSettings, decoder_fingerprint
from asynctrain.errors import ClosedError, DataError

FORMAT = "asynctrain decoded images"
VERSION = 1  # of the file's layout and of what tags and marks are made of
PAGE = 4096  # bytes; each part of a file begins at a multiple of it

_TAG = np.dtype("S16")  # sorts and compares as 16 bytes would; all zero for an image that has no identity
_MARK = np.dtype("<u8")


class Cache(Protocol):
    """What a loader needs of a cache."""

    def open(self, dataset: Dataset, settings: ImageSettings, stopping: threading.Event | None = None) -> CacheRows:
        """Return the rows of ``dataset``'s images, as ``settings`` make them.

        Blocks: every image's identity is looked up, about 0.3 s for 60,000 files. What has changed on disk since is
        noticed at the next opening.

        Args:
            dataset: whose images. A source without ``identity() -> bytes | None``, or that returns None, is never kept.
            settings: how they are decoded.
            stopping: leave off as soon as this is set.

        Raises:
            ClosedError: ``stopping`` was set.
            DataError: a file of the cache cannot be made, read or used, its path in the error.
        """
        ...


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """How an opened cache fares.

    Attributes:
        samples: images in the dataset.
        places: how many of them have a place: those that have an identity and are not beyond the budget.
        held: how many of them are there.
        hits: images that were found, since the opening.
        misses: images that were not.
    """

    samples: int
    places: int
    held: int
    hits: int
    misses: int


class CacheRows:
    """The cached images of one dataset, by the dataset's indices; for any number of threads at once."""

    def __init__(self, tags: Array, segments: Iterable[_Segment], shape: Shape) -> None:
        self._shape = shape
        self._segments: list[_Segment] = []
        self._segment = np.full(len(tags), -1, np.intp)  # where each image has its place; -1: it has none
        self._slot = np.zeros(len(tags), np.intp)
        for segment in segments:
            self._add(segment, tags)
        self._hits = self._misses = 0
        self._lock = threading.Lock()
        self._closed = False

    def _add(self, segment: _Segment, tags: Array) -> None:
        slots, found = segment.find(tags)
        if found.any():
            self._segment[found] = len(self._segments)
            self._slot[found] = slots[found]
            self._segments.append(segment)

    def get(self, indices: Array, out: Array) -> Array:
        """Copy the images that are here, and return which are missing: (n,) bool.

        Args:
            indices: (n,) integers, of samples of the dataset.
            out: (n, H, W, C) uint8, C-contiguous; what the rows of missing images hold afterwards is undefined.
        """
        self._require_fitting(indices, out, "out")
        segments, slots = self._segment[indices], self._slot[indices]
        missing = np.ones(len(indices), np.bool_)
        for number, segment in enumerate(self._segments):
            rows = np.flatnonzero(segments == number)
            rows = rows[segment.marks[slots[rows]] != 0]
            if rows.size:
                missing[rows] = ~segment.read(slots[rows], out, rows)
        misses = int(np.count_nonzero(missing))
        with self._lock:
            self._hits += len(indices) - misses
            self._misses += misses
        return missing

    def put(self, indices: Array, images: Array) -> None:
        """Keep decoded images; those that have no place here are passed over.

        Args:
            indices: (n,) integers, of samples of the dataset.
            images: (n, H, W, C) uint8, what decoding these samples gave.
        """
        self._require_fitting(indices, images, "images")
        segments, slots = self._segment[indices], self._slot[indices]
        for number, segment in enumerate(self._segments):
            rows = np.flatnonzero(segments == number)
            if rows.size:
                segment.write(slots[rows], images[rows])

    def _require_fitting(self, indices: Array, images: Array, name: str) -> None:
        if self._closed:
            raise ClosedError("the rows of a cache were used after they had been closed")
        expected = (len(indices), *self._shape)
        if images.shape != expected or images.dtype != np.uint8:
            raise ValueError(f"{name} must be {expected} of uint8, got {images.shape} of {images.dtype}")

    def statistics(self) -> CacheStatistics:
        """Return how many images are held and were found."""
        held = sum(
            int(np.count_nonzero(segment.marks[self._slot[self._segment == number]]))
            for number, segment in enumerate(self._segments)
        )
        places = int(np.count_nonzero(self._segment >= 0))
        return CacheStatistics(len(self._slot), places, held, self._hits, self._misses)

    def close(self) -> None:
        """Let go of memory and files; nobody may be reading or writing any more. What was put stays in the cache."""
        self._closed = True
        self._segments = []

    def __enter__(self) -> CacheRows:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            return "<CacheRows: closed>"
        now = self.statistics()
        left_out = f", no place for {now.samples - now.places:,}" if now.places < now.samples else ""
        return (
            f"<CacheRows: {now.held:,} of {now.samples:,} images held{left_out}; "
            f"{now.hits:,} hits, {now.misses:,} misses>"
        )


class MemoryCache:
    """Keeps decoded images in memory, for as long as this object lives; whatever is opened shares it.

    Memory is taken as rows are filled. When the budget is spent, further images have no place and are decoded in each
    epoch: those that were opened first keep theirs.

    Args:
        budget: bytes of pixels, 1 or more; 60,000 images of 28 x 28 x 1 are 47 MB, of 64 x 64 x 3 are 737 MB.
    """

    def __init__(self, budget: int) -> None:
        if not isinstance(budget, int | np.integer):
            raise TypeError(f"budget must be an integer, a number of bytes, got {budget!r}")
        if budget < 1:
            raise ValueError(f"budget must be 1 or more bytes, got {budget}")
        self.budget = int(budget)
        self._segments: dict[bytes, list[_Segment]] = {}  # by the key of their settings
        self._lock = threading.Lock()

    @property
    def reserved(self) -> int:
        """Bytes of the budget that have been given to rows, filled or not."""
        return sum(segment.rows.nbytes for segments in self._segments.values() for segment in segments)

    def open(self, dataset: Dataset, settings: ImageSettings, stopping: threading.Event | None = None) -> CacheRows:
        """Return the rows of ``dataset``'s images, as ``settings`` make them: see ``Cache.open``."""
        key = _key(settings)
        tags = _tags(dataset, key, stopping)
        with self._lock:
            segments = self._segments.setdefault(key, [])
            without = _without_place(tags, segments)[: (self.budget - self.reserved) // prod(settings.shape)]
            if without.size:
                pixels = np.empty((len(without), *settings.shape), np.uint8)
                segments.append(_Segment(without, np.zeros(len(without), _MARK), pixels))
            return CacheRows(tags, segments, settings.shape)

    def __repr__(self) -> str:
        return f"<MemoryCache: {self.reserved:,} of {self.budget:,} bytes given out>"


class FileCache:
    """Keeps decoded images in memory-mapped files, for later runs and for other processes at the same time.

    Each file gets its full size on disk when it is made. Files are made and never deleted: what is in the folder can be
    deleted at any time, and is decoded again when it is next needed. A file that is cut short while it is in use ends
    the process that uses it, as is the way of mapped memory.

    Args:
        folder: where the files are; made if it is not there. On a local disk, best.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def open(self, dataset: Dataset, settings: ImageSettings, stopping: threading.Event | None = None) -> CacheRows:
        """Return the rows of ``dataset``'s images, as ``settings`` make them: see ``Cache.open``."""
        key = _key(settings)
        tags = _tags(dataset, key, stopping)
        segments = [_map(path, settings) for path in sorted(self.folder.glob(f"{key.hex()}-*.rows"))]
        without = _without_place(tags, segments)
        if without.size:
            path = self.folder / f"{key.hex()}-{blake2b(without.tobytes(), digest_size=8).hexdigest()}.rows"
            _create(path, without, settings)
            segments.append(_map(path, settings))
        return CacheRows(tags, segments, settings.shape)

    def __repr__(self) -> str:
        return f"FileCache({str(self.folder)!r})"


class _Segment:
    """Rows of a fixed set of tags.

    Args:
        tags: (n,) of 16 bytes, ascending and each once; slot i is that of the i-th.
        marks: (n,) uint64, zero where nothing is written yet.
        rows: (n, H, W, C) uint8.
    """

    def __init__(self, tags: Array, marks: Array, rows: Array) -> None:
        self.tags = tags
        self.marks = marks
        self.rows = rows
        words = -(-prod(rows.shape[1:]) // _MARK.itemsize)
        self._weights = np.random.Philox(key=VERSION).random_raw(words).astype(_MARK) | _MARK.type(1)
        self._salts = np.frombuffer(tags.tobytes(), _MARK)[::2]  # the first half of each tag

    def find(self, tags: Array) -> tuple[Array, Array]:
        """Return for each tag its slot, and whether it has one."""
        slots = np.minimum(np.searchsorted(self.tags, tags), len(self.tags) - 1)
        return slots, self.tags[slots] == tags

    def read(self, slots: Array, out: Array, where: Array) -> Array:
        """Copy rows into ``out[where]``, (n,) ascending, and return which of them are whole: (n,) bool."""
        target = out if len(where) == len(out) else np.empty((len(where), *out.shape[1:]), np.uint8)
        np.take(self.rows, slots, axis=0, out=target, mode="clip")  # "raise", the default, would copy twice
        if target is not out:
            out[where] = target
        whole: Array = self.marks[slots] == self._marks_of(slots, target)
        return whole

    def write(self, slots: Array, images: Array) -> None:
        """Write rows, and then their marks."""
        self.rows[slots] = images
        self.marks[slots] = self._marks_of(slots, images)

    def _marks_of(self, slots: Array, images: Array) -> Array:
        """Return the marks of rows with these pixels, never zero.

        The pixels are taken as 64-bit words, each multiplied by a random odd weight of its place, and added up
        (multilinear hashing): any change of a single word shows for certain, other changes but for a tiny chance.
        """
        pixels = images.reshape(len(images), -1)
        if short := -pixels.shape[1] % _MARK.itemsize:
            pixels = np.pad(pixels, ((0, 0), (0, short)))
        sums = np.einsum("ij,j->i", pixels.view(_MARK), self._weights)
        marks: Array = np.maximum(sums ^ self._salts[slots], _MARK.type(1))
        return marks


def _key(settings: ImageSettings) -> bytes:
    """Return 8 bytes that differ where the decoded pixels, or what may be decoded at all, could."""
    content = json.dumps([VERSION, settings.to_json(), decoder_fingerprint(settings)], sort_keys=True)
    return blake2b(content.encode(), digest_size=8).digest()


def _tags(dataset: Dataset, key: bytes, stopping: threading.Event | None) -> Array:
    """Return the tag of each image: (n,) of 16 bytes."""
    tags = np.zeros(len(dataset), _TAG)
    for index in range(len(dataset)):
        if stopping is not None and stopping.is_set():
            raise ClosedError("the opening of a cache was stopped")
        identify = getattr(dataset[index].source, "identity", None)
        identity = identify() if identify is not None else None
        if identity is not None:
            tags[index] = blake2b(identity, key=key, digest_size=_TAG.itemsize).digest()
    return tags


def _without_place(tags: Array, segments: Iterable[_Segment]) -> Array:
    """Return the tags that no segment has a place for, ascending and each once."""
    without = np.unique(tags[tags != b""])
    for segment in segments:
        without = without[~segment.find(without)[1]]
    return without


# The file of a segment: a page with the header, JSON and zeros; the tags; the marks; the rows; each from a new page on.


def _create(path: Path, tags: Array, settings: ImageSettings) -> None:
    """Make the file of a segment up to its tags, unless another process is the first to."""
    header = {"format": FORMAT, "version": VERSION, "rows": len(tags), "settings": dict(settings.to_json())}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as temporary:
            try:
                temporary.write(json.dumps(header).encode().ljust(PAGE, b"\0") + tags.tobytes())
                temporary.flush()
                os.fsync(temporary.fileno())  # or a power cut could leave the name without the content
                _publish(Path(temporary.name), path)
            finally:
                Path(temporary.name).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(path, f"cannot be made: {error.strerror or error}") from error


def _publish(temporary: Path, path: Path) -> None:
    """Give a file its name, if that is still free."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        pass
    except OSError:  # no hard links here: of two processes the later one wins, and the other's rows go with it
        temporary.replace(path)


def _map(path: Path, settings: ImageSettings) -> _Segment:
    """Map the file of a segment into memory."""
    try:
        with path.open("r+b") as file:
            tags = _read_tags(file, path, settings)
            marks_at = PAGE + _pages(tags.nbytes)
            rows_at = marks_at + _pages(len(tags) * _MARK.itemsize)
            size = rows_at + len(tags) * prod(settings.shape)
            _allocate(file, size, path)
            memory = mmap.mmap(file.fileno(), size)  # unmapped with the last array that lies in it
    except OSError as error:
        raise DataError(path, f"cannot be used: {error.strerror or error}") from error
    marks = np.frombuffer(memory, _MARK, len(tags), marks_at)
    rows = np.frombuffer(memory, np.uint8, len(tags) * prod(settings.shape), rows_at)
    return _Segment(tags, marks, rows.reshape(-1, *settings.shape))


def _read_tags(file: BinaryIO, path: Path, settings: ImageSettings) -> Array:
    """Return the tags of a segment's file, or raise ``DataError`` if it is none."""
    try:
        header = json.loads(file.read(PAGE).rstrip(b"\0"))
        expected = {"format": FORMAT, "version": VERSION, "rows": header["rows"], "settings": dict(settings.to_json())}
        tags = np.frombuffer(file.read(header["rows"] * _TAG.itemsize), _TAG)
        sound = header == expected and len(tags) == header["rows"] > 0 and bool((tags[:-1] < tags[1:]).all())
    except (ValueError, TypeError, KeyError):
        sound = False
    if not sound:
        raise DataError(path, "is no file of this cache, or a damaged one; delete it to have it made anew")
    return tags


def _allocate(file: BinaryIO, size: int, path: Path) -> None:
    """Give a file its full size on disk: writing to mapped memory that the disk has no room for kills the process."""
    try:
        if hasattr(os, "posix_fallocate"):
            if os.fstat(file.fileno()).st_blocks * 512 < size:
                os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.seek(0, os.SEEK_END)
            while (lacking := size - file.tell()) > 0:
                file.write(bytes(min(lacking, 1 << 20)))
            file.flush()
    except OSError as error:
        path.unlink(missing_ok=True)  # with what room it did get
        raise DataError(path, f"cannot be given its {size:,} bytes: {error.strerror or error}") from error


def _pages(size: int) -> int:
    """Return ``size`` rounded up to whole pages."""
    return -(-size // PAGE) * PAGE
