"""``asynctrain serve --grpc``: the service as a command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import asynctrain as at
from asynctrain.serve import Refused, TrainingClient
from tests.cli.conftest import AsynctrainCommand, asynctrain  # noqa: F401 - a fixture
from tests.serve.remote import OPTIONS, RATE, trained_here

COMMAND = [sys.executable, "-m", "asynctrain.cli", "serve"]
TOKEN = "alice-0123456789abcdef"  # noqa: S105 - of nobody


def called(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=30)


@contextmanager
def serving(*arguments: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Have a server, and its address."""
    command = [*COMMAND, *map(str, arguments), "--grpc", "--json", "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env={**os.environ, **environment}, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process, json.loads(process.stdout.readline())["address"]
        finally:
            process.kill()


@pytest.mark.one_loop
async def test_it_trains_on_the_executor_it_is_given_for_clients_with_a_token_and_ends_on_a_signal(
    blobs: at.ArrayDataset, model: at.Model, tmp_path: Path
) -> None:
    here = await trained_here(blobs, model)
    with serving(tmp_path, "--executor", "threads:2", ASYNCTRAIN_TOKENS=f"alice {TOKEN}") as (process, address):
        async with TrainingClient(address, token=TOKEN) as client:
            trained = await client.train(blobs, model=model, optimizer=at.optim.adamw(RATE), **OPTIONS).result()
        async with TrainingClient(address) as nobody:
            with pytest.raises(Refused, match="UNAUTHENTICATED"):
                await nobody.runs()
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=20)
    assert trained.digest == here.state.digest()
    assert process.returncode == 143
    assert "Traceback" not in told
    assert TOKEN not in told


def test_what_cannot_be_served_is_told_in_one_sentence(
    asynctrain: AsynctrainCommand,  # noqa: F811
    tmp_path: Path,
) -> None:
    limits = tmp_path / "limits.toml"
    limits.write_text("magic = 1\n")
    cases: list[tuple[list[object], int, str]] = [
        (["--grpc", "--host", "0.0.0.0"], 1, "--insecure"),  # noqa: S104 - it is refused
        (["--grpc", "--limits", limits], 1, "magic"),
        (["--grpc", "--tokens", tmp_path / "none"], 1, "No such file"),
        (["--grpc", "--tls-cert", tmp_path / "none"], 1, "certificate and key"),
        (["--grpc", "--executor", "magic"], 2, "executor"),
        ([], 2, "--grpc"),
    ]
    for arguments, code, sentence in cases:
        done = asynctrain("serve", tmp_path / "service", *arguments)
        assert done.code == code, (arguments, done.stderr)
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


def test_a_port_that_another_server_has_is_not_shared(tmp_path: Path) -> None:
    with serving(tmp_path / "first") as (_, address):
        done = called(tmp_path / "second", "--grpc", "--port", address.rpartition(":")[2])
    assert done.returncode == 1
    assert "cannot be bound" in done.stderr
