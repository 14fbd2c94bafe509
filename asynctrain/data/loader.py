"""The loader: batches of decoded images as an asynchronous stream."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import numpy as np

from asynctrain._aio import Failure, Flow, Meter, Worked, guest_of, in_thread, thread_pool
from asynctrain.arena import Array
from asynctrain.data.augment import Augmentation, Mixing
from asynctrain.data.batching import (
    CHUNK_BYTES,
    CHUNK_LIMIT,
    Assembler,
    Budget,
    Chunk,
    ChunkSize,
    Filling,
    Pieces,
    Plan,
    ReadChunk,
    Work,
)
from asynctrain.data.datasets import Dataset, Subset
from asynctrain.data.decoding import Decoding, Home, open_decoding
from asynctrain.data.fetching import Connections, is_async
from asynctrain.data.images import ImageSettings, decoder_fingerprint
from asynctrain.data.pipeline import Feed, Pipeline, Stream, arriving, hand_on
from asynctrain.data.sampler import Order, Sampler
from asynctrain.data.statistics import Statistics
from asynctrain.errors import DataError
from asynctrain.randomness import Purpose, generator, require_seed
from asynctrain.types import Batch, Cursor, SharedThreads, Skipped

if TYPE_CHECKING:  # not needed by most programs, and not for nothing to import
    from asynctrain.data.cache import Cache, CacheRows
    from asynctrain.data.streams import RecordStream

BEGINNING = Cursor()
IN_FLIGHT = 32  # reads at once from a dataset that is fetched and does not say how many it allows
FETCHED_CHUNK = 8  # samples; small, as one that is late holds up its chunk
LARGE = 2**20  # bytes; assembling more than this would hold the loop up for longer than a hop takes

_HINTS = {
    "read": "a cache keeps decoded images for later epochs, and more files in flight help where the disk is far away",
    "decode": "a cache makes later epochs cheap, and more threads, processes, or a faster decoder this one",
    "assemble": "mixing is what it does; a smaller batch does not help",
}


class Options(TypedDict, total=False):
    """What ``Loader`` and ``StreamLoader`` have in common; ``Loader`` says what each means, and its default."""

    batch_size: int
    image_size: tuple[int, int]
    channels: int
    resize: str
    decoder: str
    seed: int
    augment: Augmentation | None
    mix: Mixing | None
    errors: Literal["raise", "skip"]
    max_skipped: int | float
    drop_last: bool
    prefetch: int
    threads: int | None
    executor: Home
    chunk: int | Literal["auto"]


class _Opening:
    """How records become a stream of batches, whatever they come from: what ``Loader`` and ``StreamLoader`` share."""

    def __init__(
        self,
        classes: Sequence[str],
        *,
        batch_size: int = 64,
        image_size: tuple[int, int] = (64, 64),
        channels: int = 3,
        resize: str = "squash",
        decoder: str = "pillow",
        seed: int = 0,
        augment: Augmentation | None = None,
        mix: Mixing | None = None,
        errors: Literal["raise", "skip"] = "raise",
        max_skipped: int | float = 0.05,
        drop_last: bool = False,
        prefetch: int = 2,
        threads: int | None = None,
        executor: Home = "threads",
        chunk: int | Literal["auto"] = "auto",
    ) -> None:
        if executor not in ("threads", "processes", "auto"):
            raise ValueError(f"executor must be 'threads', 'processes' or 'auto', got {executor!r}")
        if errors not in ("raise", "skip"):
            raise ValueError(f"errors must be 'raise' or 'skip', got {errors!r}")
        if max_skipped < 0:
            raise ValueError(f"max_skipped must be 0 or more, got {max_skipped}")
        self.classes = tuple(classes)
        self.settings = ImageSettings(image_size, channels, resize=resize, decoder=decoder)
        self.batch_size = _one_or_more("batch_size", batch_size)
        self.prefetch = _one_or_more("prefetch", prefetch)
        self.threads = min(os.cpu_count() or 1, 4) if threads is None else _one_or_more("threads", threads)
        self.executor: Home = executor
        self._shares = threads is None and executor == "threads"  # another's threads, where a stream is offered some
        self.chunk = None if chunk == "auto" else _one_or_more("chunk", chunk)
        self.seed = require_seed(seed)
        self.augment = augment
        self.mix = mix
        self.errors = errors
        self.max_skipped = max_skipped
        self.drop_last = drop_last

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images delivered."""
        return self.settings.shape

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """The decoder and the versions of what it is made of, which decide about the last bit of a pixel."""
        return decoder_fingerprint(self.settings)

    @property
    def description(self) -> dict[str, Any]:
        """What decides about the batches, but for the pixels themselves, as JSON."""
        settings = self.settings
        return {
            "classes": list(self.classes),
            "batch_size": self.batch_size,
            "image_shape": list(settings.shape),
            "resize": settings.resize,
            "loader_seed": self.seed,
            "augment": None if self.augment is None else self.augment.to_json(),
            "mix": None if self.mix is None else self.mix.to_json(),
            "errors": self.errors,
            "drop_last": self.drop_last,
        }

    @asynccontextmanager
    async def _batches(
        self, source: _Source, cursor: Cursor, samples: int | None, threads: SharedThreads | None, stack: AsyncExitStack
    ) -> AsyncIterator[Batches]:
        """Open the pipeline behind ``source``; what it needs is on ``stack`` and outlives it."""
        decoder: Executor
        if threads is not None and self._shares:
            workers = min(self.threads, threads.workers)
            decoder = await stack.enter_async_context(guest_of(threads.submit))
        else:
            workers = self.threads
            decoder = await stack.enter_async_context(thread_pool(workers, "decode"))
        moving = _Moving(
            source,
            await stack.enter_async_context(thread_pool(1, "read")),
            await stack.enter_async_context(self._decoding(source, samples, workers, decoder)),
            await stack.enter_async_context(Connections()),
        )
        stack.callback(source.work.stopping.set)
        budget = Budget(self.max_skipped, samples) if self.errors == "skip" else None
        assembler = Assembler(cursor, self.batch_size, self.drop_last, budget)
        pipeline = (
            Pipeline(source.chunks)
            .map(moving.read, concurrency=source.reads, name="read")
            .map(moving.decode, concurrency=workers, name="decode")
            .through(partial(self._assemble, assembler, decoder), name="assemble")
            .prefetch(self.prefetch)
            .hint(**_HINTS)
        )
        async with pipeline.open() as stream:
            yield Batches(stream, assembler)

    def _decoding(
        self, source: _Source, samples: int | None, workers: int, threads: Executor
    ) -> AbstractAsyncContextManager[Decoding]:
        limit = self.chunk or self._chunk_limit
        return open_decoding(self.executor, source.work, workers, limit, samples, threads)

    @property
    def _chunk_limit(self) -> int:
        return min(CHUNK_LIMIT, max(1, CHUNK_BYTES // prod(self.image_shape)))

    def _work(
        self, dataset: Dataset | None, order: Order | None, cache: CacheRows | None, stopping: threading.Event
    ) -> Work:
        return Work(dataset, order, self.settings, self.augment, self.seed, cache, stopping)

    def _chunk_size(self, limit: int) -> ChunkSize:
        return ChunkSize(self.chunk, first=min(-(-self.batch_size // self.threads), 32, limit), limit=limit)

    async def _assemble(
        self,
        assembler: Assembler,
        threads: Executor,
        inbox: Flow[Chunk],
        outbox: Flow[Batch],
        meter: Meter,
    ) -> None:
        """Be the last stage: hand on a batch whenever its last chunk has arrived."""
        async for chunk in arriving(inbox, meter):
            if isinstance(chunk, Failure):
                await hand_on(chunk, outbox, meter)
                return
            if chunk.closes:
                for pieces in assembler.add(chunk.slab):
                    await hand_on(await self._batch(pieces, threads), outbox, meter)

    async def _batch(self, pieces: Pieces, threads: Executor) -> Batch:
        if self.mix is not None:
            make: Callable[[], Batch] = partial(pieces.mixed, self._mixed)
        elif len(pieces.rows) == 1 or pieces.samples * prod(self.image_shape) < LARGE:
            return pieces.batch()
        else:
            make = pieces.batch
        return await asyncio.get_running_loop().run_in_executor(threads, make)

    def _mixed(self, images: Array, labels: Array, epoch: int, first: int) -> tuple[Array, Array]:
        assert self.mix is not None  # noqa: S101 - asked for only then
        return self.mix(images, labels, len(self.classes), generator(self.seed, Purpose.MIX, epoch, first))


class Loader(_Opening):
    """Reads, decodes, augments and batches a dataset while the caller's loop goes on.

        async with loader.open(epochs=2) as batches:
            async for batch in batches:
                ...

    The order of samples and the pixels depend on the dataset, the seed and the settings only, never on threads, chunks
    or timing, and a stream that is opened at the cursor of a batch goes on at exactly the next one. A loader has no
    state of its own: it can be opened many times, at once too. Each opened stream owns its threads and tasks and leaves
    none behind.

    Memory: beside the batch that the caller holds, a stream holds the encoded bytes of at most ``(2 * threads + 4) *
    chunk`` images, the batches these are for, ``prefetch + 3`` more, each of ``batch_size * H * W * C`` bytes, and for
    each thread one image at its full size while it is decoded (up to about 12 bytes per pixel). A chunk has at most 512
    samples, and at most 8 MiB of pixels; memory is given back once all batches that a chunk was for are.

    Args:
        dataset: what to read.
        batch_size: samples in a batch, 1 or more. The last batch of an epoch has the rest.
        image_size: (H, W) of the images delivered.
        channels: 3 for RGB, 1 for grey.
        resize: how images come to that size, see ``ImageSettings``.
        decoder: ``"pillow"``, or a faster one of the extra ``fast``, see ``ImageSettings``.
        shuffle: whether each epoch has a random order of its own, else the dataset's.
        sampler: another order than that, for example ``BalancedSampler``; ``shuffle`` must be left alone then.
        seed: of order, augmentation and mixing, 0 to 2**64 - 1.
        augment: done to the images of each chunk, keyed by (seed, epoch, position).
        mix: ``mixup`` or ``cutmix``, done to each whole batch, which then has soft labels; keyed by (seed, epoch, first
            position of the batch).
        cache: where decoded images are kept for later epochs.
        errors: ``"raise"`` the first image that cannot be read or decoded, in its place, or ``"skip"`` it: batches stay
            full, and each skipped sample is told in ``Batch.skipped`` and ``batches.skipped``.
        max_skipped: how many samples of an epoch may be skipped, as a count or, a float, as a share.
        drop_last: leave out the samples of an epoch's last batch if it would not be full.
        prefetch: finished batches that wait for the caller, 1 or more.
        threads: images decoded at once, 1 or more; by default the number of CPUs, at most 4, and in a run that computes
            on threads, on those threads, so that no more are busy than there are CPUs. Photos gain nearly that factor.
            Images of less than 4 KiB are decoded by one thread at a time in any case: Pillow spends most of their time
            under the GIL, and two threads were slower than one.
        executor: where images are decoded: on ``"threads"``, in as many ``"processes"`` (they are spawned, so a script
            needs its main guard), or ``"auto"``: processes where a measurement of the first chunk shows that a second
            thread gains little, and an epoch has enough to do for it.
        chunk: samples that are read, and decoded, in one go, 1 or more; ``"auto"`` finds what takes about 20 ms.

    Raises:
        ValueError: an argument is out of range, the dataset is empty, or ``drop_last`` would leave out everything.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        shuffle: bool = True,
        sampler: Order | None = None,
        cache: Cache | None = None,
        **options: Unpack[Options],
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("dataset must have at least one sample, got none")
        super().__init__(dataset.classes, **options)
        self.dataset = dataset
        self.order = sampler or _usual_order(dataset, self.seed, shuffle)
        self.cache = cache
        samples = self.order.size
        kept = samples - samples % self.batch_size if self.drop_last else samples
        if kept == 0:
            raise ValueError(f"drop_last leaves no batch: {samples} samples are less than batch_size {self.batch_size}")
        self._plan = Plan(kept, self.batch_size)

    @property
    def batches_per_epoch(self) -> int:
        """How many batches an epoch has; an upper bound where samples are skipped."""
        return self._plan.batches

    @property
    def description(self) -> dict[str, Any]:
        """What decides about the batches, but for the pixels themselves, as JSON."""
        order = {name: getattr(self.order, name, None) for name in ("seed", "shuffle")}
        return super().description | {
            "samples": self._plan.samples,
            "order": {"name": type(self.order).__name__, **order, "first": self._digests["order"]},
            "labels": self._digests["labels"],
            "weights": self._digests["weights"],
        }

    @cached_property
    def _digests(self) -> dict[str, str | None]:
        """SHA-256, shortened, over the order of the first epoch, all labels, and the weights where there are any."""
        arrays = {"order": self.order.order(0), "labels": self.dataset.labels, "weights": _weights(self.dataset)}
        return {
            name: None if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]
            for name, array in arrays.items()
        }

    @property
    def samples_per_epoch(self) -> int:
        """How many samples an epoch delivers; an upper bound where samples are skipped."""
        return self._plan.samples

    @property
    def left_out(self) -> int:
        """How many samples of each epoch ``drop_last`` leaves out."""
        return self.order.size - self._plan.samples

    def evaluating(self, dataset: Dataset) -> Loader:
        """Return a loader over all of ``dataset``, in its order and unaugmented, with this loader's settings otherwise.

        Raises:
            ValueError: ``dataset`` has other classes, so its labels would mean something else.
        """
        return _evaluating(self, dataset, self.cache)

    def open(
        self, cursor: Cursor = BEGINNING, *, epochs: int | None = None, threads: SharedThreads | None = None
    ) -> AbstractAsyncContextManager[Batches]:
        """Open a stream of the batches from ``cursor`` on; reading ahead goes on across the epochs' ends.

        When a sample fails, the batches before its own are delivered, then its error is raised. Leaving the block, by
        whatever way, stops the threads within the image they are at, and waits for them without blocking the loop.

        Args:
            cursor: the place to begin at, from a batch of a loader with the same dataset, seed and batch size.
            epochs: deliver up to the end of epoch ``epochs - 1``; by default of the cursor's own epoch.
            threads: decode on these, which a run does with those of its executor; unless the loader was given a number
                of threads, or decodes in processes.

        Raises:
            ValueError: ``cursor`` is beyond the epoch or not between two batches, or ``epochs`` is negative.
            DataError: while iterating: a file cannot be read or decoded, its path in the error; or too many cannot.
            ClosedError: while iterating: the block has ended.
        """
        self._plan.check(cursor)
        if epochs is not None and epochs < 0:
            raise ValueError(f"epochs must be 0 or more, got {epochs}")
        return self._opened(cursor, epochs, threads)

    @asynccontextmanager
    async def _opened(
        self, cursor: Cursor, epochs: int | None, threads: SharedThreads | None
    ) -> AsyncIterator[Batches]:
        stopping = threading.Event()
        async with AsyncExitStack() as stack:
            rows = await self._open_cache(stack, stopping)
            size, reads, in_flight = self._chunk_size(self._chunk_limit), self.threads, 1
            if self._is_fetched():
                size = ChunkSize(self.chunk or FETCHED_CHUNK, first=1, limit=self.batch_size)
                in_flight = getattr(self.dataset, "in_flight", IN_FLIGHT)
                reads = 2 * -(-in_flight // size.size)  # so that a chunk that waits for its last leaves no place idle
            work = self._work(self.dataset, self.order, rows, stopping)
            source = _Source(self._plan.chunks(cursor, epochs, size), work, size, reads, in_flight)
            yield await stack.enter_async_context(self._batches(source, cursor, self._plan.samples, threads, stack))

    def _is_fetched(self) -> bool:
        """Whether sources that are read on the loop are among the first of the epoch."""
        return any(is_async(self.dataset[int(index)].source) for index in self.order.order(0)[: 2 * self.batch_size])

    async def _open_cache(self, stack: AsyncExitStack, stopping: threading.Event) -> CacheRows | None:
        if self.cache is None:
            return None
        rows = await in_thread(self.cache.open, self.dataset, self.settings, stopping, stop=stopping.set)
        stack.callback(rows.close)
        return rows

    def __repr__(self) -> str:
        return (
            f"<Loader of {self.dataset!r}: {self.batches_per_epoch:,} batches of {self.batch_size} per epoch, "
            f"images {self.image_shape}>"
        )


class StreamLoader(_Opening):
    """Batches of the records of a stream, which come one after the other and cannot be read at random.

    It is used as ``Loader`` is, and its arguments are the same, but for those that only random access allows (an order,
    a cache). Where an epoch's length shows only at its end, ``batches_per_epoch`` is None.

    Memory: as for ``Loader``; the stream itself is asked for a record only when there is room for it.

    Args:
        stream: for example ``from_async_iterable(...)``, ``CompressedTarShards`` or ``InterleaveStreams``.
    """

    def __init__(self, stream: RecordStream, **options: Unpack[Options]) -> None:
        super().__init__(stream.classes, **options)
        self.stream = stream

    @property
    def batches_per_epoch(self) -> int | None:
        """How many batches an epoch has, if that is known."""
        return None if self.stream.length is None else -(-self.stream.length // self.batch_size)

    @property
    def samples_per_epoch(self) -> int | None:
        """How many samples an epoch delivers, if that is known."""
        return self.stream.length

    def evaluating(self, dataset: Dataset) -> Loader:
        """Return a loader over ``dataset`` with the same image settings; see ``Loader.evaluating``."""
        return _evaluating(self, dataset, None)

    def open(
        self, cursor: Cursor = BEGINNING, *, epochs: int | None = None, threads: SharedThreads | None = None
    ) -> AbstractAsyncContextManager[Batches]:
        """Open a stream of the batches from ``cursor`` on; see ``Loader.open``.

        Raises:
            ValueError: the stream can be read only once, and this asks for more.
        """
        last = cursor.epoch + 1 if epochs is None else epochs
        if not self.stream.replayable and (cursor != BEGINNING or last > 1):
            raise ValueError(
                f"{self.stream!r} can be read only once, from its beginning: epochs must be 1 and cursor the first "
                f"one, got epochs={last} and {cursor}; give it a function that opens it at a position"
            )
        return self._opened(cursor, last, threads)

    @asynccontextmanager
    async def _opened(self, cursor: Cursor, epochs: int, threads: SharedThreads | None) -> AsyncIterator[Batches]:
        async with AsyncExitStack() as stack:
            size = self._chunk_size(min(self.batch_size, self._chunk_limit))  # records may be slow to come

            async def feed(outbox: Flow[Chunk], meter: Meter) -> None:
                position = cursor.position
                for epoch in range(cursor.epoch, epochs):
                    async with self.stream.open(epoch, position) as records:
                        slabs = Filling(epoch, position, self.batch_size, self.stream.length, size)
                        async for record in records:
                            for chunk in slabs.add(record):
                                await hand_on(chunk, outbox, meter)
                        for chunk in slabs.end():
                            await hand_on(chunk, outbox, meter)
                    position = 0

            source = _Source(feed, self._work(None, None, None, threading.Event()), size, self.threads, 1)
            yield await stack.enter_async_context(self._batches(source, cursor, self.stream.length, threads, stack))

    def __repr__(self) -> str:
        return f"<StreamLoader of {self.stream!r}: batches of {self.batch_size}, images {self.image_shape}>"


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the chunks of one opened stream come from, what is done to them, how many are read at once.

    in_flight: how many samples are fetched at once.
    """

    chunks: Iterable[Chunk] | Feed
    work: Work
    size: ChunkSize
    reads: int
    in_flight: int


class _Moving:
    """Moves chunks between threads, one hop for reading and one for decoding."""

    def __init__(
        self,
        source: _Source,
        reader: ThreadPoolExecutor,
        decoding: Decoding,
        connections: Connections,
    ) -> None:
        self._work = work = source.work
        self._size = source.size
        self._places = asyncio.Semaphore(source.in_flight)
        self._decoding = decoding
        self._connections = connections
        from aiofiles.os import wrap  # it imports tempfile too, 5 ms in all: not before something is loaded

        self._read = partial(wrap(work.read), executor=reader)
        self._tiny = False  # whether the chunk before was of tiny images

    async def read(self, chunk: Chunk) -> Worked[ReadChunk]:
        chunk.slab.allocate(self._work.settings.shape)
        async with self._decoding.interpreter if self._tiny else nullcontext():
            start = perf_counter()
            work: ReadChunk = await self._read(chunk)
        self._tiny = work.tiny
        fetched = [row for row in np.flatnonzero(work.missing).tolist() if work.contents[row] is None]
        if fetched:
            async with asyncio.TaskGroup() as tasks:
                fetching = [tasks.create_task(self._fetch(work, row), name=f"fetch-{row}") for row in fetched]
            for row, task in zip(fetched, fetching, strict=True):  # in order: the first bad one is told
                error = task.result()
                if isinstance(error, DataError):
                    self._work.leave_out(work, row, error)
                elif error is not None:
                    raise error
        return Worked(work, perf_counter() - start)

    async def _fetch(self, work: ReadChunk, row: int) -> Exception | None:
        source = work.records[row].source
        assert is_async(source)  # noqa: S101 - others have been read
        try:
            async with self._places:
                work.contents[row] = await self._connections.fetch(source)
        except Exception as error:
            return error
        return None

    async def decode(self, work: ReadChunk) -> Worked[Chunk]:
        seconds = await self._decoding.decode(work)
        self._size.observe(len(work.records), work.seconds + seconds)
        return Worked(work.chunk, seconds)


class Batches(AsyncIterator[Batch]):
    """An opened stream of batches.

    What ends it, its last item or an error or its closing, is told to whoever asks again.

    Attributes:
        skipped: the samples that were left out of the batches delivered so far.
    """

    def __init__(self, stream: Stream[Batch], assembler: Assembler) -> None:
        self._stream = stream
        self._assembler = assembler
        self.skipped: list[Skipped] = []

    async def __anext__(self) -> Batch:
        try:
            batch = await anext(self._stream)
        except Exception:
            self.skipped += self._assembler.take_news()  # after the last batch
            raise
        self.skipped += batch.skipped
        return batch

    def statistics(self) -> Statistics:
        """Return what the stages did and waited for so far."""
        return self._stream.statistics()

    def report(self) -> str:
        """Return one sentence on what holds the loading up, a table of the stages, and the skipped samples."""
        lines = [self._stream.report()]
        if self.skipped:
            lines.append(f"\n{len(self.skipped)} samples were skipped:")
            lines += [f"  {skipped.source}: {skipped.reason}" for skipped in self.skipped]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return repr(self._stream).replace("Stream", "Batches", 1)


def _evaluating(loader: _Opening, dataset: Dataset, cache: Cache | None) -> Loader:
    if tuple(dataset.classes) != loader.classes:
        raise ValueError(f"dataset must have the classes {loader.classes}, got {dataset.classes}")
    return Loader(
        dataset,
        batch_size=loader.batch_size,
        image_size=loader.settings.size,
        channels=loader.settings.channels,
        resize=loader.settings.resize,
        decoder=loader.settings.decoder,
        shuffle=False,
        cache=cache,
        errors=loader.errors,
        max_skipped=loader.max_skipped,
        prefetch=loader.prefetch,
        threads=None if loader._shares else loader.threads,
        executor=loader.executor,
        chunk=loader.chunk or "auto",
    )


def _weights(dataset: Dataset) -> Array | None:
    """Return the samples' weights, or those of a mixture's sources, where the dataset tells any."""
    if isinstance(dataset, Subset):
        weights = _weights(dataset.dataset)
        return None if weights is None or len(weights) != len(dataset.dataset) else weights[dataset.indices]
    weights = getattr(dataset, "weights", None)
    return None if weights is None else np.asarray(weights)


def _usual_order(dataset: Dataset, seed: int, shuffle: bool) -> Order:
    """Return the dataset's own order, as ``Interleave`` has one, or a random or sequential one over all of it."""
    if hasattr(dataset, "sampler"):
        order: Order = dataset.sampler(seed, shuffle)
        return order
    return Sampler(len(dataset), seed, shuffle)


def _one_or_more(name: str, value: int) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
    return value
