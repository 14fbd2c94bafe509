"""The full number of fault schedules with Dask workers; ``make test`` has two of them."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.executors import dask_faults as faults

pytest.importorskip("distributed", reason="needs the extra dask")

SCHEDULES = 4 if os.environ.get("SOAK") == "quick" else 12


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_whatever_happens_to_dask_workers_the_bits_are_those_of_a_training_without(tmp_path: Path) -> None:
    happened: Counter[str] = Counter()
    told: Counter[str] = Counter()
    for seed in range(SCHEDULES):
        plan = faults.schedule(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        told.update(asyncio.run(faults.hold(plan, folder)))
        happened.update(fault.kind for fault in plan.faults)
    assert all(happened[kind] for kind in faults.KINDS), happened
    print(  # noqa: T201 - what the run of the long tests shows
        f"{SCHEDULES} schedules: {dict(happened)}; events: "
        f"{ {name: told[name] for name in ('WorkerLost', 'WorkerJoined', 'Speculated')} }"
    )
