"""Runs over a folder in which some files are broken: what they tell, when their epochs end, how they go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import asynctrain as at
from asynctrain.data import Sampler
from asynctrain.errors import TooManyBadSamples
from asynctrain.train.events import EpochEnd, Evaluation, Event, RunEnd, RunStart, SampleSkipped, StepEnd

pytestmark = pytest.mark.one_loop

SCATTERED = frozenset(range(5, 180, 29))  # seven of them, so that 173 are left: four batches of 40 and one of 13
TAIL = frozenset(range(160, 180))  # all after the fourth batch: nothing tells that it was the last one
HALF_A_BATCH_AND_TAIL = frozenset({*range(20, 40), *range(140, 180)})  # likewise, with batches of several slabs

Folder = Callable[[frozenset[int]], at.ImageFolder]


@pytest.fixture
def folder(blob_folder: Path, tmp_path: Path) -> Folder:
    """Return what makes a copy of the blobs with the given ones broken: truncated, or gone, in turns."""

    def make(bad: frozenset[int]) -> at.ImageFolder:
        shutil.copytree(blob_folder, tmp_path / "blobs")
        dataset = at.ImageFolder(tmp_path / "blobs")
        for index in bad:
            path = Path(str(dataset[index].source))
            if index % 2:
                path.unlink()
            else:
                path.write_bytes(path.read_bytes()[:50])
        return dataset

    return make


def loader(dataset: at.ImageFolder, **options: Any) -> at.Loader:
    usual = {"batch_size": 40, "image_size": (12, 12), "channels": 1, "errors": "skip", "max_skipped": 0.4}
    return at.Loader(dataset, **{**usual, **options})


def trainer(model: at.Model, executor: at.InlineExecutor) -> at.Trainer:
    return at.Trainer(model, optimizer=at.optim.adamw(1e-2), executor=executor, microbatch=12, seed=3)


async def events_of(model: at.Model, data: at.Loader, epochs: int) -> list[Event]:
    async with at.InlineExecutor() as executor, trainer(model, executor).start(data, epochs=epochs) as run:
        return [event async for event in run]


def ends(epochs: tuple[EpochEnd, ...]) -> list[tuple[object, ...]]:
    """What the ends of epochs tell, but for how long they took."""
    return [(end.epoch, end.step, end.loss, end.accuracy, end.samples) for end in epochs]


async def test_each_skipped_file_is_told_in_its_epoch_with_position_path_and_reason(
    model: at.Model, folder: Folder
) -> None:
    dataset = folder(SCATTERED)
    events = await events_of(model, loader(dataset, seed=7), epochs=2)
    skipped = [event for event in events if isinstance(event, SampleSkipped)]
    expected = [
        (epoch, position, str(dataset[index].source))
        for epoch in (1, 2)
        for position, index in enumerate(Sampler(180, 7).order(epoch - 1).tolist())
        if index in SCATTERED
    ]
    assert [(event.epoch, event.position, event.source) for event in skipped] == expected
    assert all(event.reason for event in skipped)
    for epoch in (1, 2):
        last_told = max(
            n for n, event in enumerate(events) if isinstance(event, SampleSkipped) and event.epoch == epoch
        )
        end = next(n for n, event in enumerate(events) if isinstance(event, EpochEnd) and event.epoch == epoch)
        assert last_told < end


@pytest.mark.parametrize(
    ("bad", "batches"),
    [(SCATTERED, [40, 40, 40, 40, 13]), (TAIL, [40] * 4), (HALF_A_BATCH_AND_TAIL, [40] * 3)],
    ids=["scattered", "tail", "half a batch and tail"],
)
async def test_each_epoch_ends_once_after_its_last_batch(
    bad: frozenset[int], batches: list[int], model: at.Model, folder: Folder
) -> None:
    events = await events_of(model, loader(folder(bad), shuffle=False), epochs=3)
    told = [event for event in events if not isinstance(event, SampleSkipped)]
    kinds = [type(event) for event in told]
    assert kinds == [RunStart, *[*[StepEnd] * len(batches), EpochEnd] * 3, RunEnd]
    steps = [event for event in told if isinstance(event, StepEnd)]
    assert [(event.epoch, event.samples) for event in steps] == [(e, n) for e in (1, 2, 3) for n in batches]
    epochs = [event for event in told if isinstance(event, EpochEnd)]
    assert [(event.epoch, event.step, event.samples) for event in epochs] == [
        (e, e * len(batches), sum(batches)) for e in (1, 2, 3)
    ]


async def test_files_skipped_after_the_last_batch_are_told_before_their_epoch_ends(
    model: at.Model, folder: Folder
) -> None:
    events = await events_of(model, loader(folder(TAIL), shuffle=False), epochs=2)
    told = [(event.epoch, event.position) for event in events if isinstance(event, SampleSkipped)]
    assert told == [(epoch, position) for epoch in (1, 2) for position in sorted(TAIL)]


@pytest.mark.parametrize(
    ("bad", "shuffle"),
    [(SCATTERED, True), (TAIL, False), (HALF_A_BATCH_AND_TAIL, False)],
    ids=["scattered", "tail", "half a batch and tail"],
)
async def test_resumed_from_any_state_a_run_has_the_bits_of_the_uninterrupted_one(
    bad: frozenset[int], shuffle: bool, model: at.Model, folder: Folder
) -> None:
    data = loader(folder(bad), shuffle=shuffle)
    async with at.InlineExecutor() as executor:
        whole = await trainer(model, executor).fit(data, epochs=2)
        for step in range(1, whole.state.step + 1, 1 if bad is TAIL else 2):
            async with trainer(model, executor).start(data, epochs=2) as run:
                async for event in run:
                    if isinstance(event, StepEnd) and event.step == step:
                        break
                half = await run.stop()
            rest = await trainer(model, executor).fit(data, epochs=2, state=half.state)
            assert rest.state.digest() == whole.state.digest()
            assert rest.state.step == whole.state.step
            assert ends(rest.epochs) == ends(whole.epochs)


async def test_a_finished_run_whose_last_files_are_bad_goes_on_with_the_next_epoch(
    model: at.Model, folder: Folder
) -> None:
    data = loader(folder(TAIL), shuffle=False)
    async with at.InlineExecutor() as executor:
        whole = await trainer(model, executor).fit(data, epochs=3)
        first = await trainer(model, executor).fit(data, epochs=1)
        rest = await trainer(model, executor).fit(data, epochs=3, state=first.state)
    assert first.state.cursor.epoch == 0, "nothing told that the epoch was over"
    assert rest.state.digest() == whole.state.digest()
    assert ends(rest.epochs) == ends(whole.epochs)


async def test_more_broken_files_than_the_budget_fail_the_run_with_the_file_after_the_steps_before_it(
    model: at.Model, folder: Folder
) -> None:
    dataset = folder(TAIL)
    data = loader(dataset, shuffle=False, max_skipped=3)
    async with at.InlineExecutor() as executor:
        learning = trainer(model, executor)
        with pytest.raises(TooManyBadSamples, match="4 bad samples in this epoch are more than 3") as caught:
            await learning.fit(data, epochs=2)
        assert caught.value.path == str(dataset[163].source)
        assert learning.state.step == 4


async def test_validation_on_a_folder_with_broken_files_leaves_them_out(model: at.Model, folder: Folder) -> None:
    data = loader(folder(SCATTERED))
    async with at.InlineExecutor() as executor:
        evaluation = await trainer(model, executor).evaluate(data.evaluating(data.dataset))
    assert evaluation.samples == 173
    sources = [str(data.dataset[index].source) for index in sorted(SCATTERED)]
    assert [one.source for one in evaluation.skipped] == sources
    assert at.EvaluationResult.from_json(json.loads(json.dumps(asdict(evaluation)))) == evaluation


async def test_what_a_validation_leaves_out_is_told_before_what_it_finds(
    model: at.Model, folder: Folder, blob_folder: Path
) -> None:
    broken = folder(SCATTERED)
    data = loader(at.ImageFolder(blob_folder))
    async with at.InlineExecutor() as executor, trainer(model, executor).start(data, epochs=2, validate=broken) as run:
        told = [event async for event in run if isinstance(event, SampleSkipped | Evaluation)]
    sources = [str(broken[index].source) for index in sorted(SCATTERED)]
    assert [getattr(event, "source", "found") for event in told] == [*sources, "found"] * 2
    assert {event.epoch for event in told[:8]} == {1}
    assert not any(event.result.skipped for event in told if isinstance(event, Evaluation)), "kept in no history"
