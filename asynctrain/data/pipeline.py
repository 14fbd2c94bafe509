"""The journey of a chunk: planned, read, decoded into its batch.

A chunk is some neighbouring samples of one batch. Handing work to a thread costs 35-90 us, as much as decoding a small
image, so it is chunks, not samples, that travel through the queues: one hop reads a chunk, another decodes it. The
functions here are synchronous; ``loader`` moves the chunks between threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from asynctrain.arena import Array, aligned_empty
from asynctrain.data.datasets import Dataset
from asynctrain.data.images import ImageSettings, decode, quiet_pillow
from asynctrain.data.sampler import Sampler
from asynctrain.types import Batch, Cursor, Record


@dataclass(frozen=True, slots=True)
class Plan:
    """How an epoch is cut.

    Attributes:
        samples: how many positions of an epoch are delivered, those that ``drop_last`` leaves out not counted.
        batch_size: samples in a batch; the last of an epoch may have fewer.
        chunk: samples in a chunk; the last of a batch may have fewer.
    """

    samples: int
    batch_size: int
    chunk: int

    @property
    def batches(self) -> int:
        """How many batches an epoch has."""
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

    def chunks(self, cursor: Cursor, epochs: int | None) -> Iterator[Chunk]:
        """Yield the chunks from ``cursor`` to the end of epoch ``epochs - 1``, by default of the cursor's own."""
        last = cursor.epoch + 1 if epochs is None else epochs
        for epoch in count(cursor.epoch):
            if epoch >= last:
                return
            while cursor.epoch == epoch and cursor.position < self.samples:
                batch = self._batch(cursor)
                yield from batch.chunks(self.chunk)
                cursor = batch.after
            cursor = Cursor(epoch + 1)

    def _batch(self, before: Cursor) -> Making:
        stop = min(before.position + self.batch_size, self.samples)
        after = Cursor(
            before.epoch, stop, before.samples + stop - before.position, before.batches + 1, skipped=before.skipped
        )
        last = stop == self.samples
        return Making(before, Cursor(before.epoch + 1) if last else after, stop - before.position, last)


@dataclass(slots=True, eq=False)
class Making:
    """A batch in the making; each of its chunks fills in rows of its own.

    Attributes:
        before: the place where it begins.
        after: the place just after it.
        size: N, in samples.
        last: whether it ends its epoch.
        images: (N, H, W, C) uint8, there once the first chunk is about to be decoded.
        labels: (N,) int64.
        sources: the names of the samples.
    """

    before: Cursor
    after: Cursor
    size: int
    last: bool
    images: Array | None = None
    labels: Array = field(init=False)
    sources: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.labels = np.empty(self.size, np.int64)
        self.sources = [""] * self.size

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield the batch's rows in chunks of ``size``."""
        for start in range(0, self.size, size):
            yield Chunk(self, start, min(start + size, self.size))

    def allocate(self, settings: ImageSettings) -> Array:
        """Return ``images``, allocated at the first call. For one thread only; it takes microseconds."""
        if self.images is None:
            self.images = aligned_empty((self.size, *settings.shape), np.uint8)
        return self.images

    def finished(self) -> Batch:
        """Return the batch, once all chunks are decoded."""
        assert self.images is not None  # noqa: S101
        return Batch(self.images, self.labels, tuple(self.sources), self.after, self.last)


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """The rows ``start`` to ``stop - 1`` of a batch in the making."""

    batch: Making
    start: int
    stop: int

    @property
    def closes(self) -> bool:
        """Whether this is the batch's last chunk."""
        return self.stop == self.batch.size


@dataclass(frozen=True, slots=True, eq=False)
class ReadChunk:
    """A chunk's records and what their sources read."""

    chunk: Chunk
    records: list[Record]
    contents: list[bytes | Array]

    @property
    def tiny(self) -> bool:
        """Whether the images are so small that Pillow spends its time under the GIL: less than 4 KiB on average."""
        sizes = [len(content) if isinstance(content, bytes) else content.nbytes for content in self.contents]
        return sum(sizes) < 4096 * len(sizes)


def read(chunk: Chunk, dataset: Dataset, sampler: Sampler, stopping: threading.Event) -> ReadChunk:
    """Read the samples of a chunk. Blocks; raises what the dataset and its sources raise.

    Between two samples it looks at ``stopping`` and leaves off if it is set; nobody will look at the result then.
    """
    first = chunk.batch.before.position
    order = sampler.order(chunk.batch.before.epoch)[first + chunk.start : first + chunk.stop]
    records: list[Record] = []
    contents: list[bytes | Array] = []
    for index in order.tolist():
        if stopping.is_set():
            break
        record = dataset[index]
        records.append(record)
        contents.append(record.source.read())
    return ReadChunk(chunk, records, contents)


def decode_into(work: ReadChunk, images: Array, settings: ImageSettings, stopping: threading.Event) -> Chunk:
    """Decode a chunk into its rows of ``images``, fill in labels and names, and return it.

    Leaves off when ``stopping`` is set, as ``read`` does.

    Raises:
        DecodeError: for the first image that cannot be decoded.
    """
    chunk, batch = work.chunk, work.chunk.batch
    with quiet_pillow():
        for row, record, content in zip(range(chunk.start, chunk.stop), work.records, work.contents, strict=False):
            if stopping.is_set():
                break
            name = str(record.source)
            decode(content, settings, name, out=images[row])
            batch.labels[row] = record.label
            batch.sources[row] = name
    return chunk
