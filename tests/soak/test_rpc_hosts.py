"""gRPC workers on other hosts, which are network namespaces: a cable is pulled, and put back."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator

import pytest

import asynctrain as at
from tests.soak import rpc_driver as driver
from tests.soak.hosts import Hosts, connected_hosts

PORT = 50052
PULLED, PLUGGED = 40, 120  # steps after which the cable is pulled, and put back
SILENT = 6.0  # seconds that a step may take in which a worker falls silent


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with connected_hosts(f"asynctrain-rpc-{os.getpid()}", 2, "10.213.78") as hosts:
        yield hosts


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["workers", "mixed"])
def test_a_cable_pulled_and_put_back_in_the_middle_of_a_run_changes_no_bit(hosts: Hosts, kind: str) -> None:
    """``mixed`` is a group of a thread, a process and the workers."""

    async def inline() -> str:
        async with at.InlineExecutor() as executor:
            return (await driver.train(executor, lambda step: None, 0))[0]

    expected = asyncio.run(inline())
    addresses = [f"{hosts.address(number)}:{PORT}" for number in (1, 2)]
    for number, address in enumerate(addresses, 1):
        where = ["--listen", address, "--insecure", "--executor", "threads:1", "--capacity", "1", "--json"]
        worker = hosts.start(number, "asynctrain.cli", "worker", *where)
        assert worker.stdout is not None
        assert worker.stdout.readline()
    training = hosts.start(0, "tests.soak.rpc_driver", kind, *addresses)
    assert training.stdout is not None
    longest, last = 0.0, time.monotonic()
    lines: list[str] = []
    for line in training.stdout:
        if lines and lines[-1].startswith("step"):
            longest = max(longest, time.monotonic() - last)
        last = time.monotonic()
        lines.append(line)
        if line == f"step {PULLED}\n":
            hosts.pull_cable(1)
        if line == f"step {PLUGGED}\n":
            hosts.plug_in(1)
    assert lines[-1] == f"digest {expected}\n", lines[-3:]
    assert "0 WorkerLost" not in lines[-2]
    assert longest < SILENT
    print(f"{kind}: the longest step took {longest:.2f} s; {lines[-2].strip()}")  # noqa: T201 - what the long tests show
