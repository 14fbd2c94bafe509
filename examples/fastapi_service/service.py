"""What the service does, whatever asks it to: it keeps uploaded images, and one training at a time in its loop."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from pydantic import BaseModel, Field

import asynctrain as at

log = logging.getLogger(__name__)


class NotNow(Exception):  # noqa: N818 - an answer, and no failure of the service
    """What is asked for does not fit the moment: no run, a run already, no images."""


class Order(BaseModel):
    """How to train. image_size: pixels, height and width; learning_rate: the highest one."""

    epochs: int = Field(20, ge=1, le=10_000)
    image_size: int = Field(32, ge=8, le=256)
    batch_size: int = Field(32, ge=1, le=1024)
    learning_rate: float = Field(3e-3, gt=0, le=1)


class Service:
    """Images in ``home/images`` and runs in ``home/runs``; ``async with`` keeps it alive.

    The file ``home/current.json`` names the run that is to go on when the service is started again. Training computes
    on ``threads`` threads, None being one for each CPU, with ``kernels``, numpy's or numba's.
    """

    def __init__(self, home: Path, threads: int | None = None, kernels: str = "numpy") -> None:
        self._home = home
        self.runs = home / "runs"
        self._current = home / "current.json"
        self._threads, self._kernels = threads, kernels
        self._tasks = asyncio.TaskGroup()
        self._training: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._news = asyncio.Condition()
        self.run: at.Run | None = None
        self.name = ""  # of the run's folder
        self.error = ""
        self._trained: at.Classifier | None = None  # by the last run of before

    async def __aenter__(self) -> Service:
        self.images = await asyncio.to_thread(at.data.Uploads, self._home / "images")
        self.runs.mkdir(exist_ok=True)
        for model in sorted(self.runs.glob("*/run/model.safetensors"))[-1:]:
            with contextlib.suppress(at.errors.CheckpointError):  # somebody has damaged it
                self._trained, self.name = await asyncio.to_thread(at.Classifier.load, model), model.parts[-3]
        self._executor = await at.ThreadExecutor(self._threads).__aenter__()
        await self._tasks.__aenter__()
        if self._current.exists():
            try:
                about = json.loads(self._current.read_text())
                self._begin(about["name"], Order(**about["order"]))
            except (ValueError, KeyError):
                log.exception("%s names no run to go on with", self._current)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._training is not None:
            self._training.cancel()  # it leaves a checkpoint, and goes on from there the next time
        await self._tasks.__aexit__(None, None, None)
        await self._executor.aclose()

    # The run

    async def start(self, order: Order) -> str:
        """Start to train on the images that are there, and return the run's name once it has begun."""
        async with self._starting:
            if self._training is not None and not self._training.done():
                raise NotNow("a run is under way; stop it first")
            counts = await asyncio.to_thread(self.images.counts)
            if sum(count >= 2 for count in counts.values()) < 2:
                there = ", ".join(f"{count} of {label}" for label, count in counts.items()) or "none"
                raise NotNow(f"upload at least two images of at least two classes first; there are {there}")
            name = await asyncio.to_thread(self._prepare, order)
            self._begin(name, order)
            async with self._news:
                await self._news.wait_for(lambda: self.run is not None or self.error)
        self.current()
        return name

    def _prepare(self, order: Order) -> str:
        """List the images of now: what is uploaded later is for the next run, and a resumed one sees the same."""
        numbers = [int(folder.name) for folder in self.runs.iterdir() if folder.name.isdecimal()]
        name = f"{max(numbers, default=-1) + 1:04}"
        (self.runs / name).mkdir()
        with (self.runs / name / "images.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "label"])
            for label in (label for label, count in self.images.counts().items() if count >= 2):
                paths = sorted((self.images.folder / label).glob("[!.]*"))
                rows.writerows([path.resolve(), label] for path in paths)
        partial = self._current.with_suffix(".part")
        partial.write_text(json.dumps({"name": name, "order": order.model_dump()}))
        partial.replace(self._current)
        return name

    def _begin(self, name: str, order: Order) -> None:
        self.name, self.run, self.error = name, None, ""
        self._training = self._tasks.create_task(self._train(self.runs / name, order), name=f"train-{name}")

    async def _train(self, folder: Path, order: Order) -> None:
        try:
            await self._run(folder, order)
            self._current.unlink(missing_ok=True)  # not after a shutdown or a failure: then it is tried again
        except Exception as error:  # whatever it is, the service goes on, and says so
            log.exception("the run %s failed", folder.name)
            self.error = str(error) or repr(error)
            await self._tell()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def _run(self, folder: Path, order: Order) -> None:
        data = await asyncio.to_thread(at.data.ImageManifest, folder / "images.csv")
        train, held_out = data.split(0.8, seed=0)
        size = (order.image_size, order.image_size)
        model = at.models.small_cnn(num_classes=len(data.classes), image_shape=(*size, 3))
        loader = at.Loader(
            train,
            batch_size=order.batch_size,
            image_size=size,
            augment=at.augment.standard(),
            errors="skip",
            max_skipped=0.5,  # of a few uploads one that is broken is many
            seed=0,
        )
        rate = at.optim.cosine(order.learning_rate, steps=order.epochs * loader.batches_per_epoch)
        optimizer = at.optim.adamw(rate)
        trainer = at.Trainer(model, optimizer=optimizer, executor=self._executor, kernels=self._kernels)
        async with trainer.start(
            loader, epochs=order.epochs, validate=held_out, run_dir=folder / "run", resume=True
        ) as run:
            self.run = run
            await self._tell()
            await asyncio.wait([run.task])  # however it ends: stopped and cancelled runs are no failures
            run.raise_error()

    def current(self) -> at.Run:
        """Return the run of now, or the last one."""
        if self.run is None:
            raise NotNow(self.error or "no run was started yet")
        return self.run

    def classifier(self) -> at.Classifier:
        """Return one with the weights of this moment; before the first run of this process, of the last one's end."""
        if self.run is None and self._trained is not None:
            return self._trained
        return self.current().snapshot()

    async def stop(self) -> at.History:
        """End the run of now after its step, and return what it has come to."""
        run = self.current()
        try:
            return await run.stop()
        except Exception as error:  # the run's
            raise NotNow(f"the run has failed: {error}") from error

    async def follow(self, name: str, number: int) -> AsyncIterator[tuple[str, at.events.Event]]:
        """Yield the events of this run and later ones, with the run's name; of the run ``name`` from ``number`` on."""
        followed: at.Run | None = None
        while True:
            async with self._news:
                while self.run is None or self.run is followed:
                    await self._news.wait()
                followed, name_of_it = self.run, self.name
            with contextlib.suppress(at.errors.AsyncTrainError):  # the run's own; its RunEnd has told it
                async for event in followed.events(number if name_of_it == name else 0):
                    yield name_of_it, event
