"""A training that is interrupted from outside, by a key or a signal, and goes on later."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import asynctrain as at
from asynctrain.train import checkpoint

Asynctrain = Callable[..., Any]

COMMAND = [sys.executable, "-m", "asynctrain.cli"]
OPTIONS = ["--model", "linear", "--batch-size", "8", "--microbatch", "4"]
EPOCHS = 80  # some seconds

TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"

# A disk on which the first checkpoint is quickly there, and all others take until nobody wants them any more.
SLOW_DISK = """
import sys, time
from asynctrain import _files
from asynctrain.cli import main
from asynctrain.train import checkpoint

def write_whole(path, content, stopped):
    if not checkpoint.find(path.parent.parent):
        return _files.write_whole(path, content, stopped)
    print("epoch: writing", file=sys.stderr, flush=True)
    while not stopped():
        time.sleep(0.01)
    _files.write_whole(path, content, stopped)

checkpoint.write_whole = write_whole
sys.exit(main())
"""


# A computer on which no step ends.
NO_STEP = """
import asyncio, sys
from asynctrain.cli import main
from asynctrain.train.step import TrainStep

async def for_ever(self, state, batch):
    print("epoch: computing", file=sys.stderr, flush=True)
    await asyncio.sleep(3600)

TrainStep.__call__ = for_ever
sys.exit(main())
"""


@contextmanager
def training(*arguments: object, command: Sequence[str] = COMMAND) -> Iterator[subprocess.Popen[str]]:
    """Start ``asynctrain train``, and wait for the end of an epoch."""
    called = [*command, "train", *map(str, arguments)]
    with subprocess.Popen(called, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            await_line(process, "epoch")
            yield process
        finally:
            process.kill()


def await_line(process: subprocess.Popen[str], beginning: str) -> None:
    assert process.stderr is not None
    while not (line := process.stderr.readline()).startswith(beginning):
        assert line, "the training ended by itself"


@pytest.fixture(scope="module")
def digests() -> dict[str, str]:
    """Digests that are found once for all tests of this module: their images are the same."""
    return {}


@pytest.fixture
def whole(asynctrain: Asynctrain, image_folder: Path, tmp_path: Path, digests: dict[str, str]) -> str:
    """Return the digest of a run that nobody interrupts."""
    if not digests:
        called = asynctrain("train", image_folder, *OPTIONS, "--epochs", EPOCHS, "--out", tmp_path / "whole", "--json")
        digests["whole"] = called.json["digest"]
    return digests["whole"]


def latest(run_dir: Path) -> Path:
    return checkpoint.find(run_dir)[0]


def last_event(run_dir: Path) -> dict[str, Any]:
    event: dict[str, Any] = json.loads((run_dir / "history.jsonl").read_text().splitlines()[-1])
    return event


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_training_with_its_code_and_resumed_it_ends_as_if_nothing_had_happened(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path, whole: str, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    with training(image_folder, *OPTIONS, "--epochs", EPOCHS, "--out", run) as process:
        process.send_signal(number)
        start = time.monotonic()
        stdout, stderr = process.communicate(timeout=20)
    assert time.monotonic() - start < 2
    assert process.returncode == code
    assert stdout == ""
    assert "Traceback" not in stderr
    told, command = stderr.splitlines()[-2:]
    assert told == f"interrupted; the last step is in {latest(run)}, go on with:"
    assert command.endswith(f"train --resume {run}")
    assert (last_event(run)["event"], last_event(run)["reason"]) == ("RunEnd", "cancelled")
    assert at.Classifier.load(run / "model.safetensors").classes == ("rose", "tulip")
    assert [path.name for path in run.rglob(".*")] == []
    resumed = asynctrain("train", "--resume", run, "--json", "--executor", "threads:3")
    assert resumed.code == 0, resumed.stderr
    assert resumed.json["digest"] == whole
    assert resumed.json["run_dir"] == str(run)


def test_control_c_in_a_terminal_prints_the_checkpoint_within_two_seconds_and_the_code_is_130(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path, whole: str
) -> None:
    run = tmp_path / "run"
    master, slave = os.openpty()
    command = [sys.executable, "-c", TERMINAL, *COMMAND, "train", str(image_folder), *OPTIONS]
    command += ["--epochs", str(EPOCHS), "--out", str(run)]
    environment = {**os.environ, "COLUMNS": "400", "TERM": "xterm"}
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
    ) as process:
        try:
            os.close(slave)
            read_until(master, b"epoch  1/")
            os.write(master, b"\x03")
            start = time.monotonic()
            seen = read_until(master, b"go on with:")
            assert time.monotonic() - start < 2
            read_until(master, b"")
            assert process.wait(20) == 130
        finally:
            process.kill()
            os.close(master)
    assert str(latest(run)).encode() in seen
    assert asynctrain("train", "--resume", run, "--json").json["digest"] == whole


def read_until(terminal: int, awaited: bytes) -> bytes:
    """Return what is shown on a terminal up to and with ``awaited``, or, where that is empty, to its end."""
    seen = b""
    while not awaited or awaited not in seen:
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # the last process that has it open has ended
            assert not awaited, f"{awaited!r} was not seen, but {seen!r}"
            break
    return seen


def test_a_second_control_c_abandons_the_writing_and_leaves_the_earlier_checkpoint(
    image_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    slow = [sys.executable, "-c", SLOW_DISK]
    with training(image_folder, *OPTIONS, "--epochs", 10**6, "--out", run, command=slow) as process:
        await_line(process, "epoch: writing")
        (first,) = checkpoint.find(run)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert str(first) in stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == [first.name]
    assert checkpoint.load(first).state.step > 0


def test_interrupted_before_the_first_step_a_training_begins_anew_in_its_folder_when_it_is_resumed(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    still = [sys.executable, "-c", NO_STEP]
    with training(image_folder, *OPTIONS, "--epochs", 3, "--out", run, command=still) as process:
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    told, command = stderr.splitlines()[-2:]
    assert told == "interrupted; no step is done yet, begin anew with:"
    assert command.endswith(f"train --resume {run}")
    assert not checkpoint.find(run)
    resumed = asynctrain("train", "--resume", run, "--json")
    assert resumed.code == 0, resumed.stderr
    whole = asynctrain("train", image_folder, *OPTIONS, "--epochs", 3, "--out", tmp_path / "whole", "--json")
    assert resumed.json["digest"] == whole.json["digest"]
    numbers = [json.loads(line)["number"] for line in (run / "history.jsonl").read_text().splitlines()]
    assert numbers == list(range(len(numbers)))
