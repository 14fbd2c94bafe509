"""A run that is killed goes on as if it had not been."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.crashing import INTERVAL, MOMENTS, Crashes, Moment, crash, make_images

PATIENCE = 6  # epochs: about 120 steps


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_images(folder)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Crashes:
    """Return the run that was never killed."""
    run = Crashes(data, tmp_path_factory.mktemp("whole") / "run", PATIENCE)
    ending = run.run_through()
    assert ending["stopped_by"], "early stopping ended it"
    assert ending["learning_rate_scale"] < 1.0, "and there was a plateau before that"
    return run


def test_a_run_killed_at_random_moments_ends_with_the_bits_and_the_history_of_one_that_was_not(
    whole: Crashes, data: Path, tmp_path: Path
) -> None:
    killed = Crashes(data, tmp_path / "run", PATIENCE)
    crash(killed, kills=8, seed=0)
    assert killed.kills == 8
    assert killed.in_writes >= 2
    assert killed.ending == whole.ending
    assert killed.steps <= whole.steps + killed.kills * (INTERVAL + 1)
    assert len(set(killed.attempts)) == len(killed.attempts) > 0, "each attempt has a number of its own"


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_inside_a_writing_the_earlier_checkpoint_is_there_or_the_new_one_whole(
    moment: Moment, whole: Crashes, data: Path, tmp_path: Path
) -> None:
    killed = Crashes(data, tmp_path / "run", PATIENCE)
    killed.live(die_in_write=3, moment=moment)
    assert killed.in_writes == 1
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    left = [name for name in names if name.startswith(".")]
    assert len(left) == (moment != "renamed"), "what was half written is there until the run goes on"
    latest = 3 if moment == "renamed" else 2
    assert names[-1] == f"step-{latest * INTERVAL:010}.safetensors"
    killed.live(workers=2)
    assert killed.ending == whole.ending
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.is_file()], "and is gone then"
