"""``asynctrain serve --grpc``: the training service on a port of this machine."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from asynctrain.cli.homes import make_executor
from asynctrain.cli.output import people

if TYPE_CHECKING:
    from asynctrain.serve import TLS, Limits, Tokens


@dataclass(frozen=True, slots=True)
class Service:
    """The choices of one server, named as the options of ``asynctrain serve``.

    Attributes:
        folder: of its runs.
        host: that it is bound to.
        port: likewise.
        executor: where it computes.
        limits: a file of limits, or None.
        tokens: a file of tokens, or None for those in the environment, if there are any.
        tls_cert: the server's certificate.
        tls_key: its key.
        tls_client_ca: whose certificates clients must have.
        insecure: whether other machines may connect without TLS.
        reflection: whether it describes itself.
        grace: seconds that its end may take.
    """

    folder: Path
    host: str
    port: int
    executor: str
    limits: Path | None
    tokens: Path | None
    tls_cert: Path | None
    tls_key: Path | None
    tls_client_ca: Path | None
    insecure: bool
    reflection: bool
    grace: float

    def read_limits(self) -> Limits:
        """Return the limits. Blocks."""
        from asynctrain.serve import Limits

        return Limits() if self.limits is None else Limits.load(self.limits)

    def read_tokens(self) -> Tokens | None:
        """Return the tokens, if there are any. Blocks."""
        from asynctrain.serve import Tokens

        return Tokens.from_environment(os.environ) if self.tokens is None else Tokens.load(self.tokens)

    def make_tls(self) -> TLS | None:
        """Return the files of TLS, if there are any."""
        from asynctrain.serve import TLS

        if self.tls_cert is None and self.tls_key is None and self.tls_client_ca is None:
            return None
        return TLS(self.tls_cert, self.tls_key, self.tls_client_ca)


async def serve(service: Service, as_json: bool) -> None:
    """Serve until the process is told to end; then save the trainings under way."""
    try:
        from asynctrain import serve as grpc_service
    except ModuleNotFoundError as error:
        raise ValueError('the service is an extra: pip install "asynctrain[cli,grpc]"') from error

    limits = await asyncio.to_thread(service.read_limits)
    tokens = await asyncio.to_thread(service.read_tokens)
    async with (
        make_executor(service.executor) as executor,
        grpc_service.serve(
            service.folder,
            executor,
            host=service.host,
            port=service.port,
            limits=limits,
            tokens=tokens,
            tls=service.make_tls(),
            insecure=service.insecure,
            reflection=service.reflection,
            grace=service.grace,
        ) as server,
    ):
        people.print(f"serving on {server.address}; the runs are in {service.folder}", markup=False, soft_wrap=True)
        if as_json:
            print(json.dumps({"address": server.address, "pid": os.getpid()}), flush=True)
        await asyncio.Event().wait()
