"""Concurrent requests, gathered: those that come while others are being answered are answered together, next."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from asynctrain._aio import Failure, in_thread
from asynctrain.executors.worker import StopFlag

Q = TypeVar("Q")
A = TypeVar("A")

Answer = Callable[[Sequence[Q], StopFlag], Sequence[A | Failure]]


class Gathering(Generic[Q, A]):
    """Answers the requests of any number of tasks, in any number of event loops, in micro-batches.

    Of the callers in one loop one leads: it has the first of those waiting answered, in a thread, and when it is done
    the first of those that came meanwhile leads. So no task or thread outlives its callers, and there is one thread for
    each loop, however many ask.

    A caller that is cancelled takes nothing from the others: if it leads, it waits until those of its micro-batch are
    answered. The computing is stopped when nobody wants its answers any more.

    Args:
        answer: returns the answer, or what went wrong, for each question; called in a thread. An error that it raises
            is told to all who asked. It stops, by raising ``Stopped``, when the flag is set.
        limit: how many items a micro-batch has at most; a request that alone has more is one by itself.
    """

    def __init__(self, answer: Answer[Q, A], limit: int) -> None:
        self._answer = answer
        self._limit = limit
        self._callers: dict[asyncio.AbstractEventLoop, _Callers[Q, A]] = {}

    async def ask(self, question: Q, items: int) -> A:
        """Return the answer to ``question``, which has so many items; raise what went wrong with it."""
        loop = asyncio.get_running_loop()
        callers = self._callers.setdefault(loop, _Callers(self._answer, self._limit))
        callers.present += 1
        try:
            found = await callers.ask(_Request(question, items))
        finally:
            callers.present -= 1
            if not callers.present:
                del self._callers[loop]
        if isinstance(found, Failure):
            raise found.error
        return found


@dataclass(eq=False, slots=True)
class _Request(Generic[Q, A]):
    """One caller's question. news: is done when there is an answer, or nobody leads."""

    question: Q
    items: int
    answer: A | Failure | None = None
    wanted: bool = True
    news: asyncio.Future[None] | None = None
    batch: _MicroBatch[Q, A] | None = None

    def wake(self) -> None:
        if self.news is not None and not self.news.done():
            self.news.set_result(None)


@dataclass(eq=False, slots=True)
class _MicroBatch(Generic[Q, A]):
    """Requests that are answered together."""

    requests: Sequence[_Request[Q, A]]
    stop: StopFlag = field(default_factory=StopFlag)

    def drop(self, request: _Request[Q, A]) -> None:
        """Note that nobody waits for ``request``; with the last one the computing stops."""
        request.wanted = False
        if not any(other.wanted for other in self.requests):
            self.stop.set()

    def compute(self, answer: Answer[Q, A]) -> None:
        """Answer all requests; in a thread."""
        answers: Sequence[A | Failure]
        try:
            answers = answer([request.question for request in self.requests], self.stop)
        except Exception as error:
            answers = [Failure(error)] * len(self.requests)
        for request, found in zip(self.requests, answers, strict=True):
            request.answer = found


class _Callers(Generic[Q, A]):
    """The callers in one event loop."""

    def __init__(self, answer: Answer[Q, A], limit: int) -> None:
        self.present = 0
        self._answer = answer
        self._limit = limit
        self._waiting: deque[_Request[Q, A]] = deque()
        self._led = False

    async def ask(self, request: _Request[Q, A]) -> A | Failure:
        self._waiting.append(request)
        try:
            while request.answer is None:
                if self._led:
                    request.news = asyncio.get_running_loop().create_future()
                    await request.news
                else:
                    await self._lead(request)
        finally:
            self._leave(request)
        return request.answer

    async def _lead(self, leader: _Request[Q, A]) -> None:
        """Have the first of those waiting answered. The leader is one of them, unless more came before it."""
        batch = _MicroBatch(self._first())
        for request in batch.requests:
            request.batch = batch
        self._led = True
        try:
            await in_thread(batch.compute, self._answer, stop=partial(batch.drop, leader))
        finally:
            self._led = False
            for request in batch.requests:
                request.wake()

    def _first(self) -> list[_Request[Q, A]]:
        """Take the first of those waiting, as many as make a micro-batch."""
        taken = [self._waiting.popleft()]
        items = taken[0].items
        while self._waiting and items + self._waiting[0].items <= self._limit:
            taken.append(self._waiting.popleft())
            items += taken[-1].items
        return taken

    def _leave(self, request: _Request[Q, A]) -> None:
        """Forget a request that is answered or given up, and see that the others are led."""
        if request.batch is not None:
            request.batch.drop(request)
        else:
            self._waiting.remove(request)
        if self._waiting and not self._led:
            self._waiting[0].wake()
