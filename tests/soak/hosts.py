"""Hosts as network namespaces: what several machines are when a cable is pulled, and nobody says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@dataclass
class Hosts:
    """A driver, and hosts with a cable to it each.

    Attributes:
        names: of their namespaces, the driver's first.
        network: the first three bytes of their addresses; nobody outside of the namespaces sees it.
    """

    names: list[str]
    network: str
    stack: ExitStack

    def address(self, number: int) -> str:
        """Return the address of a host; the driver is number 0."""
        return f"{self.network}.{number + 1}"

    def start(self, number: int, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Run a Python module on a host until the block ends."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.names[number], sys.executable, "-u", "-m", *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.stack.callback(self._end, process)
        return process

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> None:
        process.kill()
        process.communicate()

    def pull_cable(self, number: int) -> None:
        """Take the link to a host down: packets are lost, and no connection is reset."""
        ip("-n", self.names[0], "link", "set", f"at{number}", "down")

    def plug_in(self, number: int) -> None:
        """Take it up again."""
        ip("-n", self.names[0], "link", "set", f"at{number}", "up")


@contextmanager
def connected_hosts(prefix: str, others: int, network: str) -> Iterator[Hosts]:
    """Have a driver and other hosts, each with a cable to a bridge of the driver's; skips the test where that fails."""
    if shutil.which("ip") is None:
        pytest.skip("there is no command ip to make network namespaces with")
    names = [f"{prefix}-{number}" for number in range(others + 1)]
    driver, *workers = names
    with ExitStack() as stack:
        try:
            for name in names:
                ip("netns", "add", name)
                stack.callback(ip, "netns", "delete", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", driver, "link", "add", "at0", "type", "bridge")
            ip("-n", driver, "address", "add", f"{network}.1/24", "dev", "at0")
            ip("-n", driver, "link", "set", "at0", "up")
            for number, name in enumerate(workers, 1):
                ip("-n", driver, "link", "add", f"at{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("-n", driver, "link", "set", f"at{number}", "master", "at0", "up")
                ip("-n", name, "address", "add", f"{network}.{number + 1}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
        yield Hosts(names, network, stack)
