"""The full number of fault schedules with real processes and signals; ``make test`` has a few of them."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path

import pytest

import asynctrain as at
from tests.executors.process_faults import KINDS, Training, executor_for, orders_left, schedule

QUICK = os.environ.get("SOAK") == "quick"
SCHEDULES = 10 if QUICK else 50


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_whatever_happens_to_worker_processes_the_bits_are_those_of_a_training_without(tmp_path: Path) -> None:
    happened: Counter[str] = Counter()
    told: Counter[str] = Counter()

    async def one(seed: int) -> None:
        plan = schedule(seed)
        training = Training(tmp_path / str(seed), plan)
        async with at.InlineExecutor() as inline:
            expected = await training.run(inline)
        async with executor_for(plan) as executor:
            assert await training.run(executor) == expected, f"seed {seed}: {plan}"
        left = len(orders_left(tmp_path / str(seed)))  # the run was over before a worker found them
        happened.update(fault.kind for fault in plan.faults)
        happened["not in time"] += left
        told.update(training.told)

    async def all_of_them() -> None:
        for seed in range(SCHEDULES):
            await one(seed)

    asyncio.run(all_of_them())
    assert all(happened[kind] for kind in KINDS)
    assert told["WorkerLost"] >= SCHEDULES // 2
    print(  # noqa: T201 - what the run of the long tests shows
        f"{SCHEDULES} schedules: {dict(happened)}; events: "
        f"{ {name: told[name] for name in ('WorkerLost', 'WorkerJoined', 'Speculated')} }"
    )
