"""The journey of a chunk without a loop: plans, reading and decoding, and how batches are put together."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynctrain.arena import Array
from asynctrain.data import ArrayDataset, ImageSettings, Sampler
from asynctrain.data.augment import Augmentation, Draws, standard
from asynctrain.data.batching import (
    Assembler,
    Budget,
    Chunk,
    ChunkSize,
    Filling,
    Pieces,
    Plan,
    ReadChunk,
    Slab,
    Work,
)
from asynctrain.errors import DecodeError, ReadError, TooManyBadSamples
from asynctrain.types import Cursor, Record, Skipped

plans = st.builds(Plan, st.integers(1, 60), st.integers(1, 20))
chunk_sizes = st.builds(ChunkSize, st.integers(1, 25), st.just(1), st.just(25))


# Plans


@given(plans, chunk_sizes, st.integers(0, 3), st.integers(1, 3))
def test_the_chunks_of_an_epoch_cover_each_position_once_and_in_order(
    plan: Plan, size: ChunkSize, epoch: int, epochs: int
) -> None:
    covered = [
        (chunk.slab.epoch, position)
        for chunk in plan.chunks(Cursor(epoch), epoch + epochs, size)
        for position in chunk.positions.tolist()
    ]
    assert covered == [(e, position) for e in range(epoch, epoch + epochs) for position in range(plan.samples)]


@given(plans, chunk_sizes, st.data())
def test_from_a_cursor_on_the_rest_of_its_epoch_is_covered(plan: Plan, size: ChunkSize, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, plan.samples))
    chunks = list(plan.chunks(Cursor(position=position), None, size))
    covered = [position for chunk in chunks for position in chunk.positions.tolist()]
    assert covered == list(range(position, plan.samples))
    assert [chunk.slab.ends_epoch for chunk in chunks if chunk.closes][-1:] == [True] * bool(covered)


@given(plans, chunk_sizes)
def test_no_chunk_is_larger_than_asked_or_spans_two_slabs(plan: Plan, size: ChunkSize) -> None:
    for chunk in plan.chunks(Cursor(), None, size):
        assert 1 <= chunk.stop - chunk.start <= size.size
        assert 0 <= chunk.start < chunk.stop <= chunk.slab.size <= size.batches(plan.batch_size) * plan.batch_size
        assert chunk.closes == (chunk.stop == chunk.slab.size)


def test_a_chunk_size_that_changes_is_used_from_the_next_chunk_on() -> None:
    size = ChunkSize(None, first=2, limit=10)
    chunks = Plan(10, 10).chunks(Cursor(), None, size)
    next(chunks)
    size.observe(2, 0.004)  # 20 ms would be ten samples; half way there is six
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [(2, 8), (8, 10)]


def test_an_automatic_chunk_size_approaches_twenty_milliseconds_within_its_limits() -> None:
    size = ChunkSize(None, first=1, limit=50)
    for _ in range(20):
        size.observe(size.size, 0.001 * size.size)
    assert size.size in range(18, 22)
    for _ in range(20):
        size.observe(size.size, 1e-9)
    assert size.size == 50
    for _ in range(20):
        size.observe(size.size, 1.0)
    assert size.size == 1
    size.observe(0, 0.0)
    assert size.size == 1


def test_a_fixed_chunk_size_learns_nothing() -> None:
    size = ChunkSize(7, first=1, limit=50)
    size.observe(7, 10.0)
    assert size.size == 7


@pytest.mark.parametrize(
    ("cursor", "message"),
    [
        (Cursor(epoch=-1), "cursor must be in epoch 0 or later, .* got epoch -1, position 0"),
        (Cursor(position=11, samples=11, batches=1), "at a position of 0 to 10, got epoch 0, position 11"),
        (Cursor(position=-4), "got epoch 0, position -4"),
        (Cursor(position=3, samples=3, batches=1), "does not fit a batch size of 4: after 1 batches it counts 3"),
        (Cursor(position=8, samples=4, batches=1), "does not fit a batch size of 4: .* is at position 8"),
        (Cursor(position=4, samples=4, batches=1, skipped=(2,)), "does not fit a batch size of 4"),
    ],
)
def test_a_cursor_that_does_not_fit_is_told(cursor: Cursor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(samples=10, batch_size=4).check(cursor)


def test_a_cursor_counts_what_was_skipped_as_well() -> None:
    Plan(samples=10, batch_size=4).check(Cursor(position=6, samples=4, batches=1, skipped=(0, 2)))


# Streams


@given(st.integers(0, 30), st.integers(1, 8), st.integers(1, 9), st.booleans())
def test_a_stream_fills_the_slabs_that_a_plan_of_its_length_would_make(
    length: int, batch_size: int, chunk: int, known: bool
) -> None:
    records = [Record(ArrayDataset(np.zeros((1, 2, 2), np.uint8), [0])[0].source, label) for label in range(length)]
    size = ChunkSize(chunk, 1, batch_size)
    filling = Filling(3, 0, batch_size, length if known else None, size)
    chunks = [chunk for record in records for chunk in filling.add(record)] + list(filling.end())
    labels = [record.label for chunk in chunks for record in chunk.records or []]
    assert labels == list(range(length))
    assert [position for chunk in chunks for position in chunk.positions.tolist()] == list(range(length))
    assert all(chunk.slab.epoch == 3 for chunk in chunks)
    assert all(chunk.stop - chunk.start <= max(size.size, 1) for chunk in chunks)
    closing = [chunk.slab for chunk in chunks if chunk.closes]
    full = [batch_size] * (length // batch_size)
    rest = [length % batch_size] if length % batch_size or not known or not length else []
    assert [slab.size for slab in closing] == full + rest
    assert [slab.ends_epoch for slab in closing] == [False] * (len(closing) - 1) + [True]


# Reading and decoding


class StopsAt:
    """A source at whose reading, or naming, a stop is asked for."""

    def __init__(self, stopping: threading.Event) -> None:
        self.stopping = stopping

    def read(self) -> Array:
        self.stopping.set()
        return np.zeros((4, 4), np.uint8)

    def __str__(self) -> str:
        return "stops"


class Broken:
    """A source that cannot be read, or whose bytes are no image."""

    def __init__(self, readable: bool) -> None:
        self.readable = readable

    def read(self) -> bytes:
        if self.readable:
            return b"no image"
        raise ReadError(str(self), "cannot be read: no disk")

    def __str__(self) -> str:
        return "broken"


class Changed(ArrayDataset):
    """Eight images, each all of its own number times ten, with other sources in the place of some."""

    def __init__(self, changes: dict[int, Any]) -> None:
        pixels = np.repeat(np.arange(8, dtype=np.uint8) * 10, 16).reshape(8, 4, 4)
        super().__init__(pixels, [0, 1] * 4)
        self.changes = changes

    def __getitem__(self, index: int, /) -> Record:
        record = super().__getitem__(index)
        return replace(record, source=self.changes[index]) if index in self.changes else record


def work_on(dataset: Changed, stopping: threading.Event | None = None) -> Work:
    order = Sampler(8, 0, shuffle=False)
    return Work(dataset, order, ImageSettings((4, 4), 1), None, 0, None, stopping or threading.Event())


def a_chunk() -> Chunk:
    (chunk,) = Plan(8, 8).chunks(Cursor(), None, ChunkSize(8, 8, 8))
    chunk.slab.allocate((4, 4, 1))[...] = 255
    return chunk


def greys(chunk: Chunk) -> list[int]:
    assert chunk.slab.images is not None
    greys: list[int] = chunk.slab.images[:, 0, 0, 0].tolist()
    return greys


def test_a_chunk_is_read_and_decoded_into_its_slab() -> None:
    work, chunk = work_on(Changed({})), a_chunk()
    assert work.decode(work.read(chunk)) is chunk
    assert greys(chunk) == [0, 10, 20, 30, 40, 50, 60, 70]
    assert chunk.slab.labels.tolist() == [0, 1] * 4
    assert chunk.slab.names == [f"array[{number}]" for number in range(8)]
    assert chunk.slab.bad == {}


def test_reading_a_chunk_ends_with_the_sample_at_which_a_stop_is_asked_for() -> None:
    stopping = threading.Event()
    read = work_on(Changed({2: StopsAt(stopping)}), stopping=stopping).read(a_chunk())
    assert [content is not None for content in read.contents] == [True] * 3 + [False] * 5


def test_decoding_a_chunk_ends_with_the_sample_at_which_a_stop_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping, chunk = threading.Event(), a_chunk()

    def stop_at_the_third(content: Array, *_: object, out: Array) -> None:
        out[...] = content[..., None]
        if content[0, 0] == 20:
            stopping.set()

    monkeypatch.setattr("asynctrain.data.batching.decode", stop_at_the_third)
    work = work_on(Changed({}), stopping=stopping)
    work.decode(work.read(chunk))
    assert greys(chunk) == [0, 10, 20] + [255] * 5


@pytest.mark.parametrize(("readable", "kind"), [(True, DecodeError), (False, ReadError)])
def test_a_bad_sample_is_left_out_with_its_reason(readable: bool, kind: type[DecodeError]) -> None:
    changes = {2: Broken(readable), 5: Broken(readable)}
    work, chunk = work_on(Changed(changes)), a_chunk()
    work.decode(work.read(chunk))
    assert {row: type(error) for row, error in chunk.slab.bad.items()} == {2: kind, 5: kind}
    assert [grey for row, grey in enumerate(greys(chunk)) if row not in (2, 5)] == [0, 10, 30, 40, 60, 70]


def test_chunks_of_small_images_are_told_from_those_of_photos() -> None:
    def read(*contents: Any) -> ReadChunk:
        return ReadChunk(a_chunk(), [], np.arange(len(contents)), list(contents), np.ones(len(contents), np.bool_))

    assert read(b"x" * 4095, None).tiny
    assert not read(b"x" * 4096).tiny
    assert read(b"x" * 5000, b"x" * 3000).tiny
    assert not read(np.zeros((64, 64), np.uint8)).tiny
    assert read(None, None).tiny, "the slab holds them already, 16 bytes each"


class Fresh(Augmentation):
    """Returns another array than it was given."""

    def __call__(self, images: Array, draws: Draws) -> Array:
        return images + draws.integers(0, 100).astype(np.uint8)[:, None, None, None]


@pytest.mark.parametrize("augmentation", [Fresh(), standard()])
def test_an_augmented_chunk_has_the_pixels_of_its_samples_augmented_alone(augmentation: Augmentation) -> None:
    work, chunk = replace(work_on(Changed({})), augmentation=augmentation, seed=9), a_chunk()
    work.decode(work.read(chunk))
    assert chunk.slab.images is not None
    for position, image in enumerate(chunk.slab.images):
        alone = np.full((1, 4, 4, 1), 10 * position, np.uint8)
        assert np.array_equal(augmentation(alone, Draws(9, 0, np.array([position])))[0], image)


def test_an_empty_chunk_passes() -> None:
    slab = Slab(0, 8, 8, ends_epoch=True)
    slab.size = 0
    slab.allocate((4, 4, 1))
    work = replace(work_on(Changed({})), augmentation=standard())
    chunk = Chunk(slab, 0, 0, True, [])
    assert work.decode(work.read(chunk)) is chunk


# Assembling


def slabs_of(samples: int, size: int, bad: Iterable[int], start: int = 0, epoch: int = 0) -> Iterator[Slab]:
    """Yield the slabs of an epoch, decoded: the image at each position is all of that number."""
    for position in range(start, samples, size):
        stop = min(position + size, samples)
        slab = Slab(epoch, position, stop - position, stop == samples)
        slab.allocate((1, 1, 1))[...] = np.arange(position, stop).reshape(-1, 1, 1, 1)
        slab.labels[...] = np.arange(position, stop)
        slab.names = [f"s{number}" for number in range(position, stop)]
        slab.bad = {
            number - position: DecodeError(f"s{number}", "is bad") for number in bad if position <= number < stop
        }
        yield slab


def assembled(slabs: Iterable[Slab], assembler: Assembler) -> list[Pieces]:
    return [pieces for slab in slabs for pieces in assembler.add(slab)]


def assembler_of(
    samples: int, batch_size: int, drop_last: bool = False, cursor: Cursor | None = None, most: int | float = 1.0
) -> Assembler:
    return Assembler(cursor or Cursor(), batch_size, drop_last, Budget(most, samples))


samples_and_bad = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1))))


@given(samples_and_bad, st.integers(1, 8), st.booleans())
def test_batches_are_the_good_samples_in_order_and_full_but_for_the_last(
    samples_and_bad: tuple[int, set[int]], batch_size: int, drop_last: bool
) -> None:
    samples, bad = samples_and_bad
    assembler = assembler_of(samples, batch_size, drop_last)
    pieces = assembled(slabs_of(samples, batch_size, bad), assembler)
    good = [position for position in range(samples) if position not in bad]
    if drop_last:
        good = good[: len(good) - len(good) % batch_size]
    expected = [good[start : start + batch_size] for start in range(0, len(good), batch_size)]
    batches = [piece.batch() for piece in pieces]
    assert [batch.labels.tolist() for batch in batches] == expected
    for batch in batches:
        assert batch.images[:, 0, 0, 0].tolist() == batch.labels.tolist()
        assert batch.sources == tuple(f"s{label}" for label in batch.labels)
        assert batch.images.flags.c_contiguous
    told = [skipped.position for batch in batches for skipped in batch.skipped]
    told += [skipped.position for skipped in assembler.take_news()]
    assert told == sorted(bad)


@given(samples_and_bad, st.integers(1, 8), st.booleans())
def test_a_cursor_counts_what_its_epoch_has_delivered_and_lists_what_it_skipped(
    samples_and_bad: tuple[int, set[int]], batch_size: int, drop_last: bool
) -> None:
    samples, bad = samples_and_bad
    for number, pieces in enumerate(
        assembled(slabs_of(samples, batch_size, bad), assembler_of(samples, batch_size, drop_last)), start=1
    ):
        rows = pieces.rows[-1]
        if pieces.last:
            assert pieces.cursor == Cursor(epoch=1)
        else:
            position = rows.slab.start + rows.stop
            skipped = tuple(sorted(place for place in bad if place < position))
            assert pieces.cursor == Cursor(0, position, number * batch_size, number, skipped)
            Plan(samples, batch_size).check(pieces.cursor)


@given(samples_and_bad, st.integers(1, 8), st.integers(1, 11), st.booleans())
def test_how_an_epoch_is_cut_into_slabs_changes_nothing(
    samples_and_bad: tuple[int, set[int]], batch_size: int, size: int, drop_last: bool
) -> None:
    def told(slab_size: int) -> list[tuple[object, ...]]:
        slabs = slabs_of(samples, slab_size, bad)
        return [
            (pieces.batch().sources, pieces.cursor, pieces.last, pieces.skipped, pieces.first_position)
            for pieces in assembled(slabs, assembler_of(samples, batch_size, drop_last))
        ]

    samples, bad = samples_and_bad
    assert told(size) == told(batch_size)


def test_good_samples_that_are_neighbours_become_batches_without_a_copy() -> None:
    (slab,) = slabs_of(10, 10, [0])
    first, second, rest = (pieces.batch() for pieces in assembler_of(10, 4).add(slab))
    assert slab.images is not None
    assert [np.shares_memory(batch.images, slab.images) for batch in (first, second, rest)] == [True] * 3
    assert not np.shares_memory(first.images, second.images)
    assert [batch.labels.tolist() for batch in (first, second, rest)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_without_a_budget_the_first_bad_sample_is_raised_after_the_batches_before_it() -> None:
    (slab,) = slabs_of(12, 12, [7, 9])
    batches = Assembler(Cursor(), 3, drop_last=False, budget=None).add(slab)
    assert [next(batches).batch().labels.tolist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(DecodeError, match="s7: is bad"):
        next(batches)


def test_the_epoch_of_a_batch_after_which_all_are_bad_ends_without_being_told_by_it() -> None:
    first, second = assembled([*slabs_of(8, 4, range(4, 8)), *slabs_of(8, 4, range(4, 8), epoch=1)], assembler_of(8, 4))
    assert (first.last, first.cursor) == (False, Cursor(0, 4, 4, 1))
    assert (second.last, second.cursor) == (False, Cursor(1, 4, 4, 1))
    assert [skipped.position for skipped in second.skipped] == [4, 5, 6, 7], "of the epoch before"


def test_a_batch_after_which_samples_are_left_out_is_not_the_last_one_or_their_bad_ones_would_be_forgotten() -> None:
    assembler = assembler_of(8, 4, drop_last=True)
    (pieces,) = assembled(slabs_of(8, 4, [1, 6]), assembler)
    assert pieces.batch().labels.tolist() == [0, 2, 3, 4]
    assert (pieces.last, pieces.cursor.position) == (False, 5)
    assert [skipped.position for skipped in assembler.take_news()] == [6]


def test_mixing_gets_the_epoch_and_the_position_of_the_first_good_sample() -> None:
    def mix(images: Array, labels: Array, epoch: int, first: int) -> tuple[Array, Array]:
        return images, np.full((len(labels), 2), [epoch, first], np.float32)

    batches = [pieces.mixed(mix) for pieces in assembled(slabs_of(8, 4, [0, 1, 6], epoch=3), assembler_of(8, 4))]
    assert [batch.labels[0].tolist() for batch in batches] == [[3, 2], [3, 7]]


# The budget


def skipped_until(budget: Budget, samples: int) -> int:
    """Return how many may be skipped, if all of so many are bad."""
    for number in range(samples):
        with suppress(TooManyBadSamples):
            budget.check(number + 1, Skipped(0, number, f"s{number}", "is bad"))
            continue
        return number
    return samples


@pytest.mark.parametrize(
    ("most", "samples", "allowed"),
    [(0, 20, 0), (3, 20, 3), (1, 20, 1), (0.0, 20, 0), (0.1, 20, 2), (0.09, 20, 1), (1.0, 20, 20), (100, 20, 20)],
)
def test_a_budget_is_a_count_or_a_share(most: int | float, samples: int, allowed: int) -> None:
    assert skipped_until(Budget(most, samples), samples) == allowed


def test_where_the_length_is_not_known_the_share_is_of_those_so_far_but_of_a_hundred_at_least() -> None:
    budget = Budget(0.05, None)
    assert skipped_until(budget, 50) == 5
    budget.check(10, Skipped(0, 199, "s199", "is bad"))
    with pytest.raises(TooManyBadSamples, match=r"s198: 10 bad samples in this epoch are more than 5.0% of 199"):
        budget.check(10, Skipped(0, 198, "s198", "is bad"))


def test_the_error_tells_the_file_the_budget_and_the_reason() -> None:
    with pytest.raises(TooManyBadSamples) as caught:
        Budget(2, 20).check(3, Skipped(0, 7, "a.png", "is no image"))
    assert str(caught.value) == "a.png: 3 bad samples in this epoch are more than 2; this one is no image"


def test_batches_that_are_complete_before_a_budget_is_spent_are_delivered() -> None:
    (slab,) = slabs_of(12, 12, [7])
    batches = assembler_of(12, 3, most=0).add(slab)
    assert [next(batches).batch().labels.tolist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(TooManyBadSamples, match="s7: 1 bad samples"):
        next(batches)


def test_a_budget_is_counted_anew_in_each_epoch_and_goes_on_after_a_resume() -> None:
    bad = [1, 5, 9]
    slabs = [slab for epoch in range(3) for slab in slabs_of(12, 4, bad, epoch=epoch)]
    pieces = assembled(slabs, assembler_of(12, 4, most=3))
    assert sum(piece.samples for piece in pieces) == 27
    cursor = pieces[0].cursor
    assert cursor.skipped == (1,)
    with pytest.raises(TooManyBadSamples, match="s9: 3 bad samples"):
        assembled(slabs_of(12, 4, bad, start=cursor.position), assembler_of(12, 4, cursor=cursor, most=2))
