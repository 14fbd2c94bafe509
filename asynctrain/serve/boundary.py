"""The boundary of the server: every call passes here, whichever service it is for.

Who calls is known before anything is read; bytes that are no message, refusals and errors become a status; nothing of
the server's insides, and no token, gets into one or into a log.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode, aio

from asynctrain.rpc.security import ANYONE, Tokens
from asynctrain.serve.refusal import Refused, invalid

_logger = logging.getLogger(__name__)
_client: ContextVar[str] = ContextVar("asynctrain_client")

Context = Any  # grpc.aio.ServicerContext, whose types are those of blocking servers
Handler = Any  # grpc.RpcMethodHandler, a named tuple


def client() -> str:
    """Return the name of the client whose call this is."""
    return _client.get()


@dataclass(frozen=True, slots=True)
class Malformed:
    """What stands in the place of a message whose bytes are none."""

    def require(self) -> None:
        """Raise ``Refused``."""
        raise invalid("these bytes are not the message that this method takes")


class Boundary(aio.ServerInterceptor):  # type: ignore[type-arg] # generic in its stubs alone
    """Lets calls in.

    Args:
        tokens: of which every call must have one; None to let everyone in who can connect.
    """

    def __init__(self, tokens: Tokens | None) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Return the method's handler, guarded."""
        handler = await continuation(handler_call_details)
        if handler is None:  # a method that nobody has: gRPC says UNIMPLEMENTED
            return handler
        kind = next(name for name in _KINDS if getattr(handler, name) is not None)
        return handler._replace(
            **{kind: self._guarded(getattr(handler, kind))},
            request_deserializer=_careful(handler.request_deserializer),
        )

    def _guarded(self, behavior: Callable[..., Any]) -> Callable[..., Any]:
        """Return a handler's function, made safe; what gives its answers one by one does so still."""
        if inspect.isasyncgenfunction(behavior):

            async def answers(request: Any, context: Context) -> AsyncIterator[Any]:
                try:
                    self._enter(context)
                    async with aclosing(behavior(_checked(request), context)) as given:
                        async for answer in given:
                            yield answer
                except Exception as error:
                    await _refuse(error, context)

            return answers

        async def answer(request: Any, context: Context) -> Any:
            try:
                self._enter(context)
                return await behavior(_checked(request), context)
            except Exception as error:
                await _refuse(error, context)

        return answer

    def _enter(self, context: Context) -> None:
        """Find out whose call this is; raises ``Refused`` where nobody's who may."""
        _client.set(_certified(context) if self._tokens is None else self._named(context))

    def _named(self, context: Context) -> str:
        given = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        words = str(given[0]).split() if len(given) == 1 else []
        if len(words) != 2 or words[0].lower() != "bearer":
            raise Refused(StatusCode.UNAUTHENTICATED, "a call must have the metadata authorization: Bearer TOKEN")
        assert self._tokens is not None  # noqa: S101 - asked for only then
        name = self._tokens.name_of(words[1])
        if name is None:
            raise Refused(StatusCode.UNAUTHENTICATED, "this token is not known")
        return name


_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def _certified(context: Context) -> str:
    """Return the name in the client's certificate, if it has shown one."""
    names = context.auth_context().get("x509_common_name", [])
    return names[0].decode(errors="replace") if names else ANYONE


def _careful(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def read(content: bytes) -> Any:
        try:
            return deserialize(content)
        except (DecodeError, ValueError):
            return Malformed()

    return read


def _checked(request: Any) -> Any:
    """Return a message, or a stream of them, that raises ``Refused`` where it is malformed."""
    if isinstance(request, Malformed):
        request.require()
    return _each_checked(request) if isinstance(request, AsyncIterator) else request


async def _each_checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


async def _refuse(error: Exception, context: Context) -> None:
    if isinstance(error, aio.AbortError):
        raise error
    if isinstance(error, Refused):
        await context.abort(error.code, error.detail)
    if isinstance(error, aio.InternalError | aio.UsageError) or context.cancelled():
        raise error  # the client is gone, and nobody is there to be told
    if isinstance(error, OSError):
        _logger.error("a call has failed", exc_info=error)
        await context.abort(StatusCode.RESOURCE_EXHAUSTED, f"the server could not write: {error.strerror or 'unknown'}")
    _logger.error("a call has failed", exc_info=error)
    await context.abort(StatusCode.INTERNAL, f"an error of the server's own: {type(error).__name__}")
