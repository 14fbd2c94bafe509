"""Dask clusters for tests: a scheduler and workers as commands, at 127.0.0.1, gone at the end of the block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"
START = 60.0  # seconds
ROOT = Path(__file__).parent.parent.parent


class DaskCluster:
    """A scheduler and workers, each of them a process that a test may do harm to.

    Args:
        folder: for what they write.
        workers: how many there are at first.
        tls: files of an authority, a certificate and its key, for connections that are encrypted.
    """

    def __init__(self, folder: Path, workers: int, tls: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._protocol = "tls" if tls else "tcp"
        self._environment = _tls_of_all(tls) if tls else {}
        self._file = folder / "scheduler.json"
        self._log = (folder / "dask.log").open("ab")
        self._first = workers
        self._scheduler: subprocess.Popen[bytes] | None = None
        self.workers: list[subprocess.Popen[bytes]] = []

    @property
    def address(self) -> str:
        """Of the scheduler."""
        return str(json.loads(self._file.read_text())["address"])

    def __enter__(self) -> Self:
        options = {"port": 0, "protocol": self._protocol, "scheduler_file": str(self._file)}
        self._scheduler = self._start([], "distributed.Scheduler", options, {})
        end = time.monotonic() + START
        while not self._is_up():
            assert time.monotonic() < end, (self._folder / "dask.log").read_text()
            time.sleep(0.02)
        for _ in range(self._first):
            self.add_worker()
        return self

    def _is_up(self) -> bool:
        try:
            return bool(self.address)
        except (FileNotFoundError, json.JSONDecodeError):  # it is being written
            return False

    def add_worker(self, environment: Mapping[str, str] | None = None) -> None:
        """Start one more worker, without waiting until it has joined."""
        options = {"nthreads": 1, "memory_limit": 0, "death_timeout": 30, "local_directory": str(self._folder)}
        self.workers.append(self._start([self.address], "distributed.Worker", options, environment or {}))

    def kill_scheduler(self) -> None:
        """End the scheduler without a farewell."""
        if self._scheduler is not None:
            self._scheduler.kill()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        processes = [*self.workers, *([self._scheduler] if self._scheduler else [])]
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        self._log.close()

    def _start(
        self, before: list[str], kind: str, options: Mapping[str, object], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        everywhere = {"host": HOST, "dashboard": False, "dashboard_address": f"{HOST}:0"}
        specification = json.dumps({"cls": kind, "opts": {**everywhere, **options}})
        return subprocess.Popen(
            [sys.executable, "-m", "dask", "spec", *before, "--spec", specification],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **self._environment, **environment},
        )


def _tls_of_all(files: Mapping[str, str]) -> dict[str, str]:
    """Return what has a scheduler and workers encrypt their connections, as environment variables of Dask."""
    prefix = "DASK_DISTRIBUTED__COMM"
    pieces = {f"{prefix}__REQUIRE_ENCRYPTION": "true", f"{prefix}__TLS__CA_FILE": files["ca_file"]}
    for role in ("SCHEDULER", "WORKER"):
        pieces |= {f"{prefix}__TLS__{role}__{name.upper()}": files[name] for name in ("cert", "key")}
    return pieces
