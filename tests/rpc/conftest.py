"""Workers for the tests of the worker role: in this process, and as processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import asynctrain as at
from asynctrain.rpc import Worker, listen
from tests.ports import kept_port
from tests.serve.test_security import certificates

__all__ = ["certificates"]

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, "-m", "asynctrain.cli", "worker"]


class WorkerProcess:
    """A process of ``asynctrain worker``, and where it is."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.address = address

    def send(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@contextmanager
def worker_process(*arguments: str, **environment: str) -> Iterator[WorkerProcess]:
    """Have a worker process, by default one that listens; killed at the end, if it is still there."""
    listening = [] if {"--connect", "--listen"} & set(arguments) else ["--listen", "127.0.0.1:0"]
    command = [*COMMAND, *listening, *arguments, "--json"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, process.communicate()[1]
            yield WorkerProcess(process, json.loads(line)["address"])
        finally:
            process.kill()
            process.communicate()


Start = Callable[..., WorkerProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return what starts worker processes, which end with the test."""
    with ExitStack() as stack:
        yield lambda *arguments, **environment: stack.enter_context(worker_process(*arguments, **environment))


@pytest.fixture
def address() -> Iterator[str]:
    """Return an address for servers that come and go."""
    with kept_port() as port:
        yield f"127.0.0.1:{port}"


@pytest.fixture
async def worker() -> AsyncIterator[tuple[Worker, str]]:
    """Return a worker on two threads of this process, and its address."""
    async with at.ThreadExecutor(2) as executor:
        worker = Worker(executor, capacity=2)
        async with listen(worker, "127.0.0.1:0") as port:
            yield worker, f"127.0.0.1:{port}"
