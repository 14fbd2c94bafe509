"""Where chunks are decoded: on threads, in processes, or on whichever a measurement of the first chunk favours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import BrokenExecutor, Executor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, nullcontext
from functools import lru_cache
from time import perf_counter
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from asynctrain._aio import process_pool
from asynctrain.arena import Array
from asynctrain.data.batching import ReadChunk, Work
from asynctrain.data.images import ImageSettings, decode, quiet_pillow
from asynctrain.errors import DataError, ExecutorError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.shared_memory import SharedMemory

Home = Literal["threads", "processes", "auto"]

SCALES = 1.4  # two threads that together are this much faster than one are worth having
START_UP = 1.5  # seconds that worker processes take before they decode; they are started for ten times that much work


class Decoding(Protocol):
    """A place where chunks are decoded.

    Attributes:
        interpreter: held while tiny images are read, or decoded on threads of this process: both hold the GIL most of
            the time, and two threads at once took twice as long as one after the other.
    """

    @property
    def interpreter(self) -> asyncio.Lock: ...  # noqa: D102

    async def decode(self, work: ReadChunk) -> float:
        """Decode ``work`` into its slab and return how many seconds of one worker that took."""
        ...


class OnThreads:
    """Decodes on threads, images under 4 KiB one chunk at a time."""

    def __init__(self, work: Work, threads: Executor) -> None:
        self._work = work
        self._threads = threads
        self.interpreter = asyncio.Lock()

    async def decode(self, work: ReadChunk) -> float:
        """Decode on one of the threads."""
        async with self.interpreter if work.tiny else nullcontext():
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._timed, work)

    def _timed(self, work: ReadChunk) -> float:
        start = perf_counter()
        self._work.decode(work)
        return perf_counter() - start


class InProcesses:
    """Decodes in processes, which write the pixels into a ring of shared memory.

    What comes after decoding (the cache, the augmentation) is done here, on threads.

    Args:
        work: what to do.
        processes: where to decode.
        threads: where to finish.
        slots: shared memory, each for one chunk; as many chunks are decoded at once.
    """

    def __init__(self, work: Work, processes: Executor, threads: Executor, slots: list[SharedMemory]) -> None:
        self._work = work
        self._processes = processes
        self._threads = threads
        self.interpreter = asyncio.Lock()
        self._free: asyncio.Queue[SharedMemory] = asyncio.Queue(len(slots))
        for slot in slots:
            self._free.put_nowait(slot)

    async def decode(self, work: ReadChunk) -> float:
        """Decode in one of the processes; raises ``ExecutorError`` when it dies."""
        loop = asyncio.get_running_loop()
        slab = work.chunk.slab
        names = slab.names[work.chunk.start : work.chunk.stop]
        contents = [content if missing else None for content, missing in zip(work.contents, work.missing, strict=True)]
        slot = await self._free.get()
        try:
            decoding = loop.run_in_executor(
                self._processes, decode_into_slot, slot.name, self._work.settings, contents, names
            )
            bad, seconds = await decoding
            seconds += await loop.run_in_executor(self._threads, self._finish, work, slot, bad)
        except BrokenExecutor as error:
            raise ExecutorError("decoding processes", "a worker process died") from error
        finally:
            self._free.put_nowait(slot)
        return seconds

    def _finish(self, work: ReadChunk, slot: SharedMemory, bad: dict[int, DataError]) -> float:
        start = perf_counter()
        for row, error in sorted(bad.items()):
            self._work.leave_out(work, row, error)
        rows = self._work.rows(work.chunk)
        rows[work.missing] = slot_rows(slot, len(rows), self._work.settings)[work.missing]
        self._work.finish(work)
        return perf_counter() - start


def decode_into_slot(
    slot: str, settings: ImageSettings, contents: list[bytes | Array | None], names: list[str]
) -> tuple[dict[int, DataError], float]:
    """Decode the rows whose content is given; runs in a worker process.

    Returns the rows that could not be decoded, each with its error, and the seconds it took.
    """
    start = perf_counter()
    rows = slot_rows(_attached(slot), len(contents), settings)
    bad: dict[int, DataError] = {}
    with quiet_pillow():
        for row, (content, name) in enumerate(zip(contents, names, strict=True)):
            if content is not None:
                try:
                    decode(content, settings, name, out=rows[row])
                except DataError as error:
                    bad[row] = error
    return bad, perf_counter() - start


def slot_rows(slot: SharedMemory, count: int, settings: ImageSettings) -> Array:
    """Return the first ``count`` images in a slot, (count, H, W, C) uint8."""
    shape = (count, *settings.shape)
    return np.ndarray(shape, np.uint8, slot.buf)


@lru_cache(maxsize=64)  # the slots of a ring, for the life of the worker process
def _attached(name: str) -> SharedMemory:
    from multiprocessing.shared_memory import SharedMemory

    return SharedMemory(name)


@contextmanager
def _ring(slots: int, nbytes: int) -> Iterator[list[SharedMemory]]:
    """Own ``slots`` blocks of shared memory; at the end they are gone, and if this process is killed as well."""
    from multiprocessing.shared_memory import SharedMemory

    with ExitStack() as stack:
        blocks = []
        for _ in range(slots):
            block = SharedMemory(create=True, size=nbytes)
            stack.callback(block.close)
            stack.callback(block.unlink)
            blocks.append(block)
        yield blocks


@asynccontextmanager
async def open_decoding(
    home: Home, work: Work, workers: int, limit: int, samples: int | None, threads: Executor
) -> AsyncIterator[Decoding]:
    """Own what decoding at ``home`` needs.

    Args:
        home: ``"auto"`` decides by measuring the first chunk.
        work: what to do.
        workers: processes, or threads.
        limit: the most samples a chunk can have.
        samples: in an epoch; None where that is unknown.
        threads: ``workers`` of them.
    """
    async with AsyncExitStack() as stack:

        async def in_processes() -> InProcesses:
            height, width, channels = work.settings.shape
            slots = stack.enter_context(_ring(workers + 1, limit * height * width * channels))
            processes = await stack.enter_async_context(process_pool(workers, "decode"))
            return InProcesses(work, processes, threads, slots)

        if home == "processes":
            yield await in_processes()
        elif home == "threads" or workers == 1:
            yield OnThreads(work, threads)
        else:
            yield _Measured(work, threads, samples, in_processes)


class _Measured:
    """Decides by the first chunk that has something to decode, and stays with the decision."""

    def __init__(self, work: Work, threads: Executor, samples: int | None, in_processes: _Starting) -> None:
        self._work = work
        self._threads = threads
        self._samples = samples
        self._in_processes = in_processes
        self._deciding = asyncio.Lock()
        self._on_threads = OnThreads(work, threads)
        self._chosen: Decoding | None = None

    @property
    def interpreter(self) -> asyncio.Lock:
        return (self._chosen or self._on_threads).interpreter

    async def decode(self, work: ReadChunk) -> float:
        async with self._deciding:
            if self._chosen is None and work.missing.any():
                self._chosen = await self._choose(work)
        return await (self._chosen or self._on_threads).decode(work)

    async def _choose(self, work: ReadChunk) -> Decoding:
        """Decode the chunk once, then twice at the same time, into memory that is thrown away."""
        loop = asyncio.get_running_loop()
        alone = await loop.run_in_executor(self._threads, self._scratch, work)
        start = perf_counter()
        await asyncio.gather(*(loop.run_in_executor(self._threads, self._scratch, work) for _ in range(2)))
        together = (perf_counter() - start) / 2
        count = int(work.missing.sum())
        epoch = alone / count * self._samples if self._samples is not None else float("inf")
        if alone < SCALES * together and epoch > 10 * START_UP:
            return await self._in_processes()
        return self._on_threads

    def _scratch(self, work: ReadChunk) -> float:
        start = perf_counter()
        contents = [content if missing else None for content, missing in zip(work.contents, work.missing, strict=True)]
        out = np.empty(self._work.settings.shape, np.uint8)
        with quiet_pillow():
            for content in contents:
                if content is not None:
                    try:
                        decode(content, self._work.settings, out=out)
                    except DataError:
                        continue  # it will be told when the chunk is decoded for good
        return perf_counter() - start


class _Starting(Protocol):
    async def __call__(self) -> Decoding: ...
