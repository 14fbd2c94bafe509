from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynctrain.arena import Array
from asynctrain.data import ArrayDataset, ImageSettings, Sampler
from asynctrain.data.pipeline import Chunk, Plan, decode_into, read
from asynctrain.types import Cursor, Record

plans = st.builds(Plan, st.integers(1, 60), st.integers(1, 20), st.integers(1, 25))


@given(plans, st.integers(0, 3), st.integers(1, 3))
def test_the_chunks_of_an_epoch_cover_each_position_once_and_in_order(plan: Plan, epoch: int, epochs: int) -> None:
    covered = [
        (chunk.batch.before.epoch, chunk.batch.before.position + row)
        for chunk in plan.chunks(Cursor(epoch), epoch + epochs)
        for row in range(chunk.start, chunk.stop)
    ]
    assert covered == [(e, position) for e in range(epoch, epoch + epochs) for position in range(plan.samples)]


@given(plans)
def test_no_chunk_is_larger_than_asked_or_spans_two_batches(plan: Plan) -> None:
    for chunk in plan.chunks(Cursor(), None):
        assert 1 <= chunk.stop - chunk.start <= plan.chunk
        assert 0 <= chunk.start < chunk.stop <= chunk.batch.size <= plan.batch_size
        assert chunk.closes == (chunk.stop == chunk.batch.size)


@given(plans)
def test_a_cursor_counts_what_its_epoch_has_delivered_and_begins_anew_after_the_last_batch(plan: Plan) -> None:
    batches = [chunk.batch for chunk in plan.chunks(Cursor(), None) if chunk.closes]
    assert len(batches) == plan.batches
    for number, batch in enumerate(batches[:-1], start=1):
        done = number * plan.batch_size
        assert batch.after == Cursor(epoch=0, position=done, samples=done, batches=number)
        assert not batch.last
    assert batches[-1].after == Cursor(epoch=1)
    assert batches[-1].last


@given(plans)
def test_every_cursor_that_a_plan_makes_fits_it(plan: Plan) -> None:
    for chunk in plan.chunks(Cursor(), 2):
        plan.check(chunk.batch.after)


@pytest.mark.parametrize(
    ("cursor", "message"),
    [
        (Cursor(epoch=-1), "cursor must be in epoch 0 or later, .* got epoch -1, position 0"),
        (Cursor(position=11, samples=11, batches=1), "at a position of 0 to 10, got epoch 0, position 11"),
        (Cursor(position=-4), "got epoch 0, position -4"),
        (Cursor(position=3, samples=3, batches=1), "does not fit a batch size of 4: after 1 batches it counts 3"),
        (Cursor(position=8, samples=4, batches=1), "does not fit a batch size of 4: .* is at position 8"),
    ],
)
def test_a_cursor_that_does_not_fit_is_told(cursor: Cursor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(samples=10, batch_size=4, chunk=2).check(cursor)


class StopsAt:
    """A source at whose reading, or naming, a stop is asked for."""

    def __init__(self, stopping: threading.Event) -> None:
        self.stopping = stopping

    def read(self) -> Array:
        self.stopping.set()
        return np.zeros((4, 4), np.uint8)

    def __str__(self) -> str:
        self.stopping.set()
        return "stops"


def a_chunk() -> Chunk:
    (chunk,) = Plan(samples=8, batch_size=8, chunk=8).chunks(Cursor(), None)
    return chunk


def test_reading_a_chunk_ends_with_the_sample_at_which_a_stop_is_asked_for() -> None:
    stopping = threading.Event()

    class Dataset(ArrayDataset):
        def __getitem__(self, index: int, /) -> Record:
            return Record(StopsAt(stopping), 0) if index == 2 else super().__getitem__(index)

    dataset = Dataset(np.zeros((8, 4, 4), np.uint8), [0] * 8)
    work = read(a_chunk(), dataset, Sampler(8, 0, shuffle=False), stopping)
    assert len(work.contents) == 3


def test_decoding_a_chunk_ends_with_the_sample_at_which_a_stop_is_asked_for() -> None:
    stopping = threading.Event()
    dataset = ArrayDataset(np.full((8, 4, 4), 9, np.uint8), [0] * 8)
    work = read(a_chunk(), dataset, Sampler(8, 0, shuffle=False), stopping)
    work.records[2] = Record(StopsAt(stopping), 0)
    images = np.zeros((8, 4, 4, 1), np.uint8)
    decode_into(work, images, ImageSettings((4, 4), 1), stopping)
    assert images[:, 0, 0, 0].tolist() == [9, 9, 9, 0, 0, 0, 0, 0]
