"""Three hosts, as network namespaces: what a cluster is when a cable is pulled, and nobody says so."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

import asynctrain as at

driver = pytest.importorskip("tests.soak.dask_driver", reason="needs the extra dask")

DRIVER, WORKERS = "asynctrain-driver", ("asynctrain-one", "asynctrain-two")
NETWORK = "10.213.77."  # nobody outside of the namespaces sees it
PORT = 8786
PULLED = 20  # the step after which the cable is pulled
SILENT = 10.0  # seconds that a step may take in which a worker falls silent; it is expected to take about one
ROOT = Path(__file__).parents[2]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@dataclass
class Hosts:
    """The driver, where the scheduler is too, and two workers, each with a cable to it."""

    stack: ExitStack

    def start(self, host: str, *command: str) -> subprocess.Popen[str]:
        """Run a command on one of them until the test ends."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, "-u", "-m", *command],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "DASK_LOGGING__DISTRIBUTED": "critical"},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.stack.callback(self._end, process)
        return process

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate()

    @staticmethod
    def pull_cable(number: int) -> None:
        """Take the link to a worker down: packets are lost, and no connection is reset."""
        ip("-n", DRIVER, "link", "set", f"at{number}", "down")


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if shutil.which("ip") is None:
        pytest.skip("there is no command ip to make network namespaces with")
    with ExitStack() as stack:
        try:
            for host in (DRIVER, *WORKERS):
                ip("netns", "add", host)
                stack.callback(ip, "netns", "delete", host)
                ip("-n", host, "link", "set", "lo", "up")
            ip("-n", DRIVER, "link", "add", "at0", "type", "bridge")
            ip("-n", DRIVER, "address", "add", f"{NETWORK}1/24", "dev", "at0")
            ip("-n", DRIVER, "link", "set", "at0", "up")
            for number, host in enumerate(WORKERS, 1):
                ip("-n", DRIVER, "link", "add", f"at{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
                ip("-n", DRIVER, "link", "set", f"at{number}", "master", "at0", "up")
                ip("-n", host, "address", "add", f"{NETWORK}{number + 1}/24", "dev", "eth0")
                ip("-n", host, "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield Hosts(stack)


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
    address = f"tcp://{NETWORK}1:{PORT}"
    hosts.start(
        DRIVER, "distributed.cli.dask_scheduler", "--host", f"{NETWORK}1", "--port", str(PORT), "--no-dashboard"
    )
    for number, host in enumerate(WORKERS, 2):
        where = ["--host", f"{NETWORK}{number}", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
        hosts.start(host, "distributed.cli.dask_worker", address, *where)
    training = hosts.start(DRIVER, "tests.soak.dask_driver", address)
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
