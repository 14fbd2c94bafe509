"""A Dask cluster on this machine, for one program: its keeper as the program sees it.

Not Dask's own ``LocalCluster``: that imports the program's main module once more in every worker, so that a script
without a main guard starts itself again, and leaves files behind when the program is killed.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import cast

from distributed import Client

from asynctrain.errors import WorkerLostError
from asynctrain.executors.dask.link import connected
from asynctrain.executors.local import GRACE
from asynctrain.executors.worker_process import environment

KEEPER = Path(__file__).with_name("keeper.py")
START = 60.0  # seconds in which the scheduler and all workers must be there
SETTINGS = {
    "DASK_LOGGING__DISTRIBUTED": "critical",  # workers that are lost are told as events; a log would tell it once more
    "DASK_DISTRIBUTED__SCHEDULER__ACTIVE_MEMORY_MANAGER__START": "False",  # it would take parameters from workers
}


@asynccontextmanager
async def local_cluster(workers: int) -> AsyncIterator[str]:
    """Own a cluster of that many worker processes, reachable from this machine only; yield its scheduler's address.

    All workers are there when it begins, and nothing of it when it ends. Raises ``WorkerLostError`` where they do not
    come.
    """
    keeper = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", str(KEEPER), str(os.getpid()), str(workers)),
        stdin=DEVNULL,
        stdout=PIPE,
        env=environment() | SETTINGS,
        start_new_session=True,  # Ctrl-C is for the program, which ends its workers itself
    )
    try:
        yield await _address_of(keeper, workers)
    finally:
        await _end(keeper)


async def _address_of(keeper: Process, workers: int) -> str:
    """Return the scheduler's address, once the workers have found it."""
    try:
        async with asyncio.timeout(START):
            address = (await cast("asyncio.StreamReader", keeper.stdout).readline()).decode().strip()
            if not address:
                raise WorkerLostError(f"dask:{workers}", "Dask's scheduler did not start")
            async with connected(Client(address, asynchronous=True, set_as_default=False)) as client:
                await cast("Awaitable[None]", client.wait_for_workers(workers))
    except OSError as error:
        raise WorkerLostError(f"dask:{workers}", f"its workers did not start within {START:g} s") from error
    return address


async def _end(keeper: Process) -> None:
    with suppress(ProcessLookupError):
        keeper.terminate()
    try:
        async with asyncio.timeout(GRACE):
            await keeper.communicate()
    except TimeoutError:  # it is frozen
        os.killpg(keeper.pid, signal.SIGKILL)
        await keeper.communicate()
