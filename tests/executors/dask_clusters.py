"""Dask clusters for tests: a scheduler and workers as commands, at 127.0.0.1, gone at the end of the block."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HOST = "127.0.0.1"
START = 60.0  # seconds
ROOT = Path(__file__).parent.parent.parent


class DaskCluster:
    """A scheduler, and workers by number, each of them a process that a test may do harm to."""

    def __init__(self, folder: Path, workers: int, **security: str) -> None:
        self._folder = folder
        self._security = {name: value for name, value in security.items() if value}
        self._file = folder / "scheduler.json"
        self._workers = workers
        self._log = (folder / "dask.log").open("ab")
        self._scheduler: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        """Of the scheduler."""
        return str(json.loads(self._file.read_text())["address"])

    def __enter__(self) -> Self:
        options = {"host": HOST, "port": 0, "dashboard": False, "dashboard_address": f"{HOST}:0"}
        self._scheduler = self._start("--spec", "distributed.Scheduler", scheduler_file=str(self._file), **options)
        self._until(self._file.exists)
        for _ in range(self._workers):
            self.add_worker()
        return self

    def add_worker(self) -> subprocess.Popen[bytes]:
        """Start one more worker; return its process."""
        options = {"host": HOST, "nthreads": 1, "memory_limit": 0, "dashboard": False, "death_timeout": 30}
        options |= {"dashboard_address": f"{HOST}:0", "local_directory": str(self._folder)}
        worker = self._start(self.address, "--spec", "distributed.Worker", **options)
        self.workers.append(worker)
        return worker

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in [*self.workers, *([self._scheduler] if self._scheduler else [])]:
            process.kill()
            process.wait()
        self._log.close()

    def _start(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        *before, kind = arguments
        specification = json.dumps({"cls": kind, "opts": options})
        return subprocess.Popen(
            [sys.executable, "-m", "dask", "spec", *before, specification],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), **self._security},
        )

    def _until(self, holds: Any) -> None:
        end = time.monotonic() + START
        while not holds():
            assert time.monotonic() < end, (self._folder / "dask.log").read_text()
            time.sleep(0.02)


@contextmanager
def signalled(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Freeze ``process`` for the block."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)
