"""Three hosts, as network namespaces: what a cluster is when a cable is pulled, and nobody says so."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import pytest

import asynctrain as at
from tests.soak.hosts import Hosts, connected_hosts

driver = pytest.importorskip("tests.soak.dask_driver", reason="needs the extra dask")

PORT = 8786
PULLED = 20  # the step after which the cable is pulled
SILENT = 10.0  # seconds that a step may take in which a worker falls silent; it is expected to take about one


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Have the driver, where the scheduler is too, and two workers."""
    with connected_hosts(f"asynctrain-dask-{os.getpid()}", 2, "10.213.77") as hosts:
        yield hosts


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_cable_pulled_in_the_middle_of_a_run_changes_no_bit_and_the_run_goes_on_with_the_other_host(
    hosts: Hosts,
) -> None:
    async def inline() -> str:
        async with at.InlineExecutor() as executor:
            digest, _ = await driver.train(executor, lambda step: None)
            return str(digest)

    expected = asyncio.run(inline())
    address = f"tcp://{hosts.address(0)}:{PORT}"
    quiet = {"DASK_LOGGING__DISTRIBUTED": "critical"}
    scheduler = ["--host", hosts.address(0), "--port", str(PORT), "--no-dashboard"]
    hosts.start(0, "distributed.cli.dask_scheduler", *scheduler, **quiet)
    for number in (1, 2):
        where = ["--host", hosts.address(number), "--nthreads", "1", "--no-nanny", "--no-dashboard"]
        hosts.start(number, "distributed.cli.dask_worker", address, *where, **quiet)
    training = hosts.start(0, "tests.soak.dask_driver", address, **quiet)
    assert training.stdout is not None
    pulled = 0.0
    longest = last = 0.0
    lines: list[str] = []
    for line in training.stdout:
        now = time.monotonic()
        lines.append(line)
        if pulled:
            longest = max(longest, now - last)
        if line == f"step {PULLED}\n":
            hosts.pull_cable(1)
            pulled = now
        last = now
    assert pulled, lines
    assert lines[-1] == f"digest {expected}\n"
    assert longest < SILENT, "Dask alone takes half a minute to notice"
    print(f"the longest of the steps after the cable was pulled took {longest:.2f} s; {lines[-2].strip()}")  # noqa: T201
