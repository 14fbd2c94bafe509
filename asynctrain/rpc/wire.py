"""Ports and connections: how a stream comes about, whoever of the two dials."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from grpc import aio

from asynctrain._aio import in_thread
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.link import BROKEN, RefusedError, ReleaseError, told
from asynctrain.rpc.security import TLS, Tokens, is_loopback, require_safe

SERVICE = pb.DESCRIPTOR.services_by_name["Work"].full_name
MESSAGE_BYTES = 2**22  # gRPC's own limit, said
STREAMS = 256  # at once, on one port
LARGEST_LESSON = 2**25 - 2**13  # bytes: the largest block, with what malloc adds to it, that raises glibc's thresholds
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts to dial
PERMANENT = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNIMPLEMENTED,
)

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # or a second server would quietly share the port
    ("grpc.http2.max_frame_size", MESSAGE_BYTES),  # 16 KiB of a message at a time otherwise,
    ("grpc.http2.lookahead_bytes", 2 * MESSAGE_BYTES),  # and 64 KiB before the other side has to ask for more
    ("grpc.keepalive_time_ms", 20_000),  # what a side that is gone without a word has left behind is cleared away
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.enable_http_proxy", 0),  # the environment's is for the web
    ("grpc.use_local_subchannel_pool", 1),  # each connection is its own, and is closed with its channel
)

Handle = Callable[[Any], Awaitable[None]]
"""Serves one stream, from its context."""


def is_permanent(error: Exception) -> bool:
    """Return whether dialling again will not mend it."""
    files = OSError  # those of TLS: what goes wrong between machines is told as an AioRpcError
    return isinstance(error, ReleaseError | files) or (isinstance(error, aio.AioRpcError) and error.code() in PERMANENT)


@dataclass(frozen=True, slots=True, repr=False)
class Access:
    """Who may connect, and how.

    Attributes:
        tls: the files of connections that others cannot read.
        tokens: of which whoever dials must have one; for the side that listens.
        token: who this is; for the side that dials. Sent to other machines over TLS alone.
        insecure: permits addresses of other machines without TLS.
    """

    tls: TLS | None = None
    tokens: Tokens | None = None
    token: str | None = None
    insecure: bool = False

    def require_safe(self, address: str, *, dials: bool) -> None:
        """Raise ``ValueError`` where ``HOST:PORT`` leads to or from other machines, and that is not permitted."""
        host, _ = parted(address)
        require_safe(host, self.tls is not None, self.insecure)
        if dials and self.token is not None and self.tls is None and not is_loopback(host):
            raise ValueError(f"TLS must be used where a token is sent to another machine, {address}")

    def __repr__(self) -> str:
        return f"<Access, {'TLS' if self.tls else 'unencrypted'}>"  # never the token


def parted(address: str) -> tuple[str, int]:
    """Return the host and the port of ``HOST:PORT``; raises ``ValueError`` where it is none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65_535 or (":" in host and not host.startswith("[")):
        raise ValueError(f"an address must be HOST:PORT, got {address!r}")
    return host, int(port)


class Pauses:
    """The pauses between attempts to dial: ever longer, and short again after a connection that has lasted."""

    def __init__(self) -> None:
        self._next = SHORTEST_PAUSE

    def after(self, seconds: float) -> float:
        """Return how many seconds to wait after a connection that lasted so many; a little random."""
        pause = SHORTEST_PAUSE if seconds > LONGEST_PAUSE else self._next
        self._next = min(2 * pause, LONGEST_PAUSE)
        return pause * random.uniform(0.5, 1.0)  # noqa: S311 - that not all dial at once


@asynccontextmanager
async def listening(address: str, method: str, handle: Handle, access: Access) -> AsyncIterator[int]:
    """Serve ``method`` on ``HOST:PORT`` while the block lasts; yields the port.

    Args:
        address: port 0 for any that is free.
        method: ``Join`` or ``Serve``.
        handle: serves one stream, of bytes; when it returns or raises one of ``BROKEN``, the stream ends.
        access: whom to let in.

    Raises:
        ValueError: other machines could connect, and that is not permitted.
        OSError: the port cannot be used.
    """
    access.require_safe(address, dials=False)
    credentials = None if access.tls is None else await in_thread(access.tls.of_server)
    _keep_freed_memory()

    async def guarded(_: Any, context: Any) -> None:
        if access.tokens is not None and not _is_known(access.tokens, context):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a call must have a known token")
        try:
            await handle(context)
        except ReleaseError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except RefusedError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except BROKEN as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, told(error))

    handler = grpc.stream_stream_rpc_method_handler(guarded)
    server = aio.server(options=_OPTIONS, maximum_concurrent_rpcs=STREAMS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {method: handler}),))
    try:
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        await server.stop(None)
        raise OSError(f"{address} cannot be bound: {error}") from error
    await server.start()
    try:
        yield port
    finally:
        await server.stop(1.0)


@asynccontextmanager
async def dialled(address: str, method: str, access: Access) -> AsyncIterator[Any]:
    """Call ``method`` at ``HOST:PORT``; yields the call, of bytes, which ends with the block.

    gRPC's errors come from its use.
    """
    access.require_safe(address, dials=True)
    credentials = None if access.tls is None else await in_thread(access.tls.of_client)
    _keep_freed_memory()
    if credentials is None:
        channel = aio.insecure_channel(address, options=_OPTIONS)
    else:
        channel = aio.secure_channel(address, credentials, options=_OPTIONS)
    async with channel:
        stream_of: Any = channel.stream_stream  # the stubs do not know that serializers may be left out
        metadata = () if access.token is None else (("authorization", f"Bearer {access.token}"),)
        call = stream_of(f"/{SERVICE}/{method}")(metadata=metadata)
        try:
            yield call
        except asyncio.InvalidStateError:
            await call.wait_for_connection()  # it had ended before it was written to: this raises what it ended with
            raise
        finally:
            call.cancel()


def _keep_freed_memory() -> None:
    """Have malloc keep what messages are made of, rather than ask the kernel for the pages of each one anew.

    That took a fifth of a round of 10 MB. glibc hands memory back by thresholds, which it raises to the size of the
    largest block freed so far, up to 32 MiB; this one is never touched.
    """
    np.empty(LARGEST_LESSON, np.uint8)


def _is_known(tokens: Tokens, context: Any) -> bool:
    given = [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]
    words = given[0].split() if len(given) == 1 else []
    return len(words) == 2 and words[0].lower() == "bearer" and tokens.name_of(words[1]) is not None
