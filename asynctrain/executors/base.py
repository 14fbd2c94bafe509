"""The executor seam: where gradients are computed, as two protocols.

An executor here is a home for gradient workers, not a ``concurrent.futures.Executor``: it is not handed functions, it
knows one job. A training run opens a session on it and then uses two verbs: ``broadcast`` the parameters of a version,
``compute`` a piece of work with them. Whatever keeps this contract (threads, processes, other machines, a group of
executors) can train, with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol, Self, overload

from asynctrain.types import (
    ForwardResult,
    ForwardWork,
    GradientResult,
    GradientWork,
    Notice,
    Params,
    Program,
    SharedThreads,
)

Tell = Callable[[Notice], None]
"""Hears of workers that come and go: called on the loop, synchronously, so it must be quick and must not raise."""


def nobody(notice: Notice) -> None:
    """Let a notice go unheard."""


def threads_of(executor: Executor) -> SharedThreads | None:
    """Return the threads of this process that ``executor`` computes on, where it has them to share.

    Whoever makes the batches should use the same: with more threads busy than there are CPUs, one that holds the
    interpreter waits for its turn, and the event loop for it.
    """
    threads: SharedThreads | None = getattr(executor, "shared_threads", None)
    return threads


class Session(Protocol):
    """One program on one home. Two sessions on the same executor never see each other."""

    @property
    def slots(self) -> int:
        """How many pieces of work are computed at once."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, str]:
        """The numeric fingerprint of the place that computes (``asynctrain.numeric_fingerprint``)."""
        ...

    async def broadcast(self, params: Params, model_state: Params, version: int) -> None:
        """Make these parameters the ones of ``version``; the arrays must not be written until the next broadcast."""
        ...

    @overload
    async def compute(self, work: GradientWork, version: int) -> GradientResult: ...
    @overload
    async def compute(self, work: ForwardWork, version: int) -> ForwardResult: ...
    async def compute(self, work: GradientWork | ForwardWork, version: int) -> GradientResult | ForwardResult:
        """Return the result of ``work``, a pure function of (program, parameters of ``version``, work).

        Raises:
            StaleParametersError: the session holds another version.
            ClosedError: the session or its executor is closed.
            WorkerLostError: the home is gone; the work may be done elsewhere.
            ExecutorError: the home failed.

        Cancelling stops the computing as soon as the home can (threads: within one layer's kernel); the session stays
        usable.
        """
        ...


class Executor(Protocol):
    """A home for gradient workers; not a ``concurrent.futures.Executor``."""

    def open(self, program: Program, tell: Tell = ...) -> AbstractAsyncContextManager[Session]:
        """Open a session for ``program``; leaving it waits until nothing of it computes any more.

        ``tell`` hears of workers that come and go while the session is open; a home inside this process has none.
        """
        ...

    async def aclose(self, grace: float = ...) -> None:
        """Stop all work and give back everything the executor holds, within ``grace`` seconds; may be called again."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...
