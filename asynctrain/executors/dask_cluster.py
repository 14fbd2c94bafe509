"""A Dask cluster on this machine, for one program: its scheduler in the program's loop, each worker a command.

Commands, where Dask's own ``LocalCluster`` uses multiprocessing: that imports the program's main module once more in
every worker, so that a script without a main guard starts itself again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from tempfile import TemporaryDirectory
from typing import Any

from distributed import Scheduler, SpecCluster
from distributed.deploy.subprocess import SubprocessWorker
from distributed.utils import silence_logging_cmgr

from asynctrain._aio import in_thread
from asynctrain.executors.worker_process import environment

HOST = "127.0.0.1"
QUIET = logging.CRITICAL  # workers that are lost are told as events; Dask's log would tell it once more
FAREWELL = 0.02  # seconds in which the scheduler takes note of connections that are closed
SILENCE = 30.0  # seconds after which Dask restarts a worker that says nothing: five minutes is for large clusters


class _Worker(SubprocessWorker):
    """A worker as a command, with a nanny that replaces it when it dies. Both go when they lose the scheduler."""

    def __init__(self, scheduler: str, folder: str, name: int) -> None:
        options = {
            "host": HOST,
            "nthreads": 1,  # microbatches are spread over processes
            "memory_limit": 0,  # not watched: how much a training takes does not grow with the data
            "dashboard": False,
            "dashboard_address": f"{HOST}:0",
            "local_directory": folder,
            "death_timeout": 10,
        }
        super().__init__(scheduler, "distributed.Nanny", str(name), {**options, "name": name})

    async def _start(self) -> None:
        specification = json.dumps({"cls": self.worker_class, "opts": self.worker_kwargs})
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dask", "spec", self.scheduler, "--spec", specification),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,  # that of the program is for its own results
            env=environment() | {"DASK_LOGGING__DISTRIBUTED": logging.getLevelName(QUIET).lower()},
            start_new_session=True,  # Ctrl-C is for the program, which ends its workers itself
        )


@asynccontextmanager
async def local_cluster(workers: int) -> AsyncIterator[Any]:
    """Own a cluster of that many worker processes, reachable from this machine only; at the end they are gone."""
    folder = await in_thread(TemporaryDirectory, None, "asynctrain-dask-")
    try:
        cluster = SpecCluster(
            scheduler={
                "cls": Scheduler,
                "options": {
                    "host": HOST,
                    "port": 0,
                    "protocol": "tcp",
                    "dashboard": False,
                    "dashboard_address": f"{HOST}:0",
                    "worker_ttl": SILENCE,
                    "local_directory": folder.name,
                },
            },
            workers={
                name: {"cls": _Worker, "options": {"folder": folder.name, "name": name}} for name in range(workers)
            },
            asynchronous=True,
            silence_logs=False,  # as that would speak again before the last connection has gone
        )
        with silence_logging_cmgr(QUIET):
            try:
                yield await cluster  # Dask's own ``async with`` would leave it there when it is cancelled meanwhile
            finally:
                await asyncio.gather(*(worker.close() for worker in cluster.workers.values()))
                await asyncio.sleep(FAREWELL)  # before the scheduler closes: it fails on what it still connects to
                await cluster._close()
            await asyncio.sleep(FAREWELL)
    finally:
        await in_thread(folder.cleanup)
