from __future__ import annotations

import asyncio
import re
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blockbuster import BlockBuster
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from asynctrain.arena import Array, Shape, aligned_empty
from asynctrain.data import ArrayDataset, ImageFolder, Loader, Sampler, Subset, WeightedSampler, batching
from asynctrain.errors import ClosedError, DecodeError, ReadError
from asynctrain.types import Batch, BatchStream, Cursor, Record


def arrays(count: int, size: int = 4) -> ArrayDataset:
    """Make images of noise, no two alike."""
    images = np.random.default_rng(count).integers(0, 256, (count, size, size), dtype=np.uint8)
    return ArrayDataset(images, np.arange(count) % 3, ["a", "b", "c"])


def grey_loader(dataset: Any, **options: Any) -> Loader:
    return Loader(dataset, **{"image_size": (4, 4), "channels": 1, "batch_size": 4, "threads": 2, **options})


async def collect(loader: Loader, cursor: Cursor | None = None, epochs: int | None = None) -> list[Batch]:
    async with loader.open(cursor or Cursor(), epochs=epochs) as batches:
        return [batch async for batch in batches]


def told(batch: Batch) -> tuple[object, ...]:
    """Everything about a batch, comparable."""
    return (batch.images.tobytes(), batch.images.shape, batch.labels.tolist(), batch.sources, batch.cursor, batch.last)


async def deliver(batches: AsyncIterator[Batch], into: list[Batch]) -> None:
    async for batch in batches:
        into.append(batch)  # noqa: PERF401 (a comprehension would lose what came before an error)


async def until(holds: Callable[[], bool]) -> None:
    """Let the loop turn until ``holds()``; a test that waits in vain ends by its timeout."""
    while not holds():  # noqa: ASYNC110 (what runs in threads tells no event)
        await asyncio.sleep(0)


async def until_full(batches: AsyncIterator[Batch]) -> None:
    """Wait until as much is read ahead as may be."""
    await until(lambda: re.search(r"(\d+) of \1 read ahead", repr(batches)) is not None)


def break_file(folder: ImageFolder, index: int) -> str:
    path = Path(str(folder[index].source))
    path.write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    return str(path)


def remove_file(folder: ImageFolder, index: int) -> str:
    path = Path(str(folder[index].source))
    path.unlink()
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    """30 PNG files in three classes; the pixels of each are all of one grey, its number."""
    for number in range(30):
        path = tmp_path / "abc"[number % 3] / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), number).save(path)
    return ImageFolder(tmp_path)


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("asynctrain")]


# What is delivered


async def test_files_arrive_in_the_samplers_order_each_with_its_own_label_and_path(folder: ImageFolder) -> None:
    batches = await collect(grey_loader(folder, batch_size=7, seed=5, chunk=2))
    order = Sampler(30, 5).order(0)
    records = [folder[int(index)] for index in order]
    assert [name for batch in batches for name in batch.sources] == [str(record.source) for record in records]
    assert np.concatenate([batch.labels for batch in batches]).tolist() == [record.label for record in records]
    greys = [int(Path(str(record.source)).stem) for record in records]
    assert np.array_equal(np.concatenate([batch.images for batch in batches])[:, 0, 0, 0], greys)
    assert [len(batch.labels) for batch in batches] == [7, 7, 7, 7, 2]
    assert [batch.last for batch in batches] == [False] * 4 + [True]


async def test_images_and_labels_have_the_dtypes_and_layout_that_workers_want(folder: ImageFolder) -> None:
    loader = grey_loader(folder, image_size=(5, 3), channels=3)
    batch = (await collect(loader))[0]
    assert batch.images.shape == (4, 5, 3, 3) == (4, *loader.image_shape)
    assert batch.images.dtype == np.uint8
    assert batch.images.flags.c_contiguous
    assert batch.images.ctypes.data % 64 == 0
    assert batch.labels.dtype == np.int64


async def test_several_epochs_come_in_one_stream_each_in_its_own_order() -> None:
    batches = await collect(grey_loader(arrays(10)), epochs=3)
    assert [batch.last for batch in batches] == [False, False, True] * 3
    epochs = [[name for batch in batches[i : i + 3] for name in batch.sources] for i in (0, 3, 6)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3


async def test_drop_last_leaves_out_the_samples_of_a_batch_that_is_not_full() -> None:
    loader = grey_loader(arrays(10), drop_last=True)
    batches = await collect(loader)
    assert [len(batch.labels) for batch in batches] == [4, 4]
    assert batches[-1].last
    assert (loader.batches_per_epoch, loader.samples_per_epoch) == (2, 8)


async def test_another_sampler_decides_about_the_order_and_the_length_of_an_epoch() -> None:
    dataset = arrays(10)
    sampler = WeightedSampler([0, 0, 1, 0, 0, 0, 1, 0, 0, 0], seed=1, samples=7)
    loader = grey_loader(dataset, sampler=sampler)
    batches = await collect(loader, epochs=2)
    drawn = [*sampler.order(0).tolist(), *sampler.order(1).tolist()]
    assert [name for batch in batches for name in batch.sources] == [f"array[{index}]" for index in drawn]
    assert (loader.samples_per_epoch, loader.batches_per_epoch) == (7, 2)


async def test_a_stream_that_begins_where_the_epochs_end_is_empty() -> None:
    assert await collect(grey_loader(arrays(10)), Cursor(epoch=3), epochs=3) == []


async def test_an_evaluating_loader_reads_all_in_order_with_the_same_image_settings() -> None:
    train, test = arrays(12).split(0.5)
    loader = grey_loader(train, drop_last=True).evaluating(test)
    batches = await collect(loader)
    assert [name for batch in batches for name in batch.sources] == [f"array[{i}]" for i in test.indices]
    assert loader.settings == grey_loader(train).settings
    assert loader.samples_per_epoch == len(test)


def test_a_loader_is_a_batch_stream() -> None:
    stream: BatchStream = grey_loader(arrays(10))
    assert stream.classes == ("a", "b", "c")
    assert stream.image_shape == (4, 4, 1)
    assert stream.batches_per_epoch == 3
    assert stream.samples_per_epoch == 10


# Resuming


@settings(max_examples=10)
@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 2**64 - 1),
    chunks=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    threads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    prefetch=st.integers(1, 3),
    epochs=st.integers(1, 3),
    stop=st.integers(0, 10**6),
)
async def test_batches_before_and_after_a_stop_are_together_the_uninterrupted_ones(
    size: int,
    batch_size: int,
    seed: int,
    chunks: tuple[int, int],
    threads: tuple[int, int],
    prefetch: int,
    epochs: int,
    stop: int,
) -> None:
    def loader(which: int) -> Loader:
        return grey_loader(
            dataset, batch_size=batch_size, seed=seed, chunk=chunks[which], threads=threads[which], prefetch=prefetch
        )

    dataset = arrays(size)
    whole = [told(batch) for batch in await collect(loader(0), epochs=epochs)]
    stop %= len(whole) + 1
    before: list[Batch] = []
    async with loader(1).open(epochs=epochs) as batches:
        while len(before) < stop:
            before.append(await anext(batches))
    cursor = before[-1].cursor if before else Cursor()
    after = await collect(loader(1), cursor, epochs=epochs)
    assert [told(batch) for batch in [*before, *after]] == whole
    for epoch in range(epochs):
        per_epoch = -(-size // batch_size)
        delivered = [*before, *after][epoch * per_epoch : (epoch + 1) * per_epoch]
        names = [name for batch in delivered for name in batch.sources]
        assert sorted(names) == sorted(f"array[{i}]" for i in range(size))


async def test_by_default_a_stream_ends_with_the_epoch_of_its_cursor() -> None:
    loader = grey_loader(arrays(10))
    first, *rest = await collect(loader)
    assert [told(batch) for batch in await collect(loader, first.cursor)] == [told(batch) for batch in rest]
    assert [batch.cursor.epoch for batch in await collect(loader, rest[-1].cursor)] == [1, 1, 2]


async def test_two_streams_of_one_loader_at_once_do_not_disturb_each_other() -> None:
    loader = grey_loader(arrays(20))
    alone = [told(batch) for batch in await collect(loader)]
    async with asyncio.TaskGroup() as tasks:
        both = [tasks.create_task(collect(loader)) for _ in range(2)]
    assert all([told(batch) for batch in task.result()] == alone for task in both)


# Errors and ends


@dataclass
class WatchedSource:
    """An image that calls ``on_read`` with its index, in the reading thread, before it is there."""

    index: int
    on_read: Callable[[int], None]

    def read(self) -> Array:
        self.on_read(self.index)
        return np.full((4, 4), self.index % 256, np.uint8)

    def __str__(self) -> str:
        return f"watched[{self.index}]"


@dataclass
class WatchedDataset:
    size: int
    on_read: Callable[[int], None]
    classes: tuple[str, ...] = ("only",)
    labels: Array = field(init=False)

    def __post_init__(self) -> None:
        self.labels = np.zeros(self.size, np.int64)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int, /) -> Record:
        return Record(WatchedSource(index, self.on_read), 0)


@pytest.mark.parametrize("chunk", [1, 3, 4])
async def test_a_broken_file_is_named_after_the_batches_before_it_were_delivered(
    folder: ImageFolder, chunk: int
) -> None:
    broken = break_file(folder, int(Sampler(30, 0).order(0)[14]))
    delivered: list[Batch] = []
    async with grey_loader(folder, chunk=chunk).open() as batches:
        with pytest.raises(DecodeError) as caught:
            await deliver(batches, delivered)
        assert len(delivered) == 3
        assert caught.value.path == broken
        with pytest.raises(DecodeError):  # asking again does not get past it
            await anext(batches)


async def test_a_file_that_has_gone_is_named_after_the_batches_before_it_were_delivered(folder: ImageFolder) -> None:
    gone = remove_file(folder, 9)
    delivered: list[Batch] = []
    async with grey_loader(folder, shuffle=False).open() as batches:
        with pytest.raises(ReadError) as caught:
            await deliver(batches, delivered)
    assert len(delivered) == 2
    assert caught.value.path == gone
    assert loader_threads() == []


async def test_of_two_broken_files_the_first_in_order_is_told(folder: ImageFolder) -> None:
    _, first = break_file(folder, 12), break_file(folder, 2)
    with pytest.raises(DecodeError) as caught:
        await collect(grey_loader(folder, shuffle=False, chunk=1, threads=3))
    assert caught.value.path == first


async def test_an_error_of_the_users_own_dataset_arrives_as_it_is() -> None:
    error = RuntimeError("the database is down")

    def fail(index: int) -> None:
        if index == 5:
            raise error

    with pytest.raises(RuntimeError) as caught:
        await collect(grey_loader(WatchedDataset(8, fail), shuffle=False))
    assert caught.value is error


async def test_an_error_of_the_caller_leaves_the_block_as_it_is() -> None:
    error = KeyError("mine")

    async def fail_in_the_block() -> None:
        async with grey_loader(arrays(100)).open() as batches:
            await anext(batches)
            raise error

    with pytest.raises(KeyError) as caught:
        await fail_in_the_block()
    assert caught.value is error
    assert loader_threads() == []


async def test_after_the_end_every_further_ask_is_told_that_it_is_the_end() -> None:
    async with grey_loader(arrays(5)).open() as batches:
        assert len([batch async for batch in batches]) == 2
        for _ in range(3):
            with pytest.raises(StopAsyncIteration):
                await anext(batches)


async def test_after_the_block_a_stream_is_closed_whether_or_not_it_was_read_to_its_end() -> None:
    for read in (0, 1, 2):
        async with grey_loader(arrays(5)).open() as batches:
            for _ in range(read):
                await anext(batches)
        for _ in range(2):
            with pytest.raises(ClosedError, match="after its block had ended"):
                await anext(batches)


async def test_a_task_that_waits_for_a_batch_is_told_when_the_block_ends() -> None:
    reading, may_read = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def wait(index: int) -> None:
        loop.call_soon_threadsafe(reading.set)
        may_read.wait()

    async with grey_loader(WatchedDataset(100, wait)).open() as batches:
        waiting = asyncio.ensure_future(anext(batches))
        await reading.wait()
        may_read.set()  # the block ends before the loop turns again, so no batch can be ready
    outcome = (await asyncio.gather(waiting, return_exceptions=True))[0]
    assert isinstance(outcome, ClosedError)


# Nothing is left behind


async def test_leaving_early_leaves_no_thread_and_no_task(folder: ImageFolder) -> None:
    before = asyncio.all_tasks()
    async with grey_loader(folder).open(epochs=1000) as batches:
        async for _ in batches:
            break
        names = {task.get_name() for task in asyncio.all_tasks() - before}
        assert {"source", "read", "decode", "assemble"} <= names
        assert loader_threads()
    assert asyncio.all_tasks() == before
    assert loader_threads() == []


async def test_cancelling_at_any_moment_leaves_no_thread_and_no_task(folder: ImageFolder) -> None:
    loader = grey_loader(folder, chunk=2)
    before = asyncio.all_tasks()
    for turns in [*range(25), 40, 80, 160]:
        task = asyncio.create_task(collect(loader, epochs=1000))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == before
        assert loader_threads() == []


async def test_a_timeout_around_a_loader_just_works(folder: ImageFolder) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await collect(grey_loader(folder), epochs=10**9)
    assert loader_threads() == []


# Bounds


async def test_reading_never_runs_ahead_of_the_documented_bound() -> None:
    """Encoded images of 2 * threads + 4 chunks, and prefetch + 3 batches, are ahead of the caller at most."""
    threads, chunk, batch_size, prefetch = 2, 3, 6, 2
    bound = (2 * threads + 4) * chunk + (prefetch + 3) * batch_size
    read = delivered = furthest = 0

    def count(index: int) -> None:
        nonlocal read, furthest
        read += 1
        furthest = max(furthest, read - delivered)

    def reads_ahead() -> bool:
        return read - delivered >= (prefetch + 1) * batch_size

    loader = grey_loader(
        WatchedDataset(2000, count), batch_size=batch_size, chunk=chunk, threads=threads, prefetch=prefetch
    )
    async with loader.open() as batches:
        for _ in range(50):
            await until_full(batches)
            await until(reads_ahead)
            await anext(batches)
            delivered += batch_size
    assert furthest <= bound


async def test_no_more_batches_are_in_memory_than_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, prefetch, chunk, batch_size = 2, 3, 4, 4
    bound = prefetch + 3 + ceil((2 * threads + 4) * chunk / batch_size)
    alive: list[weakref.ref[Array]] = []
    most = 0

    def watched(shape: Shape, dtype: Any) -> Array:
        nonlocal most
        array = aligned_empty(shape, dtype)
        alive[:] = [*(ref for ref in alive if ref() is not None), weakref.ref(array)]
        most = max(most, len(alive))
        return array

    monkeypatch.setattr(batching, "aligned_empty", watched)
    loader = grey_loader(arrays(200), threads=threads, prefetch=prefetch, chunk=chunk, batch_size=batch_size)
    async with loader.open() as batches:
        for _ in range(20):
            await until_full(batches)
            await until(lambda: most > prefetch)  # it does read ahead
            await anext(batches)
    assert most <= bound


async def test_prefetching_goes_on_across_the_end_of_an_epoch() -> None:
    async with grey_loader(arrays(4), prefetch=3).open(epochs=10) as batches:
        await anext(batches)
        await until_full(batches)


async def test_nothing_blocks_the_loop(folder: ImageFolder, no_blocking_calls: BlockBuster) -> None:
    assert len(await collect(grey_loader(folder), epochs=3)) == 24


async def test_the_loops_default_executor_is_not_used(folder: ImageFolder) -> None:
    await collect(grey_loader(folder))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("asyncio_")]


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more, got 0"),
        ({"prefetch": 0}, "prefetch must be 1 or more, got 0"),
        ({"threads": 0}, "threads must be 1 or more, got 0"),
        ({"chunk": 0}, "chunk must be 1 or more, got 0"),
        ({"channels": 2}, "channels must be 1"),
        ({"image_size": (0, 4)}, "size must be"),
        ({"seed": -1}, "seed must be between"),
        ({"dataset": Subset(arrays(3), [])}, "dataset must have at least one sample, got none"),
        ({"batch_size": 11, "drop_last": True}, "drop_last leaves no batch: 10 samples are less than batch_size 11"),
    ],
)
def test_wrong_arguments_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grey_loader(**{"dataset": arrays(10), **arguments})


@pytest.mark.parametrize("name", ["batch_size", "prefetch", "threads", "chunk"])
def test_counts_that_are_no_integers_are_told(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer, got 'many'"):
        grey_loader(arrays(10), **{name: "many"})


def test_a_cursor_or_epochs_that_do_not_fit_are_told_at_once() -> None:
    loader = grey_loader(arrays(10))
    with pytest.raises(ValueError, match="at a position of 0 to 10, got epoch 0, position 12"):
        loader.open(Cursor(position=12, samples=12, batches=3))
    with pytest.raises(ValueError, match="does not fit a batch size of 4"):
        loader.open(Cursor(position=5, samples=5, batches=1))
    with pytest.raises(ValueError, match="epochs must be 0 or more, got -1"):
        loader.open(epochs=-1)


def test_evaluating_a_dataset_of_other_classes_is_told() -> None:
    other = ArrayDataset(np.zeros((1, 4, 4), np.uint8), [0], ["x"])
    with pytest.raises(ValueError, match=r"dataset must have the classes \('a', 'b', 'c'\), got \('x',\)"):
        grey_loader(arrays(10)).evaluating(other)
