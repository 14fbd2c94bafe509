"""What is particular to Dask: its workers come, go, freeze and differ, and what the executor starts itself."""

from __future__ import annotations


from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed.utils import _offload_executor

import asynctrain as at
from tests.executors.dask_clusters import DaskCluster
from tests.executors.dask_faults import hold, schedule
from tests.executors.schedules import train, undisturbed


@pytest.fixture(scope="module", autouse=True)
def offload() -> None:
    """Have the thread that Dask keeps for the life of the process."""
    _offload_executor.submit(len, "").result()


@pytest.mark.timeout(180)
async def test_without_an_address_it_starts_workers_and_nothing_of_them_is_left() -> None:
    async with at.DaskExecutor(workers=2) as executor:
        for _ in range(2):
            assert (await train(executor)).digest == undisturbed()


# Faults


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[DaskCluster]:
    with DaskCluster(tmp_path, workers=2) as cluster:
        yield cluster


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.timeout(180)
async def test_whatever_happens_to_workers_the_bits_are_those_of_a_training_without(
    tmp_path: Path, seed: int
) -> None:
    await hold(schedule(seed), tmp_path)
