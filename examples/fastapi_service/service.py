"""What the service does, whatever asks it to: it keeps uploaded images, and one training at a time in its loop."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import logging
import shutil
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from typing import IO

from pydantic import BaseModel, Field

import asynctrain as at

log = logging.getLogger(__name__)
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class NotNow(Exception):  # noqa: N818 - an answer, and no failure of the service
    """What is asked for does not fit the moment: no run, a run already, no images."""


class Order(BaseModel):
    """How to train. image_size: pixels, height and width; learning_rate: the highest one."""

    epochs: int = Field(20, ge=1, le=10_000)
    image_size: int = Field(32, ge=8, le=256)
    batch_size: int = Field(32, ge=1, le=1024)
    learning_rate: float = Field(3e-3, gt=0, le=1)


class Service:
    """Images in ``home/images``, a folder per class, and runs in ``home/runs``; ``async with`` keeps it alive.

    The file ``home/current.json`` names the run that is to go on when the service is started again. Training computes
    on ``threads`` threads, None being one for each CPU, with ``kernels``, numpy's or numba's.
    """

    def __init__(self, home: Path, threads: int | None = None, kernels: str = "numpy") -> None:
        self.images = home / "images"
        self.runs = home / "runs"
        self._current = home / "current.json"
        self._threads, self._kernels = threads, kernels
        self._tasks = asyncio.TaskGroup()
        self._training: asyncio.Task[None] | None = None
        self._news = asyncio.Condition()
        self.run: at.Run | None = None
        self.name = ""  # of the run's folder
        self.error = ""

    async def __aenter__(self) -> Service:
        self.images.mkdir(parents=True, exist_ok=True)
        self.runs.mkdir(exist_ok=True)
        self._executor = await at.ThreadExecutor(self._threads).__aenter__()
        await self._tasks.__aenter__()
        if self._current.exists():
            about = json.loads(self._current.read_text())
            self._begin(about["name"], Order(**about["order"]))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._training is not None:
            self._training.cancel()  # it leaves a checkpoint, and goes on from there the next time
        await self._tasks.__aexit__(None, None, None)
        await self._executor.aclose()

    # Images

    def keep(self, file: IO[bytes], name: str, label: str) -> int:
        """Store an image, or those of a zip with a folder per class; return how many. Blocks."""
        if PurePosixPath(name).suffix.lower() == ".zip":
            return self._keep_zip(file)
        self._store(file, label, name)
        return 1

    def _keep_zip(self, file: IO[bytes]) -> int:
        with zipfile.ZipFile(file) as archive:
            paths = [(info, PurePosixPath(info.filename)) for info in archive.infolist()]
            images = [(info, path) for info, path in paths if path.suffix.lower() in SUFFIXES and len(path.parts) > 1]
            for info, path in images:
                with archive.open(info) as image:
                    self._store(image, path.parts[-2], path.name)
        return len(images)

    def _store(self, file: IO[bytes], label: str, name: str) -> None:
        """Copy a file to where it belongs; it is there whole or not at all. Names may not lead out of the folder."""
        label, name = PurePosixPath(label).name, PurePosixPath(name).name
        if not label or label.startswith(".") or PurePosixPath(name).suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"an image needs a label and one of the suffixes {', '.join(sorted(SUFFIXES))}; got {name!r}"
            )
        (self.images / label).mkdir(exist_ok=True)
        partial = self.images / label / f".{name}.part"
        with partial.open("wb") as target:
            shutil.copyfileobj(file, target)
        partial.replace(self.images / label / name)

    def counts(self) -> dict[str, int]:
        """Return how many images each class has. Blocks."""
        folders = sorted(path for path in self.images.iterdir() if path.is_dir())
        return {folder.name: sum(path.suffix != ".part" for path in folder.iterdir()) for folder in folders}

    # The run

    async def start(self, order: Order) -> str:
        """Start to train on the images that are there, and return the run's name."""
        if self._training is not None and not self._training.done():
            raise NotNow("a run is under way; stop it first")
        counts = await asyncio.to_thread(self.counts)
        if len(counts) < 2 or min(counts.values()) < 2:
            there = ", ".join(f"{count} of {label}" for label, count in counts.items()) or "none"
            raise NotNow(f"upload at least two images of at least two classes first; there are {there}")
        name = f"{sum(1 for _ in self.runs.iterdir()):04}"
        await asyncio.to_thread(self._prepare, name, order)
        self._begin(name, order)
        return name

    def _prepare(self, name: str, order: Order) -> None:
        """List the images of now: what is uploaded later is for the next run, and a resumed one sees the same."""
        folder = self.runs / name
        folder.mkdir()
        with (folder / "images.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["path", "label"])
            for path in sorted(self.images.glob("*/[!.]*")):
                rows.writerow([path.resolve(), path.parent.name])
        self._current.write_text(json.dumps({"name": name, "order": order.model_dump()}))

    def _begin(self, name: str, order: Order) -> None:
        self.name, self.run, self.error = name, None, ""
        self._training = self._tasks.create_task(self._train(self.runs / name, order), name=f"train-{name}")

    async def _train(self, folder: Path, order: Order) -> None:
        try:
            await self._run(folder, order)
        except (at.errors.AsyncTrainError, OSError, ValueError) as error:
            log.exception("the run %s failed", folder.name)
            self.error = str(error)
        self._current.unlink(missing_ok=True)  # not reached by a shutdown, which cancels this task

    async def _run(self, folder: Path, order: Order) -> None:
        data = await asyncio.to_thread(at.data.ImageManifest, folder / "images.csv")
        train, held_out = data.split(0.8, seed=0)
        size = (order.image_size, order.image_size)
        model = at.models.small_cnn(num_classes=len(data.classes), image_shape=(*size, 3))
        loader = at.Loader(
            train, batch_size=order.batch_size, image_size=size, augment=at.augment.standard(), errors="skip", seed=0
        )
        rate = at.optim.cosine(order.learning_rate, steps=order.epochs * loader.batches_per_epoch)
        optimizer = at.optim.adamw(rate)
        trainer = at.Trainer(model, optimizer=optimizer, executor=self._executor, kernels=self._kernels)
        run_dir = folder / "run"
        begun = run_dir if run_dir.exists() else None
        async with trainer.start(loader, epochs=order.epochs, validate=held_out, run_dir=run_dir, resume=begun) as run:
            self.run = run
            async with self._news:
                self._news.notify_all()
            await asyncio.wait([run.task])  # however it ends: stopped and cancelled runs are no failures
            run.raise_error()

    def current(self) -> at.Run:
        """Return the run of now, or the last one."""
        if self.run is None:
            raise NotNow(self.error or "no run was started yet")
        return self.run

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
