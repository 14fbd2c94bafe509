"""``asynctrain worker`` and ``--executor grpc://...``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from asynctrain.cli.homes import make_executor
from tests.rpc.conftest import COMMAND, ROOT, Start

TRAIN = [sys.executable, "-m", "asynctrain.cli", "train"]


def trained(folder: Path, out: Path, executor: str) -> str:
    """Return the digest of a training by the command."""
    options = ["--epochs", "1", "--executor", executor, "--out", str(out), "--json"]
    done = subprocess.run([*TRAIN, str(folder), *options], cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    digest = json.loads(done.stdout)["digest"]
    assert isinstance(digest, str)
    return digest


def test_a_training_on_workers_has_the_digest_of_one_on_threads(
    image_folder: Path, tmp_path: Path, start: Start
) -> None:
    workers = [start("--executor", "threads:1") for _ in range(2)]
    there = "grpc://" + ",".join(worker.address for worker in workers)
    assert trained(image_folder, tmp_path / "there", there) == trained(image_folder, tmp_path / "here", "threads")


def test_what_cannot_work_is_told_in_one_sentence(tmp_path: Path) -> None:
    cases: list[tuple[list[str], int, str]] = [
        ([], 2, "--connect or --listen"),
        (["--listen", "127.0.0.1:0", "--connect", "127.0.0.1:1"], 2, "--connect or --listen"),
        (["--listen", "0.0.0.0:0"], 1, "--insecure"),
        (["--connect", "10.0.0.1:1"], 1, "--insecure"),
        (["--connect", "here"], 1, "HOST:PORT"),
        (["--listen", "127.0.0.1:0", "--tokens", str(tmp_path / "none")], 1, "No such file"),
        (["--listen", "127.0.0.1:0", "--executor", "magic"], 2, "executor"),
    ]
    for arguments, code, sentence in cases:
        done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert done.returncode == code, (arguments, done.stderr)
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_told(start: Start, image_folder: Path) -> None:
    taken = start("--executor", "threads:1").address
    for command in ([*COMMAND, "--listen", taken], [*TRAIN, str(image_folder), "--executor", f"grpc://listen:{taken}"]):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert done.returncode == 1, done.stderr
        assert "cannot be bound" in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "grpc://127.0.0.1:50052",
        "grpc://127.0.0.1:50052,localhost:50053",
        "grpc://listen:127.0.0.1:50052",
        "grpc://listen:127.0.0.1:50052,127.0.0.1:50053",
        "grpc://10.0.0.1:50052?insecure",
        "grpc://127.0.0.1:50052?join_wait=3",
    ],
)
def test_workers_are_written_as_addresses(text: str) -> None:
    assert "GrpcExecutor grpc://" in repr(make_executor(text))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("grpc:127.0.0.1:50052", "grpc:// and addresses"),
        ("grpc://", "addresses of workers must be given"),
        ("grpc://here", "HOST:PORT"),
        ("grpc://10.0.0.1:50052", "--insecure"),
        ("grpc://127.0.0.1:1?magic=1", "magic"),
        ("grpc://127.0.0.1:1?token=/none", "No such file"),
        ("grpc://listen:127.0.0.1:1,listen:127.0.0.1:2", "listen:"),
    ],
)
def test_other_texts_are_refused_with_the_reason(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=r"executor must be one of .*grpc://") as caught:
        make_executor(text)
    assert sentence in str(caught.value)
