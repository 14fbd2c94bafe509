"""One command is one process: its event loop, its signals, its exit code."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import typer

from asynctrain.cli.output import people
from asynctrain.errors import AsyncTrainError

FAILED = 1
STOPPING = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 2  # of these are answered by cancelling


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run ``main()`` to its end, on uvloop where there is one.

    The first SIGINT or SIGTERM cancels it, so that it can save and clean up; a second one cancels it again, which
    abandons what it is saving; a third one has its usual, harsher effect.

    Raises:
        typer.Exit: code 1 where ``main`` failed, told in one sentence; 130 or 143 where a signal ended it.
    """
    received: list[int] = []
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(_cancelled_by_signals(main(), received))
    except (AsyncTrainError, ValueError, OSError) as error:
        people.print(f"asynctrain: {_sentence(error)}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from error
    except (asyncio.CancelledError, KeyboardInterrupt):
        raise typer.Exit(128 + (received[0] if received else signal.SIGINT)) from None


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes the loop of a command: uvloop's, or asyncio's own where uvloop is not available."""
    if sys.platform == "win32":
        return asyncio.new_event_loop
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


async def _cancelled_by_signals(work: Coroutine[Any, Any, None], received: list[int]) -> None:
    """Await ``work`` in this task, which the first two of the signals, noted in ``received``, cancel."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None  # noqa: S101  # a coroutine always runs in a task

    def cancel(number: int) -> None:
        received.append(number)
        if len(received) == PATIENCE:
            ignore()
        task.cancel()

    def ignore() -> None:
        for number in STOPPING:
            loop.remove_signal_handler(number)

    with suppress(NotImplementedError):  # Windows: the runner itself turns Ctrl-C into a cancellation
        for number in STOPPING:
            loop.add_signal_handler(number, cancel, number)
    try:
        await work
    finally:
        with suppress(NotImplementedError):
            ignore()


def _sentence(error: Exception) -> str:
    """Return an error's message; the file first for what the operating system reports."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
