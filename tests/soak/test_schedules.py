"""A thousand days of accidents; ``make test`` has some of them."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict

import pytest

from tests.executors.schedules import hold, simulated

SCHEDULES = 250 if os.environ.get("SOAK") == "quick" else 1000


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_whatever_befalls_simulated_workers_the_bits_are_those_of_a_quiet_day() -> None:
    counted: Counter[str] = Counter()
    for seed in range(SCHEDULES):
        outcome = simulated(seed, workers=1 + seed % 4)
        hold(outcome)
        counted.update(asdict(outcome.statistics))
    for kind in ("late", "duplicates", "speculated", "lost"):
        assert counted[kind] >= SCHEDULES // 20, f"too few are {kind} to tell anything"
    print(f"{SCHEDULES} schedules: {dict(counted)}")  # noqa: T201 - what the run of the long tests shows
