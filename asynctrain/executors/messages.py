"""Small messages between a parent and its worker processes: JSON behind its length, on a stream socket.

Arrays do not travel here; a message names the block of shared memory that they are in.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from typing import Any

Message = dict[str, Any]

_HEADER = struct.Struct("<I")
_encoded = json.JSONEncoder(separators=(",", ":")).encode


def encoded(message: Message) -> bytes:
    """Return the bytes of one message."""
    body = _encoded(message).encode()
    return _HEADER.pack(len(body)) + body


class Inbox:
    """Finds the messages in a stream of bytes that comes in pieces of any size."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Take what was received next; yield the messages that are complete."""
        self._bytes += data
        while len(self._bytes) >= _HEADER.size:
            end = _HEADER.size + _HEADER.unpack_from(self._bytes)[0]
            if len(self._bytes) < end:
                return
            body = self._bytes[_HEADER.size : end].decode()
            del self._bytes[:end]
            yield json.loads(body)
