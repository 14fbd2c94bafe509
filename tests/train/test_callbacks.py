"""The ready callbacks: logs that outlive a resume, a guard, the best model as a file."""

from __future__ import annotations

import csv
import json
import logging
import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

import asynctrain as at
from asynctrain import callbacks
from asynctrain.train.events import Callback, EpochEnd, Event, Paused, Resumed, RunEnd, RunStart, StepEnd

pytestmark = pytest.mark.one_loop


def start(step: int, number: int = 0) -> RunStart:
    return RunStart(
        epochs=3, step=step, steps=15, steps_per_epoch=5, samples_per_epoch=180, parameters=7, number=number
    )


def epoch(number: int, loss: float, metrics: dict[str, Any] | None = None) -> EpochEnd:
    validation = at.EvaluationResult(loss / 2, 0.75, 60, metrics or {})
    return EpochEnd(number, 5 * number, loss, 0.5, 180, 1.5, validation)


async def feed(callback: Callback, *events: Event) -> None:
    for event in events:
        waiting = callback(event)
        if waiting is not None:
            await waiting


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def trainer(model: at.Model, executor: at.Executor) -> at.Trainer:
    return at.Trainer(model, optimizer=at.optim.adam(1e-2), executor=executor)


# Logs


async def test_a_csv_log_has_a_line_for_each_epoch_with_the_names_that_monitors_have(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    await feed(callbacks.CSVLog(path), start(0), epoch(1, 2.0, {"top_5": 0.875, "confusion": [[1]]}))
    (row,) = rows(path)
    assert row == {
        "epoch": "1",
        "step": "5",
        "samples": "180",
        "seconds": "1.5",
        "loss": "2.0",
        "accuracy": "0.5",
        "validation.loss": "1.0",
        "validation.accuracy": "0.75",
        "validation.top_5": "0.875",
    }


async def test_a_csv_log_begins_anew_with_a_new_run(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    await feed(callbacks.CSVLog(path), start(0), epoch(1, 2.0), epoch(2, 1.0))
    await feed(callbacks.CSVLog(path), start(0), epoch(1, 8.0))
    assert [row["loss"] for row in rows(path)] == ["8.0"]


async def test_epochs_that_are_done_again_after_a_resume_stand_in_a_csv_log_once(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    await feed(callbacks.CSVLog(path), start(0), epoch(1, 4.0), epoch(2, 3.0), epoch(3, 2.0))
    await feed(callbacks.CSVLog(path), start(7), epoch(2, 30.0))
    assert [(row["epoch"], row["loss"]) for row in rows(path)] == [("1", "4.0"), ("2", "30.0")]


async def test_a_metric_that_comes_later_gets_a_column_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    early = EpochEnd(1, 5, 2.0, 0.5, 180, 1.5, None)
    await feed(callbacks.CSVLog(path), start(0), early, epoch(2, 1.0))
    assert [row["validation.loss"] for row in rows(path)] == ["", "0.5"]


async def test_the_logs_of_a_run_in_two_parts_are_those_of_one_in_one_part(
    tmp_path: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    async with at.ThreadExecutor(1) as executor:

        def logs(name: str) -> list[Callback]:
            return [callbacks.CSVLog(tmp_path / f"{name}.csv"), callbacks.JSONLines(tmp_path / f"{name}.jsonl")]

        await trainer(model, executor).fit(loader, epochs=3, validate=blobs, callbacks=logs("one"))
        two = trainer(model, executor)
        await two.fit(loader, steps=8, validate=blobs, callbacks=logs("two"), run_dir=tmp_path / "run")
        await two.resume(tmp_path / "run", loader, epochs=3, validate=blobs, callbacks=logs("two"))

    def told(name: str) -> list[dict[str, str]]:
        return [{key: row[key] for key in row if key != "seconds"} for row in rows(tmp_path / f"{name}.csv")]

    def steps(name: str) -> list[Any]:
        return [(e["step"], e["loss"]) for e in lines(tmp_path / f"{name}.jsonl") if e["event"] == "StepEnd"]

    assert len(told("one")) == 3
    assert told("two") == told("one")
    assert steps("two") == steps("one")
    assert [step for step, _ in steps("two")] == list(range(1, 16))


@pytest.mark.usefixtures("no_blocking_calls")
async def test_no_log_blocks_the_loop(tmp_path: Path, model: at.Model, loader: at.Loader) -> None:
    async with at.ThreadExecutor(1) as executor:
        training = trainer(model, executor)
        logs: list[Callback] = [
            callbacks.CSVLog(tmp_path / "log.csv"),
            callbacks.JSONLines(tmp_path / "log.jsonl"),
            callbacks.TensorBoard(tmp_path / "board"),
            callbacks.SaveBest(tmp_path / "best.safetensors", training, loader.classes),
        ]
        await training.fit(loader, epochs=2, controllers=[at.KeepBest("loss")], callbacks=logs)
    assert names(tmp_path) == {"log.csv", "log.jsonl", "board", "best.safetensors"}


async def test_json_lines_hold_every_event_in_order_as_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    step = StepEnd(1, 1, math.nan, 0.5, 40, 100.0, number=1)
    await feed(callbacks.JSONLines(path), start(0), step, RunEnd("finished", 1, 1.0, number=2))
    assert [line["event"] for line in lines(path)] == ["RunStart", "StepEnd", "RunEnd"]
    assert lines(path)[1]["loss"] is None


async def test_steps_wait_to_be_written_together_for_a_second_at_most(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = callbacks.JSONLines(path)

    async def written_after(seconds: float) -> int:
        await feed(log, StepEnd(1, 1, 0.5, 0.5, 40, 100.0, time=seconds))
        return len(lines(path))

    await feed(log, start(0))
    assert [await written_after(seconds) for seconds in (10.0, 10.5, 10.99, 11.0, 11.1)] == [1, 1, 1, 5, 5]
    await feed(log, Paused(5))
    assert len(lines(path)) == 7


async def test_json_lines_of_a_resumed_run_go_on_behind_a_line_that_a_crash_has_torn(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    await feed(callbacks.JSONLines(path), start(0), replace(epoch(1, 1.0), number=1))
    with path.open("a") as file:
        file.write('{"event": "StepE')
    await feed(callbacks.JSONLines(path), start(5, number=2), Resumed(5, 2, number=3))
    assert [line["number"] for line in lines(path)] == [0, 1, 2, 3]
    await feed(callbacks.JSONLines(path), start(0))
    assert len(lines(path)) == 1


def tensorboard_events(folder: Path) -> Iterator[Any]:
    """Yield what is in the event files of ``folder``, read as the format has it: length, checksum, data, checksum."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at_byte = path.read_bytes(), 0
        while at_byte < len(content):
            (length,) = struct.unpack_from("<Q", content, at_byte)
            event = event_pb2.Event()
            event.ParseFromString(content[at_byte + 12 : at_byte + 12 + length])
            yield event
            at_byte += length + 16


async def test_tensorboard_gets_figures_over_the_steps(
    tmp_path: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    async with at.ThreadExecutor(1) as executor:
        board = callbacks.TensorBoard(tmp_path / "board")
        history = await trainer(model, executor).fit(loader, epochs=2, validate=blobs, callbacks=[board])
    found: dict[str, dict[int, float]] = {}
    for event in tensorboard_events(tmp_path / "board"):
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    assert set(found) == {
        *("step/loss", "step/accuracy", "step/samples_per_second", "epoch/loss", "epoch/accuracy"),
        *("validation/loss", "validation/accuracy"),
    }
    assert list(found["step/loss"]) == list(range(1, 11))
    assert found["epoch/loss"] == pytest.approx({epoch.step: epoch.loss for epoch in history.epochs})
    assert found["validation/loss"] == pytest.approx({e.step: e.result.loss for e in history.evaluations})


async def test_a_resumed_run_tells_tensorboard_from_where_on_earlier_figures_do_not_count(tmp_path: Path) -> None:
    await feed(callbacks.TensorBoard(tmp_path), start(0), epoch(1, 1.0), RunEnd("cancelled", 5, 1.0))
    await feed(callbacks.TensorBoard(tmp_path), start(3, number=9), RunEnd("finished", 5, 1.0))
    status = event_pb2.SessionLog.START
    begun = [event.step for event in tensorboard_events(tmp_path) if event.session_log.status == status]
    assert begun == [1, 4]


# The guard


async def test_an_error_in_an_optional_callback_is_logged_and_the_run_goes_on(
    model: at.Model, loader: at.Loader, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(event: Event) -> None:
        if isinstance(event, EpochEnd):
            raise OSError("no space left")

    async def fails_later(event: Event) -> None:
        fails(event)

    async with at.ThreadExecutor(1) as executor:
        guarded = [callbacks.optional(fails), callbacks.optional(fails_later)]
        history = await trainer(model, executor).fit(loader, epochs=2, callbacks=guarded)
        assert history.reason == "finished"
        logged = [record for record in caplog.records if record.name == "asynctrain"]
        assert [record.levelno for record in logged] == [logging.ERROR] * 4
        assert "no space left" in str(logged[0].exc_info)
        with pytest.raises(OSError, match="no space left"):
            await trainer(model, executor).fit(loader, epochs=2, callbacks=[fails])


# The best model


def spoiling(model: at.Model, executor: at.Executor) -> at.Trainer:
    """Return a trainer that first learns and then spoils what was learned, so that the best epoch is not the last."""
    return at.Trainer(model, optimizer=at.optim.sgd(lambda step: 0.05 if step < 10 else 5.0), executor=executor)


@pytest.mark.parametrize("parts", [1, 2])
async def test_the_file_of_the_best_model_holds_the_weights_of_the_best_epoch_resumed_or_not(
    tmp_path: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, parts: int
) -> None:
    file, keep = tmp_path / "best.safetensors", at.KeepBest("validation.accuracy")
    async with at.ThreadExecutor(1) as executor:
        training = spoiling(model, executor)
        if parts == 2:  # the best weights are found in the first part, and written in the second
            await training.fit(loader, steps=17, validate=blobs, controllers=[keep], run_dir=tmp_path / "run")
        best = callbacks.SaveBest(file, training, loader.classes)
        resume = tmp_path / "run" if parts == 2 else None
        history = await training.fit(
            loader, epochs=4, validate=blobs, controllers=[keep], callbacks=[best], resume=resume
        )
        found = history.best("validation.accuracy")
        until = await spoiling(model, executor).fit(loader, epochs=found.epoch, validate=blobs)
    assert found.epoch < 3
    probe = np.asarray(blobs[0].source.read())
    expected = at.Classifier.from_state(model, until.state, classes=loader.classes)
    assert await at.Classifier.load(file).predict(probe) == await expected.predict(probe)
