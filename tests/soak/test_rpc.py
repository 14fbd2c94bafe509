"""The full number of fault schedules with worker processes, and of lies; ``make test`` has a few of them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from grpc import aio

from asynctrain.rpc import GrpcExecutor
from tests.rpc import fuzzing
from tests.rpc.conftest import ROOT, worker_process
from tests.rpc.faults import KINDS, Workers, hold, schedule
from tests.rpc.test_fuzz import Talk, fuzz

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

QUICK = os.environ.get("SOAK") == "quick"
SCHEDULES = 6 if QUICK else 30
CASES = 500 if QUICK else 10_000  # to a worker, and to a coordinator
GROWTH = 50  # MiB


def test_whatever_happens_to_workers_the_bits_are_those_of_a_training_without() -> None:
    happened: Counter[str] = Counter()
    told: Counter[str] = Counter()
    with Workers(3) as workers:
        for seed in range(SCHEDULES):
            plan = schedule(seed)
            told.update(asyncio.run(hold(plan, workers)))
            happened.update(fault.kind for fault in plan.faults)
    assert all(happened[kind] for kind in KINDS), happened
    assert told["WorkerLost"] >= SCHEDULES // 2
    print(  # noqa: T201 - what the run of the long tests shows
        f"{SCHEDULES} schedules: {dict(happened)}; events: "
        f"{ {name: told[name] for name in ('WorkerLost', 'WorkerJoined', 'Speculated')} }"
    )


def resident(pid: int) -> float:
    """Return the memory of a process in MiB."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


@contextmanager
def coordinator() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Have a coordinator with one worker of its own, in a process of its own, and its address."""
    command = [sys.executable, "-m", "tests.soak.rpc_coordinator"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, json.loads(process.stdout.readline())["address"]
        finally:
            process.kill()


def lied_to(pid: int, address: str, talks: object, lie: Talk) -> float:
    """Have all conversations with a process, and return by how many MiB it has grown."""
    with asyncio.Runner() as runner:

        async def connect() -> aio.Channel:
            return aio.insecure_channel(address)

        channel = runner.run(connect())
        fuzz(runner, channel, talks, lie, CASES // 20)  # type: ignore[arg-type]
        before = resident(pid)
        fuzz(runner, channel, talks, lie, CASES)  # type: ignore[arg-type]
        grown = resident(pid) - before
        runner.run(channel.close(None))
    assert grown < GROWTH
    return grown


def test_a_worker_answers_ten_thousand_lies_its_memory_stays_bounded_and_it_works_on() -> None:
    async def works(address: str) -> bool:
        async with GrpcExecutor(address) as executor, executor.open(fuzzing.PROGRAM) as session:
            await session.broadcast(fuzzing.PARAMS, {}, 0)
            return await fuzzing.bits(session) == await fuzzing.expected()

    with worker_process("--executor", "threads:1", "--capacity", "1") as worker:
        grown = lied_to(worker.process.pid, worker.address, fuzzing.talks_to_worker, fuzzing.lie_to_worker)
        assert asyncio.run(works(worker.address))
    print(f"{CASES} conversations: the worker has grown by {grown:.1f} MiB")  # noqa: T201


def test_a_coordinator_answers_ten_thousand_lies_its_memory_stays_bounded_and_it_computes_on() -> None:
    with coordinator() as (process, address):
        grown = lied_to(process.pid, address, fuzzing.talks_to_coordinator, fuzzing.lie_to_coordinator)
        told, _ = process.communicate("stop\n", timeout=60)
    assert told.strip() == "the bits are right"
    print(f"{CASES} conversations: the coordinator has grown by {grown:.1f} MiB")  # noqa: T201
