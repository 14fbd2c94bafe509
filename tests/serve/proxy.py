"""A connection that misbehaves: between a client and a server, it drops, throttles, or goes silent."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self

RATE, DELAY = 200_000, 0.05  # bytes in a second, seconds


class Proxy:
    """Passes bytes on to a port, and does to each connection what is next in its plan.

    Attributes:
        port: its own.
        plan: for each connection to come (what, after so many bytes either way): ``drop`` closes it, ``half_open``
            passes nothing on any more and says nothing, ``throttle`` passes on 200 kB in a second, ``delay`` passes
            everything on, 50 ms later.
    """

    def __init__(self, target: int) -> None:
        self.plan: list[tuple[str, int]] = []
        self.port = 0
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        fault, after = self.plan.pop(0) if self.plan else ("", 0)
        connection = _Connection(fault, after)
        with suppress(OSError, asyncio.CancelledError):
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            try:
                passing = [
                    asyncio.create_task(connection.passes(reader, back)),
                    asyncio.create_task(connection.passes(there, writer)),
                ]
                try:
                    await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in passing:
                        way.cancel()
                    await asyncio.wait(passing)
            finally:
                for end in (writer, back):
                    end.close()


class _Connection:
    def __init__(self, fault: str, after: int) -> None:
        self._fault = fault
        self._after = after
        self._passed = 0

    async def passes(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1_000 if self._fault != "delay" else 2**16):
                self._passed += len(data)
                if self._fault and self._passed > self._after:
                    if self._fault == "drop":
                        return
                    if self._fault == "half_open":
                        await asyncio.Event().wait()
                    await asyncio.sleep(DELAY if self._fault == "delay" else len(data) / RATE)
                writer.write(data)
                await writer.drain()
