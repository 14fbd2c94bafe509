"""The journey of a chunk: planned, read, decoded into its slab, assembled to a batch.

A chunk is some neighbouring positions of an epoch. Handing work to a thread costs 35-90 us, as much as decoding a
small image, so it is chunks, not samples, that travel through the queues. A slab is the memory of as many positions as
a batch has samples, or several batches where a chunk spans them; its chunks are decoded into it in place. While every
image is good, its rows simply become batches. Where some are skipped, batches are put together from the good rows of
several slabs, so that they stay full.

The functions here are synchronous; ``loader`` moves the chunks between threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np

from asynctrain.arena import Array, Shape, aligned_empty
from asynctrain.data.augment import Augmentation, Draws
from asynctrain.data.datasets import Dataset
from asynctrain.data.fetching import is_async
from asynctrain.data.images import ImageSettings, decode, quiet_pillow
from asynctrain.data.sampler import Order
from asynctrain.errors import DataError, TooManyBadSamples
from asynctrain.types import Batch, Cursor, Record, Skipped

if TYPE_CHECKING:
    from asynctrain.data.cache import CacheRows

CHUNK_SECONDS = 0.020  # of work in a chunk: long against a hop, short against an epoch's end and a cancellation
CHUNK_LIMIT = 512  # samples, or fewer if their pixels take more than
CHUNK_BYTES = 8 * 2**20
TINY = 4096  # bytes


class ChunkSize:
    """How many samples a chunk has: a fixed number, or what keeps a thread busy for about 20 ms, up to ``limit``.

    It decides when work is handed over, never what comes out.
    """

    def __init__(self, size: int | None, first: int, limit: int) -> None:
        self.size = size or first
        self._limit = limit
        self._fixed = size is not None

    def observe(self, samples: int, seconds: float) -> None:
        """Learn from a chunk of ``samples`` that took ``seconds`` to read and decode."""
        if not self._fixed and samples:
            wanted = CHUNK_SECONDS * samples / max(seconds, 1e-6)
            self.size = max(1, min(self._limit, round((self.size + wanted) / 2)))

    def batches(self, batch_size: int) -> int:
        """Return how many batches a chunk spans."""
        return -(-self.size // batch_size)


@dataclass(slots=True, eq=False)
class Slab:
    """The memory of some positions of an epoch in a row.

    Attributes:
        epoch: which.
        start: the first position.
        size: N, how many there are; less in the end where a stream ends before.
        ends_epoch: whether the epoch has none after these.
        images: (N, H, W, C) uint8, there once the first chunk has come so far.
        labels: (N,) int64.
        weights: (N,) float32.
        names: where each sample comes from.
        bad: the rows that could not be read or decoded, with the error.
    """

    epoch: int
    start: int
    size: int
    ends_epoch: bool
    images: Array | None = None
    labels: Array = field(init=False)
    weights: Array = field(init=False)
    names: list[str] = field(init=False)
    bad: dict[int, DataError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.labels = np.empty(self.size, np.int64)
        self.weights = np.ones(self.size, np.float32)
        self.names = [""] * self.size

    def allocate(self, shape: Shape) -> Array:
        """Return ``images``, allocated at the first call. For the loop's thread only; it takes microseconds."""
        if self.images is None:
            self.images = aligned_empty((self.size, *shape), np.uint8)
        return self.images

    def chunks(self, size: ChunkSize) -> Iterator[Chunk]:
        """Yield the slab's rows in chunks."""
        start = 0
        while start < self.size:
            stop = min(start + size.size, self.size)
            yield Chunk(self, start, stop, stop == self.size)
            start = stop


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The rows ``start`` to ``stop - 1`` of a slab.

    ``closes`` tells whether this is the slab's last chunk; ``records`` are there where a stream has given them already.
    """

    slab: Slab
    start: int
    stop: int
    closes: bool
    records: list[Record] | None = None

    @property
    def samples(self) -> int:
        """How many there are."""
        return self.stop - self.start

    @property
    def positions(self) -> Array:
        """(n,) int64, the places in the epoch."""
        return np.arange(self.slab.start + self.start, self.slab.start + self.stop)


@dataclass(frozen=True, slots=True)
class Plan:
    """How an epoch is cut.

    Attributes:
        samples: how many positions of an epoch there are to deliver, those that ``drop_last`` leaves out not counted.
        batch_size: samples in a batch; the last of an epoch may have fewer.
    """

    samples: int
    batch_size: int

    @property
    def batches(self) -> int:
        """How many batches an epoch has, if no sample is skipped."""
        return -(-self.samples // self.batch_size)

    def check(self, cursor: Cursor) -> None:
        """Raise ``ValueError`` unless ``cursor`` is between two batches of this plan."""
        if cursor.epoch < 0 or not 0 <= cursor.position <= self.samples:
            raise ValueError(
                f"cursor must be in epoch 0 or later, at a position of 0 to {self.samples}, "
                f"got epoch {cursor.epoch}, position {cursor.position}"
            )
        samples = cursor.batches * self.batch_size
        if cursor.samples != samples or cursor.position != samples + len(cursor.skipped):
            raise ValueError(
                f"cursor does not fit a batch size of {self.batch_size}: after {cursor.batches} batches it counts "
                f"{cursor.samples} samples and is at position {cursor.position}"
            )

    def chunks(self, cursor: Cursor, epochs: int | None, size: ChunkSize) -> Iterator[Chunk]:
        """Yield the chunks from ``cursor`` to the end of epoch ``epochs - 1``, by default of the cursor's own."""
        position = cursor.position
        for epoch in count(cursor.epoch):
            if epoch >= (cursor.epoch + 1 if epochs is None else epochs):
                return
            while position < self.samples:
                stop = min(position + size.batches(self.batch_size) * self.batch_size, self.samples)
                yield from Slab(epoch, position, stop - position, stop == self.samples).chunks(size)
                position = stop
            position = 0


class Filling:
    """Makes the slabs and chunks of one epoch of a stream, record by record.

    Args:
        epoch: which.
        position: of the first record.
        batch_size: samples in a slab.
        length: of the epoch, if it is known.
        size: of the chunks.
    """

    def __init__(self, epoch: int, position: int, batch_size: int, length: int | None, size: ChunkSize) -> None:
        self._epoch = epoch
        self._position = position
        self._batch_size = batch_size
        self._length = length
        self._size = size
        self._slab: Slab | None = None
        self._filled = 0  # rows of the slab that are in chunks already
        self._records: list[Record] = []
        self._ended = False  # whether a slab has told so

    def add(self, record: Record) -> Iterator[Chunk]:
        """Take the next record and yield the chunk that is now complete, if one is."""
        slab = self._slab = self._slab or self._new_slab()
        self._records.append(record)
        if len(self._records) >= self._size.size or self._filled + len(self._records) == slab.size:
            yield self._chunk(slab)

    def end(self) -> Iterator[Chunk]:
        """Yield what is left when there are no more records; nothing but the end, if nobody knew it before."""
        if not self._ended:
            slab = self._slab or self._new_slab()
            slab.size = self._filled + len(self._records)
            slab.ends_epoch = True
            yield self._chunk(slab)

    def _new_slab(self) -> Slab:
        size, rest = self._batch_size, None
        if self._length is not None:
            rest = self._length - self._position
            size = min(size, rest)
        return Slab(self._epoch, self._position, size, size == rest)

    def _chunk(self, slab: Slab) -> Chunk:
        stop = self._filled + len(self._records)
        chunk = Chunk(slab, self._filled, stop, stop == slab.size, self._records)
        self._filled, self._records = chunk.stop, []
        if chunk.closes:
            self._position += slab.size
            self._slab, self._filled, self._ended = None, 0, slab.ends_epoch
        return chunk


@dataclass(slots=True, eq=False)
class ReadChunk:
    """A chunk whose records are known.

    Attributes:
        chunk: which.
        records: of its rows.
        indices: (n,) of the records in the dataset, for the cache; their positions where they are of a stream.
        contents: what the rows' sources gave; None where the row is there already, or bad, or still to be fetched.
        missing: (n,) bool, the rows that are not there yet.
        seconds: that reading took.
    """

    chunk: Chunk
    records: list[Record]
    indices: Array
    contents: list[bytes | Array | None]
    missing: Array
    seconds: float = 0.0

    @property
    def samples(self) -> int:
        """How many there are."""
        return len(self.records)

    @property
    def tiny(self) -> bool:
        """Whether there is so little to each sample, less than 4 KiB, that two threads would only fight for the GIL."""
        sizes = [_nbytes(content) for content in self.contents if content is not None]
        if not sizes:  # all there already: what is left is to augment
            assert self.chunk.slab.images is not None  # noqa: S101 - allocated before the chunk is read
            return prod(self.chunk.slab.images.shape[1:]) < TINY
        return sum(sizes) < TINY * len(sizes)


def _nbytes(content: bytes | Array) -> int:
    return len(content) if isinstance(content, bytes) else getattr(content, "nbytes", TINY)


@dataclass(frozen=True, slots=True)
class Work:
    """What reading and decoding need to know; the same for all chunks of a stream.

    Attributes:
        dataset: what to read; None for a stream.
        order: which sample is at which position; None for a stream.
        settings: of the images.
        augmentation: done to each chunk, or None.
        seed: of the augmentation.
        cache: of decoded images, or None.
        stopping: asked between two samples; nobody will look at a result that was left off.
    """

    dataset: Dataset | None
    order: Order | None
    settings: ImageSettings
    augmentation: Augmentation | None
    seed: int
    cache: CacheRows | None
    stopping: threading.Event

    def read(self, chunk: Chunk) -> ReadChunk:
        """Find the records of a chunk, take from the cache what it has, and read the rest. Blocks.

        Sources that are fetched asynchronously are left to the caller; rows that cannot be read are left out.
        """
        start = perf_counter()
        slab = chunk.slab
        indices, records = self._records(chunk)
        for row, record in enumerate(records, chunk.start):
            slab.labels[row] = record.label
            slab.weights[row] = record.weight
            slab.names[row] = str(record.source)
        work = ReadChunk(chunk, records, indices, [None] * len(records), self._missing(chunk, indices))
        for row in np.flatnonzero(work.missing).tolist():
            if self.stopping.is_set():
                break
            source = records[row].source
            if not is_async(source):
                try:
                    work.contents[row] = source.read()
                except DataError as error:
                    self.leave_out(work, row, error)
        work.seconds = perf_counter() - start
        return work

    def decode(self, work: ReadChunk) -> Chunk:
        """Decode a chunk into its slab, remember it in the cache, and augment it; leave out bad images. Blocks."""
        chunk = work.chunk
        images = self.rows(chunk)
        with quiet_pillow():
            for row in np.flatnonzero(work.missing).tolist():
                if self.stopping.is_set():
                    return chunk
                content = work.contents[row]
                assert content is not None  # noqa: S101 - read or fetched, or else rejected
                try:
                    decode(content, self.settings, chunk.slab.names[chunk.start + row], out=images[row])
                except DataError as error:
                    self.leave_out(work, row, error)
        return self.finish(work)

    def finish(self, work: ReadChunk) -> Chunk:
        """Do what comes after decoding: the cache, and the augmentation."""
        chunk = work.chunk
        images = self.rows(chunk)
        if self.cache is not None and work.missing.any():
            self.cache.put(work.indices[work.missing], images[work.missing])
        if self.augmentation is not None:
            augmented = self.augmentation(images, Draws(self.seed, chunk.slab.epoch, chunk.positions))
            if augmented is not images:
                images[...] = augmented
        return chunk

    def rows(self, chunk: Chunk) -> Array:
        """Return the chunk's rows of its slab, (n, H, W, C)."""
        assert chunk.slab.images is not None  # noqa: S101 - allocated before the chunk is read
        return chunk.slab.images[chunk.start : chunk.stop]

    def _records(self, chunk: Chunk) -> tuple[Array, list[Record]]:
        if chunk.records is not None:
            return chunk.positions, chunk.records
        assert self.dataset is not None  # noqa: S101 - the chunks of a stream bring their records
        assert self.order is not None  # noqa: S101 - as above
        start = chunk.slab.start
        indices = self.order.order(chunk.slab.epoch)[start + chunk.start : start + chunk.stop]
        return indices, [self.dataset[index] for index in indices.tolist()]

    def _missing(self, chunk: Chunk, indices: Array) -> Array:
        if self.cache is None:
            return np.ones(len(indices), np.bool_)
        return self.cache.get(indices, self.rows(chunk))

    def leave_out(self, work: ReadChunk, row: int, error: DataError) -> None:
        """Leave out a row, counted within the chunk; who assembles the batches raises or skips it, in its place."""
        work.chunk.slab.bad[work.chunk.start + row] = error
        work.missing[row] = False


@dataclass(frozen=True, slots=True)
class Budget:
    """How many samples of an epoch may be skipped.

    Attributes:
        most: a count, or a share if it is a float.
        samples: in an epoch; None where only its end will tell: then the share is of those so far, taken for 100 at
            least.
    """

    most: int | float
    samples: int | None

    def check(self, skipped: int, last: Skipped) -> None:
        """Raise ``TooManyBadSamples`` if ``skipped``, of which ``last`` is the last one, are more."""
        samples = max(last.position + 1, 100) if self.samples is None else self.samples
        allowed = self.most * samples if isinstance(self.most, float) else self.most
        if skipped > allowed:
            told = f"{self.most:.1%} of {samples}" if isinstance(self.most, float) else str(self.most)
            raise TooManyBadSamples(
                last.source, f"{skipped} bad samples in this epoch are more than {told}; this one {last.reason}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Neighbouring rows of a slab, ``start`` to ``stop - 1``."""

    slab: Slab
    start: int
    stop: int

    @property
    def count(self) -> int:
        """How many there are."""
        return self.stop - self.start

    def parts(self) -> tuple[Array, Array, Array, list[str]]:
        """Return their images, labels and weights, as views, and their names."""
        assert self.slab.images is not None  # noqa: S101 - it is decoded
        rows = slice(self.start, self.stop)
        return self.slab.images[rows], self.slab.labels[rows], self.slab.weights[rows], self.slab.names[rows]


Mix = Callable[[Array, Array, int, int], tuple[Array, Array]]
"""(images, labels, epoch, first position) -> (images, soft labels)."""


class Assembler:
    """Makes batches of slabs, in order, row by row: how an epoch is cut into slabs changes nothing.

    Args:
        cursor: where the stream was opened.
        batch_size: samples in a batch.
        drop_last: leave out what is left at an epoch's end.
        budget: of bad samples in an epoch; None where the first one is raised.
    """

    def __init__(self, cursor: Cursor, batch_size: int, drop_last: bool, budget: Budget | None) -> None:
        self._cursor = cursor
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._budget = budget
        self._waiting: list[Rows] = []  # good rows that are in no batch yet
        self._missing = batch_size  # how many they lack
        self._skipped = cursor.skipped  # the positions in this epoch
        self._news: list[Skipped] = []  # since the last batch, of the epoch before too

    def add(self, slab: Slab) -> Iterator[Pieces]:
        """Take a slab that is decoded and yield the batches that are now complete.

        Raises the error of a bad sample, or ``TooManyBadSamples``, once the batches before it have been taken.
        """
        if slab.epoch != self._cursor.epoch:
            self._cursor, self._skipped = Cursor(slab.epoch), ()
        start = 0
        for bad in sorted(slab.bad):
            yield from self._add_good(slab, start, bad)
            self._skip(slab, bad)
            start = bad + 1
        yield from self._add_good(slab, start, slab.size)
        if slab.ends_epoch:
            if self._waiting and not self._drop_last:
                yield self._take(slab.start + slab.size, last=True)
            self._waiting, self._missing = [], self._batch_size

    def take_news(self) -> tuple[Skipped, ...]:
        """Return the samples skipped since the last call, or batch."""
        news, self._news = tuple(self._news), []
        return news

    def _add_good(self, slab: Slab, start: int, stop: int) -> Iterator[Pieces]:
        while start < stop:
            rows = Rows(slab, start, min(stop, start + self._missing))
            self._waiting.append(rows)
            self._missing -= rows.count
            start = rows.stop
            if self._missing == 0:
                yield self._take(slab.start + start, last=slab.ends_epoch and start == slab.size)

    def _skip(self, slab: Slab, row: int) -> None:
        if self._budget is None:
            raise slab.bad[row]
        skipped = Skipped(slab.epoch, slab.start + row, slab.names[row], slab.bad[row].reason)
        self._skipped += (skipped.position,)
        self._news.append(skipped)
        self._budget.check(len(self._skipped), skipped)

    def _take(self, position: int, last: bool) -> Pieces:
        """Return the waiting rows, as the batch after which ``position`` is the next unread one."""
        rows, self._waiting = self._waiting, []
        before, samples = self._cursor, self._batch_size - self._missing
        self._missing = self._batch_size
        self._cursor = Cursor(before.epoch, position, before.samples + samples, before.batches + 1, self._skipped)
        cursor = Cursor(before.epoch + 1) if last else self._cursor
        return Pieces(rows, before.epoch, cursor, last, self.take_news())


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """The rows that make up a batch, in order, and what is known of it."""

    rows: list[Rows]
    epoch: int
    cursor: Cursor
    last: bool
    skipped: tuple[Skipped, ...]

    @property
    def first_position(self) -> int:
        """Where in the epoch the batch's first sample is."""
        return self.rows[0].slab.start + self.rows[0].start

    @property
    def samples(self) -> int:
        """How many there are."""
        return sum(rows.count for rows in self.rows)

    def batch(self) -> Batch:
        """Return the batch; its arrays are views where it is of neighbouring rows, else copies."""
        images, labels, weights, names = self.rows[0].parts() if len(self.rows) == 1 else self._copied()
        weighted = weights if (weights != 1).any() else None
        return Batch(images, labels, tuple(names), self.cursor, self.last, self.skipped, weighted)

    def _copied(self) -> tuple[Array, Array, Array, list[str]]:
        parts = [rows.parts() for rows in self.rows]
        images = aligned_empty((self.samples, *parts[0][0].shape[1:]), np.uint8)
        np.concatenate([part[0] for part in parts], out=images)
        labels, weights = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        return images, labels, weights, [name for part in parts for name in part[3]]

    def mixed(self, mix: Mix) -> Batch:
        """Return the batch with its samples mixed by ``mix``; the weights stay in their rows."""
        batch = self.batch()
        images, labels = mix(batch.images, batch.labels, self.epoch, self.first_position)
        return replace(batch, images=images, labels=labels)
