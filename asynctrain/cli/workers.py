"""``asynctrain worker``: it computes for trainings on other machines."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from asynctrain.cli.homes import EXTRA, access_of, make_executor
from asynctrain.cli.output import people

if TYPE_CHECKING:
    from asynctrain.rpc import Access, Worker


@dataclass(frozen=True, slots=True)
class Role:
    """The choices of one worker, named as the options of ``asynctrain worker``.

    Attributes:
        connect: the coordinator to dial, or None.
        listen: where to wait for coordinators, or None.
        executor: where it computes.
        name: what coordinators call it, or None.
        capacity: pieces of work at once, or None.
        token: a file with the token to show, or None for the one in the environment, if there is one.
        tokens: a file of tokens, or None for those in the environment, if there are any.
        tls_cert: our certificate.
        tls_key: its key.
        tls_ca: whose certificates are accepted.
        insecure: whether other machines may be worked with without TLS.
        grace: seconds that its end may take.
    """

    connect: str | None
    listen: str | None
    executor: str
    name: str | None
    capacity: int | None
    token: Path | None
    tokens: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    tls_ca: Path | None
    insecure: bool
    grace: float

    def read_access(self) -> Access:
        """Return who may connect. Blocks; raises ``OSError`` and ``ValueError``."""
        return access_of(
            self.token, self.tokens, self.tls_cert, self.tls_key, self.tls_ca, self.insecure, self.listen is not None
        )


async def work(role: Role, as_json: bool) -> None:
    """Work until the process is told to end; then finish what is computed."""
    try:
        from asynctrain import rpc
    except ModuleNotFoundError as error:
        raise ValueError(EXTRA) from error

    access = await asyncio.to_thread(role.read_access)
    async with make_executor(role.executor) as executor:
        worker = rpc.Worker(executor, node=role.name, capacity=role.capacity, grace=role.grace)
        async with _working(worker, role, access) as told:
            people.print(f"{worker.node} {told}", markup=False, soft_wrap=True)
            if as_json:
                print(json.dumps({"worker": worker.node, "address": told.split()[-1], "pid": os.getpid()}), flush=True)
            await asyncio.Event().wait()


@asynccontextmanager
async def _working(worker: Worker, role: Role, access: Access) -> AsyncIterator[str]:
    """Let the worker work while the block lasts; yields in words how, the address last."""
    from asynctrain.rpc import dialling, listen

    if role.connect is not None:
        async with dialling(worker, role.connect, access):
            yield f"works for {role.connect}"
    else:
        assert role.listen is not None  # noqa: S101 - one of the two is given
        async with listen(worker, role.listen, access) as port:
            yield f"waits for coordinators on {role.listen.rpartition(':')[0]}:{port}"
