"""Images in tar files: plain ones as datasets, compressed ones as streams."""

from __future__ import annotations

import asyncio
import bz2
import gzip
import json
import lzma
import os
import tarfile
import threading
import zlib
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import islice
from operator import index as as_index
from posixpath import basename, dirname
from typing import IO, cast

import numpy as np

from asynctrain._aio import thread_pool
from asynctrain.arena import Array
from asynctrain.data.catalog import Labels, Names, label_name
from asynctrain.data.datasets import SUFFIXES, Splitting, is_image, read_patiently
from asynctrain.data.streams import HeldSource
from asynctrain.errors import ClosedError, DataError
from asynctrain.randomness import Purpose, generator, require_seed
from asynctrain.types import Record

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_BROKEN = (tarfile.TarError, EOFError, OSError, ValueError, OverflowError, zlib.error, lzma.LZMAError)
_COMPRESSIONS: dict[bytes, Callable[[IO[bytes]], IO[bytes]]] = {
    b"\x1f\x8b": lambda file: cast("IO[bytes]", gzip.GzipFile(fileobj=file)),
    b"BZh": lambda file: cast("IO[bytes]", bz2.BZ2File(file)),
    b"\xfd7zXZ\0": lambda file: cast("IO[bytes]", lzma.LZMAFile(file)),  # noqa: SIM115 (its user closes it)
}


@dataclass(frozen=True, slots=True)
class TarSource:
    """An image within a plain tar: ``size`` bytes from ``offset`` on."""

    shard: str
    member: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the member's bytes. Blocks; raises ``ReadError``. As many threads as you like may read at once."""
        return read_patiently(self._content, str(self))

    def _content(self) -> bytes:
        # Opened for each read, as image files are: 6 us, no shared position, and no handle that could be left open.
        with open(self.shard, "rb", buffering=0) as file:  # noqa: PTH123 (a Path would double it)
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) < self.size:
            raise ValueError("the tar has become shorter since it was indexed")
        return content

    def identity(self) -> bytes | None:
        """Return what changes with the image: that of its tar, and the place in it; None without the tar. Blocks."""
        try:
            status = os.stat(self.shard)  # noqa: PTH116 (as above)
        except OSError:
            return None
        shard = os.fsencode(os.path.abspath(self.shard))  # noqa: PTH100
        return shard + f"|{status.st_size}|{status.st_mtime_ns}|{self.offset}".encode()

    def __str__(self) -> str:
        return f"{self.shard}/{self.member}"


class TarShards(Splitting):
    """Images in plain tar files, as one dataset with random access.

    Two layouts are understood. WebDataset's: members whose names are equal up to the first dot of their last part
    belong together, an image (by its suffix) and its label, a text in ``.cls`` or the value of ``"label"`` in
    ``.json``, a name or an integer. Or, where no image has such a label, the folder it lies in is its class. Members
    of other kinds and hidden ones (``.name``) do not count.

    The headers are read once, when this is created, which blocks: about 20 us a member. Kept are the names in UTF-8
    and about 36 bytes an image. Each read opens its tar for itself, so no file stays open.

    Args:
        shards: the path of a tar, or a pattern such as ``"train-*.tar"``, or several paths.
        classes: the names of the labels 0, 1, ...; by default those that occur, sorted, as numbers if all of them are.

    Raises:
        ValueError: there are no shards, or ``classes`` has a name twice.
        DataError: a shard is missing, compressed, corrupt or cut off, or it holds no images; or an image has no label,
            one that is not in ``classes``, or shares it with another image. Shard and member are named.
    """

    def __init__(self, shards: Paths, classes: Sequence[str] | None = None) -> None:
        self.shards = _paths(shards)
        index = _Index(classes)
        for shard in self.shards:
            with _plain(shard) as file:
                index.add(shard, file)
        self.classes, self.labels = index.encoded()
        self._names = index.names
        self._offsets = np.array(index.offsets, np.int64)
        self._sizes = np.array(index.sizes, np.int64)
        self._shard = np.repeat(np.arange(len(self.shards), dtype=np.int32), index.counts)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int, /) -> Record:
        index = range(len(self))[as_index(index)]
        shard = self.shards[self._shard[index]]
        source = TarSource(shard, self._names[index], int(self._offsets[index]), int(self._sizes[index]))
        return Record(source, int(self.labels[index]))

    def __repr__(self) -> str:
        return f"<TarShards of {len(self.shards)}: {len(self):,} images, {len(self.classes)} classes>"


class CompressedTarShards:
    """Images in tar files compressed by gzip, bzip2 or xz, as a stream.

    Layouts and labels are as in ``TarShards``. The shards are read through once, when this is created, which blocks
    and takes as long as decompressing them: it finds the classes, how many images there are, and whatever is broken.

    In each epoch the shards come in a random order, and the images as they come are shuffled within blocks of
    ``buffer``; both are pure functions of (seed, epoch). To begin at a position, the shard it lies in, or that its
    block began in, is read again from its start; shards before that are not touched.

    Memory: at most two blocks of encoded images, the one that is delivered and the one that is read meanwhile.

    Args:
        shards: the path of a compressed tar, or a pattern such as ``"train-*.tar.gz"``, or several paths.
        classes: as for ``TarShards``.
        seed: 0 to 2**64 - 1.
        shuffle: else shards and images come as they stand.
        buffer: how many images are shuffled together, 1 or more.

    Attributes:
        length: how many images there are.
        replayable: True: it can be opened at any epoch and position.

    Raises:
        ValueError: ``buffer`` or ``seed`` is out of range, there are no shards, or ``classes`` has a name twice.
        DataError: as for ``TarShards``, except that a shard must be compressed.
    """

    replayable = True

    def __init__(
        self,
        shards: Paths,
        classes: Sequence[str] | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
        buffer: int = 1024,
    ) -> None:
        if buffer < 1:
            raise ValueError(f"buffer must be 1 or more, got {buffer}")
        self.shards = _paths(shards)
        self.seed = require_seed(seed)
        self.shuffle = shuffle
        self.buffer = buffer
        index = _Index(classes)
        for shard in self.shards:
            with _decompressed(shard) as file:
                index.add(shard, file)
        self.classes, labels = index.encoded()
        self.length = len(labels)
        self._labels = np.split(labels, np.cumsum(index.counts)[:-1])  # those of each shard, in its order

    def open(self, epoch: int, position: int) -> AbstractAsyncContextManager[AsyncIterator[Record]]:
        """Open the records of ``epoch`` from ``position`` on, read in a thread of its own.

        Raises:
            ValueError: ``epoch`` is negative, or ``position`` not 0 to ``length``.
            DataError: while iterating: a shard cannot be read, or has changed since it was indexed.
            ClosedError: while iterating: the block has ended.
        """
        if epoch < 0 or not 0 <= position <= self.length:
            raise ValueError(
                f"epoch must be 0 or more and position 0 to {self.length}, got epoch {epoch}, position {position}"
            )
        return self._opened(epoch, position)

    @asynccontextmanager
    async def _opened(self, epoch: int, position: int) -> AsyncIterator[AsyncIterator[Record]]:
        stopping = threading.Event()
        # A generator cannot be closed while it runs, and the pool's end waits for that: the order matters.
        with closing(self._blocks(epoch, position, stopping)) as blocks:
            async with thread_pool(1, "untar") as thread:
                records = _Blocks(blocks, thread)
                try:
                    yield records
                finally:
                    records.close()
                    stopping.set()

    def _blocks(self, epoch: int, position: int, stopping: threading.Event) -> Generator[list[Record], None, None]:
        """Yield the records of each block from the one that ``position`` is in, without those before it."""
        first = position - position % self.buffer
        order = range(len(self.shards))
        if self.shuffle:
            order = generator(self.seed, Purpose.ORDER, epoch).permutation(len(self.shards)).tolist()
        with closing(self._images(order, first, stopping)) as images:
            for start in range(first, self.length, self.buffer):
                block = list(islice(images, self.buffer))
                if stopping.is_set():
                    return
                if self.shuffle:
                    number = 1 + start // self.buffer  # 0 keys the order of the shards
                    block = [
                        block[i] for i in generator(self.seed, Purpose.ORDER, epoch, number).permutation(len(block))
                    ]
                yield block[max(position - start, 0) :]
            next(images, None)  # nothing, unless the last shard has changed: it is read to its end

    def _images(self, order: Sequence[int], skip: int, stopping: threading.Event) -> Generator[Record, None, None]:
        """Yield the images of the shards in that order, without the first ``skip``, until ``stopping`` is set."""
        for shard in order:
            count = len(self._labels[shard])
            if skip < count:
                yield from self._images_of(shard, skip, stopping)
            skip = max(skip - count, 0)

    def _images_of(self, shard: int, skip: int, stopping: threading.Event) -> Generator[Record, None, None]:
        path, labels = self.shards[shard], self._labels[shard]
        number = 0
        with _decompressed(path) as file, closing(_members(file, path)) as members:
            for tar, member in members:
                if stopping.is_set():
                    return
                if not _counts_as_image(member.name):
                    continue
                if skip <= number < len(labels):
                    yield Record(HeldSource(_content(tar, member), f"{path}/{member.name}"), int(labels[number]))
                number += 1
        if number != len(labels):
            raise DataError(path, f"has changed: it held {len(labels)} images when it was indexed, and now {number}")

    def __repr__(self) -> str:
        return f"<CompressedTarShards of {len(self.shards)}: {self.length:,} images, {len(self.classes)} classes>"


class _Blocks(AsyncIterator[Record]):
    """The records of blocks, of which the next one is read in ``thread`` while one is delivered."""

    def __init__(self, blocks: Iterator[list[Record]], thread: ThreadPoolExecutor) -> None:
        self._blocks = blocks
        self._thread = thread
        self._ready: deque[Record] = deque()
        self._ahead = self._begun()
        self._closed = False

    def _begun(self) -> asyncio.Future[list[Record]]:
        none: list[Record] = []
        return asyncio.get_running_loop().run_in_executor(self._thread, next, self._blocks, none)

    async def __anext__(self) -> Record:
        while not self._ready:
            await asyncio.wait([self._ahead])  # so that a cancelled wait does not cancel the reading
            if self._closed:
                raise ClosedError("the records of compressed tar shards were used after their block had ended")
            block = self._ahead.result()
            if not block:
                raise StopAsyncIteration
            self._ready.extend(block)
            self._ahead = self._begun()
        return self._ready.popleft()

    def close(self) -> None:
        """Drop what was read ahead."""
        self._closed = True
        self._ready.clear()
        self._ahead.cancel()


class _Index:
    """What is kept of each image: its name and place, and its label, which may stand before or after it.

    The first shard with an image decides for all whether labels are members or folders.
    """

    def __init__(self, classes: Sequence[str] | None) -> None:
        self.names = Names()
        self.offsets = array("q")
        self.sizes = array("q")
        self.counts: list[int] = []  # images in each shard
        self._labels = Labels(classes)
        self._by_folder: bool | None = None

    def add(self, shard: str, file: IO[bytes]) -> None:
        """Read through a shard."""
        labels: dict[str, str] = {}
        images: list[str] = []
        for tar, member in _members(file, shard):
            key, kind = _key(member.name)
            if _counts_as_image(member.name):
                images.append(member.name)
                self.offsets.append(member.offset_data)
                self.sizes.append(member.size)
            elif kind == "cls" or (kind == "json" and key not in labels):
                label = _label(tar, member, f"{shard}/{member.name}")
                if label is not None:
                    labels[key] = label
        self.counts.append(len(images))
        self._label(shard, images, labels)

    def _label(self, shard: str, images: list[str], labels: dict[str, str]) -> None:
        if images and self._by_folder is None:
            self._by_folder = not labels
        if self._by_folder is False:
            found = _by_member(shard, images, labels)
        elif labels:
            raise DataError(shard, f"has labels ({min(labels)}.cls or .json), though the shards before it have none")
        else:
            found = [_by_folder(shard, image) for image in images]
        for image, label in zip(images, found, strict=True):
            try:
                self._labels.append(label)
            except ValueError as error:
                raise DataError(f"{shard}/{image}", str(error)) from error
            self.names.append(image)
        if not images:
            raise DataError(shard, f"holds no image ({', '.join(sorted(SUFFIXES))})")

    def encoded(self) -> tuple[tuple[str, ...], Array]:
        """Return the classes and the labels, (len,) int64."""
        return self._labels.encoded()


def _by_member(shard: str, images: list[str], labels: dict[str, str]) -> list[str]:
    """Return the label of each image; each label belongs to exactly one."""
    left = dict(labels)
    found = []
    for image in images:
        key, _ = _key(image)
        if key not in left:
            reason = "shares its label with another image" if key in labels else "has no label: no .cls, no .json"
            raise DataError(f"{shard}/{image}", reason)
        found.append(left.pop(key))
    if left:
        raise DataError(f"{shard}/{min(left)}", f"has a label but no image ({', '.join(sorted(SUFFIXES))})")
    return found


def _by_folder(shard: str, image: str) -> str:
    folder = basename(dirname(image))
    if folder in ("", ".", ".."):
        raise DataError(f"{shard}/{image}", "has no label: no .cls, no .json, and it lies in no folder")
    return folder


def _key(name: str) -> tuple[str, str]:
    """Return a member's name up to the first dot of its last part, and what follows the dot in lower case."""
    stem, _, kind = basename(name).partition(".")
    return f"{dirname(name)}/{stem}", kind.lower()


def _counts_as_image(name: str) -> bool:
    """Whether it is an image's name, and neither it nor a folder it lies in is hidden."""
    return is_image(basename(name)) and not any(
        part.startswith(".") and part not in (".", "..") for part in dirname(name).split("/")
    )


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> str | None:
    """Return the label that a ``.cls`` or ``.json`` member holds; None if the JSON says nothing about it."""
    try:
        text = _content(tar, member).decode()
        value = text if name.lower().endswith(".cls") else _value(json.loads(text))
        return None if value is None else label_name(value)
    except (ValueError, RecursionError) as error:
        raise DataError(name, f"is no label: {error}") from error


def _value(described: object) -> object:
    return described.get("label") if isinstance(described, dict) else None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # noqa: S101 - it is a regular file
    return file.read()


def _members(file: IO[bytes], shard: str) -> Generator[tuple[tarfile.TarFile, tarfile.TarInfo], None, None]:
    """Yield the regular members; raises ``DataError`` where the tar is broken, cut off, or hides an image in a link.

    ``tarfile`` itself takes a broken header within the tar for its end, so what it found there is looked at here.
    """
    watched = _Watched(file)
    with _translated(shard), tarfile.open(fileobj=cast("IO[bytes]", watched), mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep them all
            if member.isreg() and not member.issparse():
                yield tar, member
            elif _counts_as_image(member.name) and not member.isdir():
                raise DataError(f"{shard}/{member.name}", "is a link or has holes; pack plain files (tar -h)")
        if len(watched.last) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it is cut off")
        if any(watched.last):
            raise tarfile.ReadError("a header within it is broken")
        _require_end(file)


class _Watched:
    """A file that remembers what was read last."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek = file.seek
        self.tell = file.tell
        self.last = b""

    def read(self, size: int) -> bytes:
        """Return the next ``size`` bytes, fewer at the end."""
        self.last = self._file.read(size)
        return self.last


def _require_end(file: IO[bytes]) -> None:
    """Read the rest, which is nothing but padding; a decompressor then checks its checksum."""
    while rest := file.read(1 << 20):
        if any(rest):
            raise tarfile.ReadError("something follows its end; tars cannot be put together with cat")


@contextmanager
def _translated(shard: str) -> Iterator[None]:
    """Turn whatever a broken file may raise into a ``DataError`` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(shard, "no such file") from error
    except _BROKEN as error:
        raise DataError(shard, f"cannot be read as a tar: {str(error) or type(error).__name__}") from error


@contextmanager
def _plain(shard: str) -> Iterator[IO[bytes]]:
    with _translated(shard), open(shard, "rb") as file:  # noqa: PTH123 (shards are plain strings)
        if _compression(file) is not None:
            raise DataError(shard, "is compressed: read it as a stream, by CompressedTarShards")
        yield file


@contextmanager
def _decompressed(shard: str) -> Iterator[IO[bytes]]:
    with _translated(shard), open(shard, "rb") as file:  # noqa: PTH123 (as above)
        decompress = _compression(file)
        if decompress is None:
            raise DataError(shard, "is not compressed by gzip, bzip2 or xz; a plain tar is read by TarShards")
        with decompress(file) as content:
            yield content


def _compression(file: IO[bytes]) -> Callable[[IO[bytes]], IO[bytes]] | None:
    beginning = file.read(6)
    file.seek(0)
    return next((opened for magic, opened in _COMPRESSIONS.items() if beginning.startswith(magic)), None)


def _paths(shards: Paths) -> tuple[str, ...]:
    if isinstance(shards, (str, os.PathLike)):
        pattern = os.fspath(shards)
        found = sorted(glob(pattern)) if has_magic(pattern) else [pattern]  # noqa: PTH207 (paths stay plain strings)
        if not found:
            raise DataError(pattern, "matches no file")
        return tuple(found)
    if not shards:
        raise ValueError("shards must be one or more paths, got none")
    return tuple(os.fspath(shard) for shard in shards)
