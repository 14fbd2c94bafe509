"""The full number of kills; ``make test`` has a few of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.train.crashing import INTERVAL, Crashes, crash, make_images

QUICK = os.environ.get("SOAK") == "quick"
KILLS = 15 if QUICK else 100  # on a fast machine a run of 300 steps is over before there are many more
PATIENCE = 12 if QUICK else 60  # epochs: about 300 and 2,000 steps


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_run_killed_a_hundred_times_ends_with_the_bits_and_the_history_of_one_that_was_not(tmp_path: Path) -> None:
    make_images(tmp_path / "data")
    whole = Crashes(tmp_path / "data", tmp_path / "whole", PATIENCE)
    whole.run_through()
    killed = Crashes(tmp_path / "data", tmp_path / "killed", PATIENCE)
    crash(killed, KILLS, seed=1)
    assert killed.kills == KILLS
    assert killed.in_writes >= KILLS // 5
    assert killed.ending == whole.ending
    assert killed.steps <= whole.steps + KILLS * (INTERVAL + 1)
    print(  # noqa: T201 - what the run of the long tests shows
        f"{KILLS} kills, {killed.in_writes} of them in a checkpoint's writing: {killed.steps} steps were done for a "
        f"run of {whole.steps}"
    )
