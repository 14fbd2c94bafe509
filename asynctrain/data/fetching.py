"""Sources that are read asynchronously: with a deadline, and again when what went wrong may pass."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, TypeGuard

from asynctrain.errors import ReadError
from asynctrain.types import Source

LONGEST_PAUSE = 10.0  # seconds


class AsyncSource(Source, Protocol):
    """A source that had better be read on the loop, many at once, than in a thread."""

    @property
    def connection(self) -> AbstractAsyncContextManager[object]:
        """What it shares with others of its kind: reading is cheaper while that is open, and possible in any case."""
        ...

    async def fetch(self) -> bytes:
        """Return the encoded image; waits its turn, ends by a deadline, raises ``ReadError``."""
        ...


def is_async(source: Source) -> TypeGuard[AsyncSource]:
    """Whether ``source`` has a ``fetch``."""
    return hasattr(source, "fetch")


class Connections:
    """Fetches sources, and keeps their connections open from the first use of each to the end of the block.

    async with Connections() as connections:
        content = await connections.fetch(record.source)
    """

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._open: set[AbstractAsyncContextManager[object]] = set()

    async def fetch(self, source: AsyncSource) -> bytes:
        """Return ``await source.fetch()``."""
        connection = source.connection
        if connection not in self._open:
            self._open.add(connection)  # before the wait: whoever comes meanwhile need not open it as well
            await self._stack.enter_async_context(connection)
        return await source.fetch()

    async def __aenter__(self) -> Connections:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.clear()
        await self._stack.__aexit__(kind, error, traceback)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a read, and how often to try.

    Attributes:
        timeout: seconds, positive; the deadline of each try.
        retries: further tries after one that failed in a way that may pass, 0 or more.
        backoff: seconds, 0 or more; about the pause before the first retry. Each further pause is twice as long, up to
            10 s, and shortened by up to a half, by name and try, so that many reads that failed together do not all
            come back together.
    """

    timeout: float = 30.0
    retries: int = 3
    backoff: float = 0.1

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(f"timeout must be more than 0 seconds, got {self.timeout}")
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, got {self.retries}")
        if not self.backoff >= 0:
            raise ValueError(f"backoff must be 0 seconds or more, got {self.backoff}")

    async def read(
        self,
        read: Callable[[], Awaitable[bytes]],
        name: str,
        may_pass: Callable[[Exception], bool],
        places: asyncio.Semaphore,
    ) -> bytes:
        """Return what ``read`` returns, within the deadline, tried again after what ``may_pass``.

        Each try takes one of the ``places``; neither the wait for it nor a pause counts towards the deadline.

        Raises:
            ReadError: with ``name``; what the last try raised is its cause.
        """
        failures = 0
        while True:
            try:
                async with places, asyncio.timeout(self.timeout):
                    return await read()
            except Exception as error:
                failures += 1
                if failures > self.retries or not may_pass(error):
                    raise ReadError(name, self._reason(error, failures)) from error
            await asyncio.sleep(self.pause(name, failures))

    def pause(self, name: str, failures: int) -> float:
        """Return how many seconds to wait after so many failures."""
        shortening = zlib.crc32(f"{name} {failures}".encode("utf-8", "replace")) / 2**33
        return min(self.backoff * 2.0 ** min(failures - 1, 60), LONGEST_PAUSE) * (1 - shortening)

    def _reason(self, error: Exception, failures: int) -> str:
        if isinstance(error, TimeoutError) and not str(error):
            told = f"no answer within {self.timeout:g} s"
        else:
            told = f"{type(error).__name__}: {error}"
        return f"cannot be read: {told}" if failures == 1 else f"cannot be read, tried {failures} times: {told}"
