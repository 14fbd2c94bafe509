"""One stream between a coordinator and a worker, as either of the two sees it.

What is said is sent in its order; only heartbeats overtake. Both sides send them all the time, so that each notices
when the other is gone without a word: a machine that is switched off, a process that is frozen, a cable that is cut.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from google.protobuf.message import DecodeError
from grpc import aio

from asynctrain._aio import ServingGroup
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.codec import Cargo, Frame, frame_in

T = TypeVar("T")

EOF: Any = aio.EOF  # type: ignore[attr-defined] # what is read at the end of a stream

PROTOCOL = 1
SCHEMA = hashlib.sha256(pb.DESCRIPTOR.serialized_pb).hexdigest()

HANDSHAKE = 10.0  # seconds for each step of it
QUEUED = 2**23  # bytes that wait to be sent, before whoever sends more has to wait: some frames, to keep the wire busy
UNREAD = 2**25  # bytes that wait to be sent: whoever lets more gather, does not read at all

Message = pb.FromWorker | pb.FromCoordinator

_logger = logging.getLogger(__name__)


class Stream(Protocol):
    """What gRPC's two ends of a stream have in common: a call of its client, a context of its server."""

    def read(self) -> Awaitable[Any]:
        """Return the bytes of the next message, or ``EOF``."""
        ...

    def write(self, message: bytes) -> Awaitable[None]:
        """Send the bytes of a message."""
        ...


class LinkError(Exception):
    """The link is gone; the message says why."""


class ReleaseError(LinkError):
    """The other side is of another release; to try again will not mend it."""


class RefusedError(LinkError):
    """The other side has sent what cannot be; the message says what."""


BROKEN = LinkError, aio.AioRpcError, aio.InternalError, aio.UsageError, asyncio.InvalidStateError, OSError
"""How a stream's end shows itself."""


class Link:
    """Sends, receives and beats on a stream, until that is over.

    Args:
        stream: after the handshake.
        kind: of the messages that come.
        beat: the message that is sent for one to hear.
        heartbeat: seconds of silence after which the other side counts as gone.
    """

    def __init__(self, stream: Stream, kind: type[Message], beat: Message, heartbeat: float) -> None:
        self.gone: asyncio.Future[str] = asyncio.get_running_loop().create_future()  # and why
        self._stream = stream
        self._kind = kind
        self._heartbeat = heartbeat
        self._interval = min(heartbeat / 4, 1.0)
        self._silent = 0  # beats in a row
        self._beat_bytes = beat.SerializeToString()
        self._beat_waits = False
        self._unsent: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._more = asyncio.Event()
        self._refused: RefusedError | None = None
        self._waiting: list[asyncio.Future[None]] = []  # for something to be sent

    def say(self, message: Message | bytes) -> None:
        """Send a message, after those that were said before."""
        if self.gone.done():
            return
        data = message if isinstance(message, bytes) else message.SerializeToString()
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        self._more.set()
        if self._unsent_bytes > UNREAD:
            self.lose("it does not read what it is sent")

    async def send(self, message: Message | bytes) -> None:
        """Send a message when there is room for it; raises ``LinkError``."""
        await asyncio.sleep(0)  # whoever sends many large ones gives others a turn between them
        await self._until(QUEUED)
        if self.gone.done():
            raise LinkError(self.gone.result())
        self.say(message)

    async def send_frames(self, cargo: Cargo, transfer: int) -> None:
        """Send the frames of a transfer as fast as there is room for them; raises ``LinkError``.

        Where it is cancelled, those that are left are not sent.
        """
        for frame in cargo.frames(transfer):
            await self.send(frame)

    def lose(self, reason: str) -> None:
        """Let it be over, if it is not yet."""
        if not self.gone.done():
            self.gone.set_result(reason)
            self._unsent.clear()
            self._wake()

    async def run(self, receive: Callable[[str, Any], Awaitable[None]]) -> str:
        """Serve the stream until it is over, and return why.

        Args:
            receive: called with what each message says, the name of its kind first, one after the other; heartbeats
                aside. It must be quick. It raises ``LinkError`` or ``ValueError`` for what cannot be.

        Raises:
            RefusedError: the other side has sent what cannot be.
        """
        try:
            async with ServingGroup() as group:
                group.create_task(self._write(), name="link-write")
                group.create_task(self._read(receive), name="link-read")
                group.create_task(self._beat(), name="link-beat")
                await asyncio.wait([self.gone])
        finally:
            self.lose("it was closed")
        if self._refused is not None:
            raise self._refused
        return self.gone.result()

    async def flush(self) -> None:
        """Wait until what was said has been handed to gRPC, or the link is over."""
        await self._until(0)

    async def _until(self, most: int) -> None:
        """Wait until at most so many bytes are unsent, or the link is over."""
        while self._unsent_bytes > most and not self.gone.done():
            sent = asyncio.get_running_loop().create_future()
            self._waiting.append(sent)
            await sent

    async def _write(self) -> None:
        try:
            while True:
                while not self._unsent:
                    self._more.clear()
                    await self._more.wait()
                data = self._unsent.popleft()
                if data is self._beat_bytes:
                    self._beat_waits = False
                await self._stream.write(data)
                self._unsent_bytes -= len(data)
                self._wake()
        except Exception as error:
            self.lose(told(error))
        finally:
            self.lose("the stream has ended")

    async def _read(self, receive: Callable[[str, Any], Awaitable[None]]) -> None:
        try:
            while (message := await self._stream.read()) is not EOF:
                self._silent = 0
                await self._hear(message, receive)
        except RefusedError as error:
            self._refused = error
            self.lose(str(error))
        except Exception as error:
            self.lose(told(error))
        finally:
            self.lose("it has closed the stream")

    async def _hear(self, message: bytes, receive: Callable[[str, Any], Awaitable[None]]) -> None:
        try:
            kind, said = parsed(message, self._kind)
            if kind != "heartbeat":
                await receive(kind, said)
        except (LinkError, ValueError) as error:
            raise RefusedError(str(error)) from error
        except Exception as error:  # nobody has thought of it
            _logger.exception("a message could not be handled")
            raise RefusedError("it has sent what could not be handled") from error

    async def _beat(self) -> None:
        """Send heartbeats, and count those without a word from the other side.

        Beats rather than seconds: where this loop itself was held up, the other's may be there, and yet to be read.
        """
        while self._silent * self._interval < self._heartbeat:
            self._silent += 1
            if not self._beat_waits:
                self._beat_waits = True
                self._unsent.appendleft(self._beat_bytes)
                self._unsent_bytes += len(self._beat_bytes)
                self._more.set()
            await asyncio.sleep(self._interval)
        self.lose(f"it has not been heard for {self._heartbeat:g} s")

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for sent in waiting:
            if not sent.done():
                sent.set_result(None)


async def shaken(step: Awaitable[T], what: str) -> T:
    """Return what a step of the handshake returns; raises ``LinkError`` where it takes too long, and gRPC's errors."""
    try:
        async with asyncio.timeout(HANDSHAKE):
            return await step
    except TimeoutError:
        raise LinkError(f"it has not taken part in the handshake within {HANDSHAKE:g} s, at {what}") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise LinkError("it has cancelled the call") from None  # gRPC tells so too where nobody here did


async def first_message(stream: Stream, of: type[Message], kind: str) -> Any:
    """Return what the other side says first, which must be of ``kind``.

    Raises:
        LinkError: it says something else, or nothing.
        ReleaseError: it is of another release.
        AioRpcError: gRPC's, where there is no connection.
    """
    message = await shaken(stream.read(), kind)
    if message is EOF:
        raise LinkError(f"it must say {kind} first")
    try:
        found, said = parsed(message, of)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    if found != kind:
        raise RefusedError(f"it must say {kind} first, got {found}")
    if said.protocol != PROTOCOL:
        raise ReleaseError(
            f"the protocol is version {PROTOCOL} here and {said.protocol} there: use one release for both"
        )
    if said.schema != SCHEMA:
        raise ReleaseError("the messages differ here and there: use one release of asynctrain for both")
    return said


def parsed(message: bytes, of: type[Message]) -> tuple[str, Any]:
    """Return the kind of a message, and what it says; raises ``ValueError`` where it is none."""
    try:
        if (frame := frame_in(message)) is not None:
            return "frame", frame
        whole = of.FromString(message)
    except DecodeError as error:
        raise ValueError("it has sent bytes that are no message") from error
    kind = whole.WhichOneof("kind")
    if kind is None:
        raise ValueError("it has sent a message that says nothing")
    said = getattr(whole, kind)
    if kind == "frame":
        said = Frame(said.transfer, said.number, memoryview(said.data), said.checksum)
    return kind, said


def told(error: Exception) -> str:
    """Return in a few words why a link has ended."""
    if isinstance(error, aio.AioRpcError):
        return error.details() or error.code().name
    return str(error) or type(error).__name__
