"""A bot that learns from the images it is sent while it answers, in one event loop and without any web framework.

python examples/plain_asyncio.py flowers/

The folder (of a folder per class) stands for a chat: its images come in, in random order. The bot first says what it
takes each one for, with the weights of that moment; then it is told the answer, which becomes a lesson.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

import asynctrain as at

Lesson = tuple[bytes, str]
PATIENCE = 24 * 3600.0  # seconds without a lesson after which the bot gives up
ROUNDS = 8  # how often the chat repeats itself


class Bot:
    """Answers and learns at once; ``async with Bot.awake(classes) as bot``.

    The queue of lessons is bounded: who teaches faster than the bot learns waits in ``teach``.
    """

    def __init__(self, run: at.Run, lessons: asyncio.Queue[Lesson | None]) -> None:
        self._run = run
        self._lessons = lessons

    @classmethod
    @asynccontextmanager
    async def awake(cls, classes: tuple[str, ...]) -> AsyncIterator[Bot]:
        """Begin to learn; at the end of the block the lessons that are left are learned first."""
        lessons: asyncio.Queue[Lesson | None] = asyncio.Queue(maxsize=256)
        stream = at.data.from_async_iterable(_until_none(lessons), classes, name="lesson", timeout=PATIENCE)
        loader = at.StreamLoader(
            stream, batch_size=8, image_size=(32, 32), errors="skip", augment=at.augment.standard()
        )
        model = at.models.small_cnn(num_classes=len(classes), image_shape=(32, 32, 3))
        async with at.ThreadExecutor() as executor:
            trainer = at.Trainer(model, optimizer=at.optim.adamw(2e-3), executor=executor)
            async with trainer.start(loader, epochs=1) as run:
                bot = cls(run, lessons)
                yield bot
                await bot._give(None)
                await run.result()

    async def answer(self, image: bytes) -> at.Prediction:
        """Say what is on an image."""
        return await self._run.snapshot().predict(image)

    async def teach(self, image: bytes, label: str) -> None:
        """Have it learn what was on an image; raises what its run has failed of."""
        await self._give((image, label))

    async def _give(self, lesson: Lesson | None) -> None:
        giving = asyncio.create_task(self._lessons.put(lesson))
        try:
            await asyncio.wait([giving, self._run.task], return_when=asyncio.FIRST_COMPLETED)
        finally:
            giving.cancel()
        self._run.raise_error()

    @property
    def steps(self) -> int:
        """How many steps it has learned."""
        return self._run.progress.step


async def _until_none(lessons: asyncio.Queue[Lesson | None]) -> AsyncIterator[Lesson]:
    while (lesson := await lessons.get()) is not None:
        yield lesson


async def main(folder: Path) -> None:
    """Let the images of a folder come in, and print how often the bot was right before it was told."""
    data = await asyncio.to_thread(at.ImageFolder, folder)
    order = random.Random(0)  # noqa: S311 - a chat needs no secrets
    async with Bot.awake(data.classes) as bot:
        for number in range(1, ROUNDS + 1):
            right = 0
            for index in order.sample(range(len(data)), len(data)):
                record = data[index]
                image = await asyncio.to_thread(record.source.read)
                truth = data.classes[record.label]
                try:
                    said = await bot.answer(image)
                except at.errors.DecodeError as error:
                    print(f"{record.source}: {error}")
                    continue
                right += said.label == truth
                await bot.teach(image, truth)
            print(f"round {number}: {right / len(data):.0%} right at first sight, {bot.steps} steps learned")
        print(said)


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(Path(sys.argv[1])))
