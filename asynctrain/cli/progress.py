"""The progress of a run that a command has started."""

from __future__ import annotations

from collections.abc import AsyncIterable

from rich.console import Console

from asynctrain.train.display import Display, TerminalView
from asynctrain.train.events import Event


async def show(events: AsyncIterable[Event], console: Console) -> None:
    """Show ``events`` on ``console`` until they end."""
    display = Display(TerminalView(console))
    try:
        async for event in events:
            display(event)
    finally:
        display.close()
