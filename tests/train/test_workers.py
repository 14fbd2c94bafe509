"""What a run tells of workers that come, go and are late."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import asynctrain as at
from asynctrain import types
from asynctrain.errors import WorkerLostError
from asynctrain.testing import Faults, SimulatedExecutor
from asynctrain.train.events import (
    Event,
    RunStart,
    Speculated,
    StepEnd,
    WorkerJoined,
    WorkerLost,
    from_json,
    of_worker,
    to_json,
)

QUIET = Faults(0, kill=0, freeze=0, slow=0, late=0, hire=(60, 60))
DATA = at.ArrayDataset(np.zeros((12, 2, 2, 1), np.uint8), np.arange(12) % 2, classes=("even", "odd"))


def loader() -> at.Loader:
    return at.Loader(DATA, batch_size=4, image_size=(2, 2), channels=1, seed=0)


def trainer(executor: at.Executor) -> at.Trainer:
    model = at.models.linear(num_classes=2, image_shape=(2, 2, 1))
    return at.Trainer(model, optimizer=at.optim.sgd(0.1), executor=executor, microbatch=1)


async def test_workers_that_join_and_are_lost_are_events_and_callbacks_hear_of_them() -> None:
    heard: list[Event] = []
    async with SimulatedExecutor(2, QUIET) as executor:

        def lose_one(event: Event) -> None:
            heard.append(event)
            if isinstance(event, StepEnd) and event.step == 2:
                executor.crews[0].lose("worker-1", "it was killed")

        async with trainer(executor).start(loader(), epochs=2, callbacks=[lose_one]) as run:
            events = [event async for event in run]
        quiet = await trainer(executor).fit(loader(), epochs=2)
    workers = [event for event in events if isinstance(event, WorkerJoined | WorkerLost)]
    assert isinstance(events[0], RunStart), "whatever joined before"
    assert workers[:3] == [
        WorkerJoined("worker-0", 1),
        WorkerJoined("worker-1", 1),
        WorkerLost("worker-1", "it was killed"),
    ]
    assert [event for event in heard if isinstance(event, WorkerJoined | WorkerLost)] == workers
    assert run.state.digest() == quiet.state.digest()


async def test_without_workers_the_run_fails_and_names_the_last_checkpoint(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    async with SimulatedExecutor(1, QUIET, worker_wait=0.05) as executor:

        def lose_all(event: Event) -> None:
            if isinstance(event, StepEnd) and event.step == 2:
                executor.crews[0].lose("worker-0", "it was killed")

        with pytest.raises(WorkerLostError, match=r"there was no worker for 0\.05 s; the last one lost was") as caught:
            await trainer(executor).fit(loader(), epochs=2, callbacks=[lose_all], run_dir=run_dir)
    (checkpoint,) = (run_dir / "checkpoints").glob("*2.safetensors")
    assert caught.value.__notes__[-1] == f"the last checkpoint is {checkpoint}"
    async with at.InlineExecutor() as inline:
        resumed = await trainer(inline).resume(checkpoint, loader(), epochs=2, run_dir=run_dir)
        whole = await trainer(inline).fit(loader(), epochs=2)
    assert resumed.state.digest() == whole.state.digest()


@pytest.mark.parametrize(
    ("notice", "event"),
    [
        (types.WorkerJoined("a", 2), WorkerJoined("a", 2)),
        (types.WorkerLost("a", "it was killed"), WorkerLost("a", "it was killed")),
        (types.Speculated("b", "a", 6, 3), Speculated("b", "a", 7, 3)),
        (types.Speculated("b", "a", 6, None), Speculated("b", "a", 6, None)),
        (types.Speculated("b", "a", -7, None), Speculated("b", "a", 6, None)),
    ],
)
def test_notices_become_events_whose_steps_count_from_one(notice: types.Notice, event: Event) -> None:
    assert of_worker(notice) == event
    assert from_json(to_json(event)) == event
