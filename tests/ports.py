"""Ports for servers that come and go."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_port() -> Iterator[int]:
    """Have a port of 127.0.0.1 for servers that come and go, which nobody else is given meanwhile.

    It stays bound to a socket that does not listen, as Linux lets a server be bound there too. Otherwise, as soon as a
    server is gone, it might become the near end of any connection of the machine.
    """
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        port = keeper.getsockname()[1]
        if sys.platform != "linux":
            keeper.close()
        yield port
