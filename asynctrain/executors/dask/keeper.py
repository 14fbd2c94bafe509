"""Keeps a Dask scheduler and its workers for one program: ``python keeper.py PROGRAM WORKERS``.

It prints the scheduler's address. Workers that end are replaced. On SIGTERM, when the program is no more, whatever the
way, or when the scheduler has ended, it kills them all, removes what they wrote, and ends.

Run as a file: the standard library is all that it needs, and so it is there in an instant.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

HOST = "127.0.0.1"
INTERVAL = 0.05  # seconds between two looks at what has ended
AGAIN = 1.0  # seconds between two starts of one worker
START = 60.0  # seconds in which a worker must have found the scheduler
SILENCE = 30.0  # seconds without a word after which the scheduler gives up a worker: Dask's five minutes are for others
_PR_SET_PDEATHSIG = 1
_LIBRARY = ctypes.CDLL(None)


def main() -> None:
    """Keep the cluster until it is to end."""
    program, workers = map(int, sys.argv[1:])
    told_to_end: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: told_to_end.append(number))
    with TemporaryDirectory(prefix="asynctrain-dask-", ignore_cleanup_errors=True) as folder:
        cluster = _Cluster(Path(folder), workers)
        try:
            while not told_to_end and os.getppid() == program and cluster.tend():
                time.sleep(INTERVAL)
        finally:
            cluster.kill()


class _Cluster:
    """The processes, which know each other by a file that the scheduler writes its address to."""

    def __init__(self, folder: Path, workers: int) -> None:
        self._folder = folder
        self._file = folder / "scheduler.json"
        self._told = False
        self._scheduler = self._started("Scheduler", {"port": 0, "protocol": "tcp", "worker_ttl": SILENCE})
        self._workers = [self._new_worker() for _ in range(workers)]

    def tend(self) -> bool:
        """Replace workers that have ended; return whether the scheduler is there."""
        if not self._told and self._file.exists():
            self._tell()
        now = time.monotonic()
        for number, (process, start) in enumerate(self._workers):
            if now - start > AGAIN and process.poll() is not None:
                self._workers[number] = self._new_worker()
        return self._scheduler.poll() is None

    def kill(self) -> None:
        """End all of them, and wait for that."""
        processes = [self._scheduler, *(process for process, _ in self._workers)]
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()

    def _tell(self) -> None:
        with suppress(json.JSONDecodeError, BrokenPipeError):  # it is being written; nobody listens any more
            os.write(sys.stdout.fileno(), json.loads(self._file.read_text())["address"].encode() + b"\n")
            self._told = True

    def _new_worker(self) -> tuple[subprocess.Popen[bytes], float]:
        options = {
            "nthreads": 1,  # microbatches are spread over processes
            "memory_limit": 0,  # not watched: how much a training takes does not grow with the data
            "death_timeout": START,
        }
        return self._started("Worker", options), time.monotonic()

    def _started(self, kind: str, options: Mapping[str, object]) -> subprocess.Popen[bytes]:
        everywhere = {
            "host": HOST,
            "dashboard": False,
            "dashboard_address": f"{HOST}:0",
            "scheduler_file": str(self._file),
            "local_directory": str(self._folder),
        }
        specification = {"cls": f"distributed.{kind}", "opts": {**everywhere, **options}}
        return subprocess.Popen(  # noqa: S603 - the command is ours
            [sys.executable, "-P", "-m", "dask", "spec", "--spec", json.dumps(specification)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # that of the program is for its own results
            preexec_fn=_end_with_keeper,
        )


def _end_with_keeper() -> None:
    """Have the system kill this process should the keeper be killed; only Linux can."""
    if sys.platform == "linux":
        _LIBRARY.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    main()
