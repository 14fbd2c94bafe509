"""``asynctrain worker``, and the homes that are made of such workers: ``--executor grpc://...``."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import asynctrain as at
from asynctrain.cli.output import people
from asynctrain.cli.recipe import make_executor

if TYPE_CHECKING:
    from asynctrain.rpc import Access, Worker

TOKEN = "ASYNCTRAIN_TOKEN"  # noqa: S105 - the environment's variable
EXTRA = 'workers over gRPC are an extra: pip install "asynctrain[cli,grpc]"'
OPTIONS = ("ca", "cert", "insecure", "join_wait", "key", "token", "tokens")
LISTEN = "listen:"
FOR_PEOPLE = 600.0  # seconds that who listens waits for the first worker, which somebody has yet to start


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
        return _access(
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


def executor_at(rest: str) -> at.Executor:
    """Return the executor of what stands behind ``grpc:`` in ``grpc://HOST:PORT,listen:HOST:PORT?option=value&...``.

    Addresses are dialled, except one behind ``listen:``, where workers dial in. The options are ``ca``, ``cert`` and
    ``key`` (files of TLS, in PEM), ``token`` and ``tokens`` (files), ``insecure``, and ``join_wait`` (seconds).

    Raises:
        ValueError: it is not of this form, or a file cannot be read.
        ModuleNotFoundError: the extra is not installed.
    """
    try:
        from asynctrain.rpc import GrpcExecutor
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(EXTRA, name=error.name) from error

    places, _, query = rest.removeprefix("//").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if foreign := options.keys() - set(OPTIONS):
        raise ValueError(f"options are {', '.join(OPTIONS)}, got {', '.join(sorted(foreign))}")
    listens = [place.removeprefix(LISTEN) for place in places.split(",") if place.startswith(LISTEN)]
    addresses = [place for place in places.split(",") if place and not place.startswith(LISTEN)]
    if not rest.startswith("//") or len(listens) > 1:
        raise ValueError("it must be grpc:// and addresses, of which one may begin with listen:")
    file = {name: Path(options[name]) if name in options else None for name in ("token", "tokens", "cert", "key", "ca")}
    try:
        access = _access(
            file["token"], file["tokens"], file["cert"], file["key"], file["ca"], "insecure" in options, bool(listens)
        )
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error
    join_wait = float(options.get("join_wait", FOR_PEOPLE if listens else 30.0))
    return GrpcExecutor(*addresses, listen=listens[0] if listens else None, access=access, join_wait=join_wait)


def _access(
    token: Path | None,
    tokens: Path | None,
    certificate: Path | None,
    key: Path | None,
    authority: Path | None,
    insecure: bool,
    listens: bool,
) -> Access:
    from asynctrain.rpc import TLS, Access, Tokens

    tls = None if certificate is key is authority is None else TLS(certificate, key, authority)
    known = None
    if listens:
        known = Tokens.from_environment(os.environ) if tokens is None else Tokens.load(tokens)
    ours = os.environ.get(TOKEN) if token is None else token.read_text(encoding="utf-8").strip()
    return Access(tls=tls, tokens=known, token=ours, insecure=insecure)
