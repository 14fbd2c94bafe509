"""The bot of ``examples/plain_asyncio.py``, where a lesson is bad; the README's tests run the whole script."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from asynctrain.errors import AsyncTrainError
from examples.plain_asyncio import Bot


async def test_a_bot_whose_run_has_failed_says_so_to_who_teaches_it(image_folder: Path) -> None:
    image = (image_folder / "rose" / "00.png").read_bytes()

    async def teach() -> None:
        async with asyncio.timeout(60), Bot.awake(("rose", "tulip")) as bot:
            for _ in range(10_000):  # more than its queue holds
                await bot.teach(image, "weed")

    with pytest.raises((AsyncTrainError, ValueError), match="weed"):
        await teach()
