"""The loader: batches of decoded images as an asynchronous stream."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from numbers import Integral
from typing import Literal

import aiofiles.os

from asynctrain._aio import Failure, Flow, ServingGroup, source, stage, thread_pool
from asynctrain.data import pipeline
from asynctrain.data.datasets import Dataset
from asynctrain.data.images import ImageSettings
from asynctrain.data.pipeline import Chunk, Plan, ReadChunk
from asynctrain.data.sampler import Sampler
from asynctrain.errors import ClosedError
from asynctrain.types import Batch, Cursor

_read = aiofiles.os.wrap(pipeline.read)

BEGINNING = Cursor()


class Loader:
    """Reads, decodes and batches a dataset while the caller's loop goes on.

        async with loader.open(epochs=2) as batches:
            async for batch in batches:
                ...

    The order of samples and the pixels depend on the dataset, the seed and the image settings only, and a stream that
    is opened at the cursor of a batch goes on at exactly the next one. A loader has no state of its own: it can be
    opened many times, at once too. Each opened stream owns its threads and tasks and leaves none behind.

    Memory: beside the batch that the caller holds, a stream holds at most ``prefetch + threads + 2`` batches of
    ``batch_size * H * W * C`` bytes and the encoded bytes of ``(2 * threads + 3) * chunk`` images, and for each thread
    one image at its full size while it is decoded (up to about 12 bytes per pixel).

    Args:
        dataset: what to read.
        batch_size: samples in a batch, 1 or more. The last batch of an epoch has the rest.
        image_size: (H, W) of the images delivered.
        channels: 3 for RGB, 1 for grey.
        shuffle: whether each epoch has a random order of its own, else the dataset's.
        seed: of the order, 0 to 2**64 - 1.
        drop_last: leave out the samples of an epoch's last batch if it would not be full.
        prefetch: finished batches that wait for the caller, 1 or more.
        threads: images decoded at once, 1 or more; by default the number of CPUs, at most 4. Photos gain nearly that
            factor. Images of less than 4 KiB are decoded by one thread at a time in any case: Pillow spends most of
            their time under the GIL, and two threads were slower than one (50 and 32 us per 28x28 PNG).
        chunk: samples that are read, and decoded, in one go, 1 or more; ``"auto"`` gives each thread a part of a batch,
            of 32 samples at most.

    Raises:
        ValueError: an argument is out of range, the dataset is empty, or ``drop_last`` would leave out everything.
        TypeError: a count is no integer.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int = 64,
        image_size: tuple[int, int] = (64, 64),
        channels: int = 3,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        prefetch: int = 2,
        threads: int | None = None,
        chunk: int | Literal["auto"] = "auto",
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("dataset must have at least one sample, got none")
        self.dataset = dataset
        self.settings = ImageSettings(image_size, channels)
        self.sampler = Sampler(len(dataset), seed, shuffle)
        self.batch_size = _one_or_more("batch_size", batch_size)
        self.prefetch = _one_or_more("prefetch", prefetch)
        self.threads = min(os.cpu_count() or 1, 4) if threads is None else _one_or_more("threads", threads)
        self.chunk = min(-(-self.batch_size // self.threads), 32) if chunk == "auto" else _one_or_more("chunk", chunk)
        kept = len(dataset) - (len(dataset) % self.batch_size if drop_last else 0)
        if kept == 0:
            raise ValueError(f"drop_last leaves no batch: {len(dataset)} samples are less than batch_size {batch_size}")
        self._plan = Plan(kept, self.batch_size, self.chunk)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images delivered."""
        return self.settings.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels 0, 1, ..."""
        return self.dataset.classes

    @property
    def batches_per_epoch(self) -> int:
        """How many batches an epoch has."""
        return self._plan.batches

    @property
    def samples_per_epoch(self) -> int:
        """How many samples an epoch delivers."""
        return self._plan.samples

    def evaluating(self, dataset: Dataset) -> Loader:
        """Return a loader over all of ``dataset``, in its order, with this loader's image and thread settings.

        Raises:
            ValueError: ``dataset`` has other classes, so its labels would mean something else.
        """
        if tuple(dataset.classes) != tuple(self.classes):
            raise ValueError(f"dataset must have the classes {self.classes}, got {dataset.classes}")
        height, width, channels = self.image_shape
        return Loader(
            dataset,
            batch_size=self.batch_size,
            image_size=(height, width),
            channels=channels,
            shuffle=False,
            prefetch=self.prefetch,
            threads=self.threads,
            chunk=self.chunk,
        )

    def open(
        self, cursor: Cursor = BEGINNING, *, epochs: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[Batch]]:
        """Open a stream of the batches from ``cursor`` on; reading ahead goes on across the epochs' ends.

        When a sample fails, the batches before its own are delivered, then its error is raised. Leaving the block, by
        whatever way, stops the threads within the image they are at, and waits for them without blocking the loop.

        Args:
            cursor: the place to begin at, from a batch of a loader with the same dataset, seed and batch size.
            epochs: deliver up to the end of epoch ``epochs - 1``; by default of the cursor's own epoch.

        Raises:
            ValueError: ``cursor`` is beyond the epoch or not between two batches, or ``epochs`` is negative.
            DataError: while iterating: a file cannot be read or decoded, its path in the error.
            ClosedError: while iterating: the block has ended.
        """
        self._plan.check(cursor)
        if epochs is not None and epochs < 0:
            raise ValueError(f"epochs must be 0 or more, got {epochs}")
        return self._opened(cursor, epochs)

    @asynccontextmanager
    async def _opened(self, cursor: Cursor, epochs: int | None) -> AsyncIterator[AsyncIterator[Batch]]:
        stopping = threading.Event()
        async with thread_pool(1, "read") as reader, thread_pool(self.threads, "decode") as decoder:
            one_at_a_time = asyncio.Lock()

            async def read(chunk: Chunk) -> ReadChunk:
                return await _read(chunk, self.dataset, self.sampler, stopping, executor=reader)

            async def decode(work: ReadChunk) -> Chunk:
                images = work.chunk.batch.allocate(self.settings)
                async with one_at_a_time if work.tiny else nullcontext():
                    return await asyncio.get_running_loop().run_in_executor(
                        decoder, pipeline.decode_into, work, images, self.settings, stopping
                    )

            # A chunk waiting for each thread, so that none is idle while the next one is read.
            chunks_read: Flow[ReadChunk] = asyncio.Queue(self.threads)
            # A chunk in the hands of each thread.
            chunks_decoded: Flow[Chunk] = asyncio.Queue(self.threads)
            # What the caller may fall behind by before decoding pauses.
            batches = Batches(self.prefetch)
            try:
                async with ServingGroup() as tasks:
                    plan = self._plan.chunks(cursor, epochs)
                    tasks.create_task(source(read, plan, chunks_read, tasks, "read"), name="reading")
                    tasks.create_task(stage(decode, chunks_read, chunks_decoded, tasks, "decode"), name="decoding")
                    tasks.create_task(batches.fill(chunks_decoded), name="batching")
                    yield batches
            finally:
                batches.close()
                stopping.set()

    def __repr__(self) -> str:
        return (
            f"<Loader of {self.dataset!r}: {self.batches_per_epoch:,} batches of {self.batch_size} per epoch, "
            f"images {self.image_shape}>"
        )


class Batches(AsyncIterator[Batch]):
    """An opened stream of batches.

    What ends it, its last item or an error or its closing, stays in the queue and is told to whoever asks again.
    """

    def __init__(self, bound: int) -> None:
        self._queue: asyncio.Queue[Batch | Failure] = asyncio.Queue(bound)

    async def fill(self, chunks: Flow[Chunk]) -> None:
        """Be the last stage: put a batch whenever its last chunk has arrived."""
        while (task := await chunks.get()) is not None:
            chunk = await task
            if isinstance(chunk, Failure):
                return await self._queue.put(chunk)
            if chunk.closes:
                await self._queue.put(chunk.batch.finished())
        return await self._queue.put(Failure(StopAsyncIteration()))

    async def __anext__(self) -> Batch:
        item = await self._queue.get()
        if isinstance(item, Failure):
            self._queue.put_nowait(item)  # there is room: it has just been taken out, and nobody puts after it
            raise item.error
        return item

    def close(self) -> None:
        """Drop what was read ahead; from now on ``ClosedError`` is raised. Nobody may be filling any more."""
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(Failure(ClosedError("the batches of a loader were used after its block had ended")))

    def __repr__(self) -> str:
        return f"<Batches: {self._queue.qsize()} of {self._queue.maxsize} read ahead>"


def _one_or_more(name: str, value: object) -> int:
    if not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
    return int(value)
