"""The server: one port on which the training service, its health and its description can be called."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from asynctrain._aio import in_thread
from asynctrain.executors.base import Executor
from asynctrain.rpc.security import TLS, Tokens, require_safe
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve import asynctrain_pb2_grpc as rpc
from asynctrain.serve.boundary import Boundary
from asynctrain.serve.limits import MESSAGE_BYTES, Limits
from asynctrain.serve.runs import Runs
from asynctrain.serve.service import TrainingService

SERVICE = pb.DESCRIPTOR.services_by_name["Training"].full_name
OVERALL = ""  # the name under which gRPC's health protocol asks for the whole server
SERVING = health_pb2.HealthCheckResponse.SERVING

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # or a second server would quietly share the port
    ("grpc.keepalive_time_ms", 20_000),  # a client that is gone without a word is noticed within half a minute
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # and may ask as often itself
    ("grpc.keepalive_permit_without_calls", 1),
)


class TrainingServer:
    """A server under way, made by ``serve``.

    Attributes:
        host: that it is bound to.
        port: likewise.
        runs: what it has to do.
    """

    def __init__(self, host: str, port: int, runs: Runs, server: aio.Server, status: Any) -> None:
        self.host = host
        self.port = port
        self.runs = runs
        self._server: aio.Server | None = server  # gRPC's thread ends with the last that is held
        self._status = status

    @property
    def address(self) -> str:
        """``host:port``."""
        return self.host if self.host.startswith("unix:") else f"{self.host}:{self.port}"

    async def drain(self, grace: float) -> None:
        """Say NOT_SERVING, begin no more runs, save those that train, then end all calls.

        Args:
            grace: seconds in which that must be done; what is not saved by then is done again from its last checkpoint.
        """
        server, self._server = self._server, None
        if server is None:
            return
        deadline = asyncio.get_running_loop().time() + grace
        try:
            async with asyncio.timeout_at(deadline):
                await self._status.enter_graceful_shutdown()
                await self.runs.drain()
        except TimeoutError:
            pass
        finally:
            await server.stop(max(0.0, min(1.0, deadline - asyncio.get_running_loop().time())))

    def __repr__(self) -> str:
        return f"<TrainingServer on {self.address}>"


@asynccontextmanager
async def serve(
    path: str | PathLike[str],
    executor: Executor,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    limits: Limits | None = None,
    tokens: Tokens | None = None,
    tls: TLS | None = None,
    insecure: bool = False,
    reflection: bool = False,
    grace: float = 30.0,
) -> AsyncIterator[TrainingServer]:
    """Serve ``TrainModel`` and the rest of ``asynctrain.proto`` while the block lasts.

        async with at.ThreadExecutor() as executor, serve("service/", executor, port=50051) as server:
            await forever()

    Leaving the block drains the server: trainings under way are saved, and go on when the folder is served again.

    Args:
        path: the folder of the runs; one server at a time can use it.
        executor: where gradients are computed, of all runs; it stays the caller's to close.
        host: an address of this machine, or ``unix:PATH``.
        port: 0 for any that is free.
        limits: how much the server does for its clients.
        tokens: of which each call must have one.
        tls: for connections that others cannot read; with an authority, clients must have certificates.
        insecure: permits an address that other machines can reach, without TLS.
        reflection: whether the server describes its services to whoever asks.
        grace: seconds that draining may take.

    Raises:
        ValueError: ``host`` can be reached by others, and neither ``tls`` nor ``insecure`` is given.
        OSError: the folder or the port cannot be used.
    """
    require_safe(host, tls is not None, insecure)
    credentials = None if tls is None else await in_thread(tls.of_server)
    limits = limits or Limits()
    async with Runs.open(Path(path), executor, limits) as runs:
        server = aio.server(
            interceptors=[Boundary(tokens)], options=_OPTIONS, maximum_concurrent_rpcs=int(limits.calls)
        )
        status = health.aio.HealthServicer()  # type: ignore[attr-defined] # not in its stubs
        rpc.add_TrainingServicer_to_server(TrainingService(runs), server)
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        if reflection:
            _describe(server)
        address = host if host.startswith("unix:") else f"{host}:{port}"
        try:
            if credentials is None:
                bound = server.add_insecure_port(address)
            else:
                bound = server.add_secure_port(address, credentials)
        except RuntimeError as error:
            await server.stop(None)
            raise OSError(f"{address} cannot be bound: {error}") from error
        await server.start()
        for name in (OVERALL, SERVICE):
            await status.set(name, SERVING)
        serving = TrainingServer(host, bound, runs, server, status)
        try:
            yield serving
        finally:
            await serving.drain(grace)


def _describe(server: aio.Server) -> None:
    from grpc_reflection.v1alpha import reflection

    names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
