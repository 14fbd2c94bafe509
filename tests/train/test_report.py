"""The report of a run: one page, whatever state the run is in, and nothing on it from elsewhere."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from asynctrain.inference import EvaluationResult
from asynctrain.train.events import (
    EpochEnd,
    Evaluation,
    Event,
    Resumed,
    RunEnd,
    RunStart,
    SampleSkipped,
    StepEnd,
    to_json,
)
from asynctrain.train.recorded import RecordedRun, settled
from asynctrain.train.report import render, write

START = RunStart(epochs=2, step=0, steps=4, steps_per_epoch=2, samples_per_epoch=16, parameters=1234)


def step(number: int, loss: float = 1.0, attempt: int = 1) -> StepEnd:
    return StepEnd((number + 1) // 2, number, loss, 0.5, 8, 100.0, attempt)


def end_of_epoch(epoch: int, result: EvaluationResult, loss: float = 1.0) -> tuple[Evaluation, EpochEnd]:
    return Evaluation(epoch, 2 * epoch, result, 0.1), EpochEnd(epoch, 2 * epoch, loss, 0.5, 16, 1.0, result)


def run_of(folder: Path, *events: Event, classes: str = '["rose", "<b>tulip"]') -> Path:
    """Write a run folder with ``events``, a second apart."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.toml").write_text(f"[data]\nclasses = {classes}\n")
    told = [replace(event, number=number, time=1e9 + number) for number, event in enumerate(events)]
    (folder / "history.jsonl").write_text("".join(json.dumps(to_json(event)) + "\n" for event in told))
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Return a finished run that has everything."""
    return whole_run(tmp_path)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the report of such a run."""
    return render(RecordedRun.read(whole_run(tmp_path_factory.mktemp("whole"))))


def whole_run(tmp_path: Path) -> Path:
    Image.new("RGB", (8, 8), (0, 128, 0)).save(tmp_path / "green.png")
    worst = [
        {"source": str(tmp_path / "green.png"), "label": 1, "predicted": 0, "loss": 4.5},
        {"source": "array[7]", "label": 0, "predicted": 1, "loss": 0.5},
        {"source": "right.png", "label": 0, "predicted": 0, "loss": 0.25},
    ]
    result = EvaluationResult(
        0.75, 0.625, 16, {"top_5": 0.875, "confusion": [[5, 3], [3, 5]], "worst": worst, "f1": [0.25, 0.5]}
    )
    folder = run_of(
        tmp_path / "my <run>",
        START,
        step(1),
        step(2),
        SampleSkipped(1, 5, "bad & worse.png", "it is <torn>"),
        *end_of_epoch(1, result),
        RunEnd("stopped", 2, 90.0, why="validation.loss has not become better"),
    )
    (folder / "checkpoints" / "step-0000000002.safetensors").write_bytes(b"0" * 2**20)
    return folder


@pytest.mark.parametrize(
    "part",
    [
        "<h1>my &lt;run&gt;</h1>",
        "stopped after step 2: validation.loss has not become better",
        "62.50 %, epoch 1",
        "<dd>1 of 2</dd>",
        "<dd>1 min 30 s</dd>",
        "<td>0.8750</td>",
        "<td>bad &amp; worse.png</td><td>it is &lt;torn&gt;</td>",
        "<td>step-0000000002.safetensors</td><td>1.00 MiB</td>",
        "<b>rose</b>, is <b>&lt;b&gt;tulip</b><br>loss 4.50<br>green.png",
        'src="data:image/png;base64,',
        "no image file",
        "<td>&lt;b&gt;tulip</td><td>0.5000</td>",
        "<h2>Confusion matrix</h2>",
        "classes = [&quot;rose&quot;, &quot;&lt;b&gt;tulip&quot;]",
    ],
)
def test_the_report_tells(page: str, part: str) -> None:
    assert part in page


def test_what_was_predicted_right_is_no_mistake_however_large_its_loss(page: str) -> None:
    assert page.count("<figure") == 2
    assert "right.png" not in page


def test_the_report_asks_nobody_for_anything(page: str) -> None:
    assert page.count("<svg") == 2
    assert not re.search(r"<(script|link|iframe|object)\b|@import|url\((?!#)", page)
    addresses = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert addresses
    assert all(address.startswith(("data:image/png;", "#")) for address in addresses)


def test_a_run_that_has_told_no_end_is_reported_and_left_alone(run_dir: Path, tmp_path: Path) -> None:
    told = run_dir / "history.jsonl"
    torn = b"\n".join(told.read_bytes().splitlines()[:3]) + b'\n{"event": "Ep'
    told.write_bytes(torn)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    write(run_dir, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "no end is told: the run is under way, or was killed" in page
    assert "<dd>0 of 2</dd>" in page
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("events", [(), (START,), (START, RunEnd("failed", 0, 0.0, "no <space> left"))])
def test_a_run_of_which_little_is_known_has_a_report(tmp_path: Path, events: tuple[Event, ...]) -> None:
    page = render(RecordedRun.read(run_of(tmp_path / "run", *events)))
    assert "<h2>Configuration</h2>" in page
    assert ("failed after step 0: no &lt;space&gt; left" in page) == (len(events) == 2)


def test_a_folder_without_a_run_has_no_report(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="this folder holds no run"):
        write(tmp_path, tmp_path / "report.html")


# What counts of several attempts


def test_what_was_done_again_after_a_crash_counts_once_and_as_it_was_the_last_time() -> None:
    first, second = EvaluationResult(1.0, 0.5, 16), EvaluationResult(2.0, 0.5, 16)
    again = replace(START, step=1)
    events = settled(
        [
            *(START, step(1), step(2, loss=5.0), *end_of_epoch(1, first), step(3)),
            *(again, Resumed(1, 2), step(2, loss=7.0, attempt=2), *end_of_epoch(1, second)),
        ]
    )
    assert [(e.step, e.loss) for e in events if isinstance(e, StepEnd)] == [(1, 1.0), (2, 7.0)]
    assert [e.result for e in events if isinstance(e, Evaluation)] == [second]
    assert [e.validation for e in events if isinstance(e, EpochEnd)] == [second]


def test_the_end_of_an_earlier_attempt_is_not_that_of_a_run_under_way(tmp_path: Path) -> None:
    events = (START, step(1), RunEnd("cancelled", 1, 1.0), replace(START, step=1), Resumed(1, 2), step(2, attempt=2))
    run = RecordedRun.read(run_of(tmp_path / "run", *events))
    assert run.end is None
    assert run.seconds == 2.0
    assert run.samples_per_second == 4.0


def test_without_matplotlib_there_are_curves_and_the_confusion_all_the_same(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "asynctrain.train.plots", None)
    monkeypatch.delattr("asynctrain.train.plots", raising=False)
    page = render(RecordedRun.read(run_dir))
    assert page.count("<polyline") == 4, "loss and accuracy, each of training and validation"
    assert "<td>is rose</td><td>5</td><td>3</td>" in page
