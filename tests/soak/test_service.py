"""The full numbers of the service; ``make test`` has a small share of them."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from grpc import aio
from hypothesis import given, settings

import asynctrain as at
from asynctrain.serve import TrainingClient
from asynctrain.serve import client as client_module
from tests.ports import kept_port
from tests.serve import fuzzing
from tests.serve.conftest import blobs, model  # noqa: F401 - fixtures
from tests.serve.remote import OPTIONS, RATE
from tests.serve.test_fuzz import COMMON
from tests.serve.test_restart import LONG, events_of, require_same_through, require_whole, served, trained_long

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

QUICK = os.environ.get("SOAK") == "quick"
CASES = 500 if QUICK else 10_000  # a stream, a single message, and bytes that are none, each
PLANS, KILLS, EPOCHS = (2, 5, 100) if QUICK else (8, 30, 400)
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
            @given(stream=fuzzing.streams, one=fuzzing.unary, raw=fuzzing.raw)
            def send(stream: list[bytes], one: tuple[str, bytes], raw: bytes) -> None:
                fuzzing.require_answer(runner.run(fuzzing.send_stream(channel, stream)))
                fuzzing.require_answer(runner.run(fuzzing.send_one(channel, *one)))
                runner.run(fuzzing.send_raw(address, raw))

            send()

        fuzz(CASES // 20)
        before = resident(pid)
        fuzz(CASES)
        grown = resident(pid) - before
        assert runner.run(train()) == "finished"
        runner.run(channel.close(None))
    assert grown < GROWTH
    print(f"{3 * CASES} messages: the server has grown by {grown:.1f} MiB")  # noqa: T201 - what the long tests show


async def test_a_connection_that_is_half_open_is_noticed_and_changes_no_bit(
    tmp_path: Path,
    blobs: at.ArrayDataset,  # noqa: F811
    model: at.Model,  # noqa: F811
) -> None:
    whole = await trained_long(blobs, model)
    async with served(tmp_path) as (_, address):
        plan = [("half_open", bytes_) for bytes_ in (3_000, 9_000, 20_000)]
        assert not await require_same_through(plan, int(address.rpartition(":")[2]), blobs, model, whole)


async def test_whatever_befalls_the_connections_in_whatever_order_changes_no_bit(
    tmp_path: Path,
    blobs: at.ArrayDataset,  # noqa: F811
    model: at.Model,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "PIECE", 640)  # ten images a message
    whole = await trained_long(blobs, model)
    met: Counter[str] = Counter()
    for seed in range(PLANS):
        chance = random.Random(seed)
        faults = [chance.choice(["drop", "drop", "half_open", "delay", "throttle"]) for _ in range(5)]
        plan = [(fault, chance.randrange(25_000)) for fault in faults]
        async with served(tmp_path / str(seed)) as (_, address):
            left = await require_same_through(plan, int(address.rpartition(":")[2]), blobs, model, whole)
        met.update(faults[: len(faults) - len(left)])
    print(f"{PLANS} runs through connections of which {dict(met)}")  # noqa: T201 - what the long tests show


async def test_a_server_that_is_killed_at_any_moment_time_and_again_loses_no_step_and_no_event(
    tmp_path: Path,
    blobs: at.ArrayDataset,  # noqa: F811
    model: at.Model,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "PIECE", 64)  # an image a message, so that it is killed while they come, too
    whole = await trained_long(blobs, model, EPOCHS)
    chance = random.Random(0)
    options = LONG | {"epochs": EPOCHS, "optimizer": at.optim.adamw(RATE), "idempotency_key": "mine"}
    kills = 0
    with kept_port() as port:
        async with TrainingClient(f"127.0.0.1:{port}", patience=600) as client, asyncio.TaskGroup() as tasks:
            run = client.train(blobs, model=model, **options)
            watching = tasks.create_task(events_of(run))
            while not watching.done():
                pause = chance.uniform(0.05, 1.0) if kills < KILLS else None
                async with served(tmp_path, port):  # whose end is a kill
                    await asyncio.wait([watching], timeout=pause)
                kills += not watching.done()
    require_whole(watching.result(), EPOCHS)
    async with served(tmp_path) as (_, address), TrainingClient(address) as client:
        assert (await client.train(blobs, model=model, **options).result()).digest == whole
    assert kills >= KILLS // 3  # on a fast machine it is trained before there are more
    print(f"the server was killed {kills} times")  # noqa: T201 - as above
