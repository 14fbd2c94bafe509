"""The full numbers of the service; ``make test`` has a small share of them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from grpc import aio
from hypothesis import given, settings

import asynctrain as at
from asynctrain.serve import TrainingClient
from tests.serve import fuzzing
from tests.serve.conftest import blobs, grpc_has_ended, model  # noqa: F401 - fixtures
from tests.serve.remote import OPTIONS
from tests.serve.test_fuzz import COMMON
from tests.serve.test_restart import require_same_through, served, trained_long

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

CASES = 500 if os.environ.get("SOAK") == "quick" else 10_000  # a stream and a single message each
LIMITS = "runs = 100000\nruns_per_client = 100000\nended_runs = 20\nepoch_samples = 10000\nrunning = 4\n"
GROWTH = 50  # MiB


@contextmanager
def server(folder: Path) -> Iterator[tuple[int, str]]:
    """Have a server in a process of its own: its id and its address."""
    (folder / "limits.toml").write_text(LIMITS)
    command = [sys.executable, "-m", "asynctrain.cli", "serve", str(folder / "service"), "--grpc", "--json"]
    options = ["--port", "0", "--executor", "threads:1", "--limits", str(folder / "limits.toml")]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, *options], stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.pid, json.loads(process.stdout.readline())["address"]
        finally:
            process.terminate()


def resident(pid: int) -> float:
    """Return the memory of a process in MiB."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def test_twenty_thousand_strange_messages_are_each_answered_and_memory_stays_bounded(
    tmp_path: Path,
    blobs: at.ArrayDataset,  # noqa: F811
    model: at.Model,  # noqa: F811
) -> None:
    with server(tmp_path) as (pid, address), asyncio.Runner() as runner:

        async def connect() -> aio.Channel:
            return aio.insecure_channel(address)

        async def train() -> str:
            async with TrainingClient(address) as client:
                return (await client.train(blobs, model=model, **OPTIONS).result()).reason

        channel = runner.run(connect())

        def fuzz(cases: int) -> None:
            @settings(max_examples=cases, suppress_health_check=COMMON, database=None)
            @given(stream=fuzzing.streams, one=fuzzing.unary)
            def send(stream: list[bytes], one: tuple[str, bytes]) -> None:
                fuzzing.require_answer(runner.run(fuzzing.send_stream(channel, stream)))
                fuzzing.require_answer(runner.run(fuzzing.send_one(channel, *one)))

            send()

        fuzz(CASES // 20)
        before = resident(pid)
        fuzz(CASES)
        grown = resident(pid) - before
        assert runner.run(train()) == "finished"
        runner.run(channel.close(None))
    assert grown < GROWTH
    print(f"{2 * CASES} messages: the server has grown by {grown:.1f} MiB")  # noqa: T201 - what the long tests show


async def test_a_connection_that_is_half_open_is_noticed_and_changes_no_bit(
    tmp_path: Path,
    blobs: at.ArrayDataset,  # noqa: F811
    model: at.Model,  # noqa: F811
) -> None:
    whole = await trained_long(blobs, model)
    async with served(tmp_path) as (_, address):
        await require_same_through("half_open", int(address.rpartition(":")[2]), blobs, model, whole)
