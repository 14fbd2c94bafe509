"""A command is a process: its streams, its signals, its exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import asynctrain as at

COMMAND = [sys.executable, "-m", "asynctrain.cli"]


@contextmanager
def endless_training(folder: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a training that would take hours, from the end of its first epoch on."""
    command = [*COMMAND, "train", str(folder), "--model", "linear", "--epochs", "1000000", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            while not process.stderr.readline().startswith("epoch"):
                assert process.poll() is None, "the training ended by itself"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_training_with_its_code_and_leaves_the_weights_reached_so_far(
    image_folder: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with endless_training(image_folder, tmp_path / "run") as process:
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=20)
    model = tmp_path / "run" / "model.safetensors"
    assert process.returncode == code
    assert stdout == ""
    assert stderr.splitlines()[-1] == f"interrupted; the weights reached so far: {model}"
    assert "Traceback" not in stderr
    assert at.Classifier.load(model).classes == ("rose", "tulip")
    assert [path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")] == []


def test_the_last_event_of_an_interrupted_run_says_so(image_folder: Path, tmp_path: Path) -> None:
    with endless_training(image_folder, tmp_path / "run") as process:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    *_, last = (json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines())
    assert (last["event"], last["reason"]) == ("RunEnd", "cancelled")


def test_info_tells_what_a_bug_report_needs_and_that_the_loop_is_uvloop(asynctrain: Callable[..., Any]) -> None:
    called = asynctrain("info", "--json")
    assert called.code == 0
    assert called.json["asynctrain"] == at.__version__
    assert called.json["loop"].startswith("uvloop")
    assert called.json["fingerprint"] == at.numeric_fingerprint()
    assert called.json["packages"]["numpy"] in called.stderr


def test_without_uvloop_a_command_runs_on_the_loop_of_asyncio(
    asynctrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert asynctrain("info", "--json").json["loop"].startswith("asyncio")


def test_without_arguments_the_help_is_shown(asynctrain: Callable[..., Any]) -> None:
    called = asynctrain()
    assert called.code == 2
    for command in ("demo", "train", "evaluate", "predict", "info"):
        assert command in called.stdout + called.stderr


def test_signal_handlers_are_what_they_were_after_a_command(asynctrain: Callable[..., Any]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    asynctrain("info")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
