"""Work that is under way on threads or in a pool: awaited on the loop, stopped, and waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

from asynctrain.errors import ClosedError, ExecutorError
from asynctrain.executors.worker import StopFlag, Stopped

T = TypeVar("T")


class InFlight:
    """The work of one session that is under way."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stops: dict[Future[Any], StopFlag] = {}
        self._is_stopped = False

    @property
    def futures(self) -> list[Future[Any]]:
        """What is not over."""
        return list(self._stops)

    def add(self, future: Future[Any], stop: StopFlag) -> None:
        """Enter work that was handed over; it is struck out when it is over."""
        self._stops[future] = stop
        future.add_done_callback(lambda done: self._stops.pop(done, None))

    def result(self, future: Future[T], stop: StopFlag) -> asyncio.Future[T]:
        """Return ``future`` as one of this loop's; cancelling that sets ``stop``.

        Raises (when awaited): ``ClosedError`` where the session was closed, or the pool shut down, before its end.
        """
        awaitable: asyncio.Future[T] = _KernelFuture(stop)
        _when_done(future, lambda: self._hand_over(future, awaitable))
        return awaitable

    def stop(self) -> None:
        """Stop what is under way, and drop what has not begun."""
        self._is_stopped = True
        for future, stop in list(self._stops.items()):
            stop.set()
            future.cancel()

    def _hand_over(self, done: Future[T], awaitable: asyncio.Future[T]) -> None:
        if awaitable.done():  # cancelled meanwhile
            return
        error = None if done.cancelled() else done.exception()
        if done.cancelled() or isinstance(error, Stopped):  # by no one who waits for it
            closed = "the session on {} is closed" if self._is_stopped else "the pool of {} is shut down"
            awaitable.set_exception(ClosedError(closed.format(self._address)))
        elif error is not None:
            awaitable.set_exception(error)
        else:
            awaitable.set_result(done.result())


class _KernelFuture(asyncio.Future[T]):
    """The result of work in a thread. Cancelling it sets the work's stop flag in that very call.

    A task that is cancelled passes the call on, synchronously, to what it awaits; so between ``task.cancel()`` and the
    flag no turn of the loop goes by, in which the threads would begin further kernels.
    """

    def __init__(self, stop: StopFlag) -> None:
        super().__init__()
        self._stop = stop

    def cancel(self, msg: Any | None = None) -> bool:
        self._stop.set()
        return super().cancel(msg)


async def wait_for_end(address: str, under_way: Callable[[], Iterable[Future[Any]]], grace: float) -> None:
    """Wait until nothing is ``under_way()`` at ``address`` any more, at most ``grace`` seconds.

    Raises:
        ExecutorError: some of it goes on.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace
    while left := list(under_way()):
        patience = deadline - loop.time()
        if patience <= 0:
            raise ExecutorError(address, f"{len(left)} of its jobs did not end within {grace:g} s of being asked to")
        await asyncio.wait([_end_of(future) for future in left], timeout=patience)


def _end_of(future: Future[Any]) -> asyncio.Future[None]:
    """Return a future of this loop that is done when ``future`` is, whatever became of it."""
    ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    _when_done(future, lambda: None if ended.done() else ended.set_result(None))
    return ended


def _when_done(future: Future[Any], call: Callable[[], None]) -> None:
    """Have ``call`` made on this loop once ``future`` is done; where the loop was closed by then nobody waits."""
    loop = asyncio.get_running_loop()

    def tell(_: Future[Any]) -> None:
        try:
            loop.call_soon_threadsafe(call)
        except RuntimeError:
            if not loop.is_closed():
                raise

    future.add_done_callback(tell)
