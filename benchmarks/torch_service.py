"""The peer of ``make bench-service``: the endpoints of ``examples/fastapi_service`` around a PyTorch loop in a thread.

uvicorn --factory benchmarks.torch_service:create_app --loop uvloop --timeout-graceful-shutdown 2

It is written as one would who has PyTorch and wants a good service: the loop runs in ``asyncio.to_thread``, asks a stop
flag before each batch, saves after each epoch and whenever it ends, and goes on in mid-epoch after a shutdown. Images
are decoded to size, and augmented as torchvision does it with Pillow; network and images are channels last. Events are
kept in memory, so what was told before a restart is not told again.

``STUDIO_HOME`` names the folder, ``STUDIO_NETWORK`` a file with the architecture as asynctrain writes it, and
``STUDIO_THREADS`` the number of threads, by default PyTorch's own choice.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import json
import math
import os
import random
import shutil
import threading
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Annotated, Any

import numpy as np
import torch
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request, UploadFile
from fastapi.responses import Response, StreamingResponse
from PIL import Image, ImageEnhance
from pydantic import BaseModel, Field
from torch import nn

from benchmarks import networks

Sample = tuple[Path, int]
JITTER = 0.2  # share by which brightness, contrast and saturation are changed at most


class Order(BaseModel):
    """How to train; the fields of the example."""

    epochs: int = Field(20, ge=1, le=10_000)
    image_size: int = Field(32, ge=8, le=256)
    batch_size: int = Field(32, ge=1, le=1024)
    learning_rate: float = Field(3e-3, gt=0, le=1)


# Images


class Images:
    """The samples of a training, each decoded when it is asked for."""

    def __init__(self, samples: list[Sample], size: int, augmented: bool) -> None:
        self._samples = samples
        self._size = size
        self._augmented = augmented

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, label = self._samples[index]
        with Image.open(path) as file:
            return tensor_of(file, self._size, self._augmented), label


def tensor_of(file: Image.Image, size: int, augmented: bool = False) -> torch.Tensor:
    """Return an opened image as (3, size, size)."""
    file.draft("RGB", (size, size))  # a JPEG is decoded at half the size or less, where that is enough
    image = file.convert("RGB")
    if augmented:
        image = _jittered(_cropped(image, size))
    elif image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.contiguous().float().div_(255).sub_(0.5).div_(0.25)


def _cropped(image: Image.Image, size: int) -> Image.Image:
    """Return 50 to 100 % of the area at the full size, mirrored every other time."""
    width, height = image.size
    across, down = width, height
    for _ in range(10):
        area, ratio = width * height * random.uniform(0.5, 1), math.exp(random.uniform(-1, 1) * math.log(4 / 3))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if across <= width and down <= height:
            break
    else:
        across, down = width, height
    left, top = random.randint(0, width - across), random.randint(0, height - down)
    image = image.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + across, top + down))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def _jittered(image: Image.Image) -> Image.Image:
    changes = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for change in random.sample(changes, len(changes)):
        image = change(image).enhance(random.uniform(1 - JITTER, 1 + JITTER))
    return image


# Training


class Training:
    """One run. ``train`` is for a thread of its own; all else may be asked meanwhile from others.

    Args:
        folder: has the list of images, and gets the checkpoint.
        order: how to train.
        tell: is called with each event, in the training's thread.
    """

    def __init__(self, folder: Path, order: Order, tell: Callable[[dict[str, Any]], None]) -> None:
        self._order = order
        self._tell = tell
        self._checkpoint = folder / "checkpoint.pt"
        about = json.loads((folder / "images.json").read_text())
        self.classes: list[str] = about["classes"]
        samples = [(Path(path), label) for path, label in about["samples"]]
        random.Random(0).shuffle(samples)
        held_out = len(samples) // 5
        self._train = Images(samples[held_out:], order.image_size, augmented=True)
        self._test = Images(samples[:held_out], order.image_size, augmented=False)
        self._stop = threading.Event()
        self._go_on = threading.Event()
        self._go_on.set()
        self._waits = threading.Event()  # paused, or over
        self._updating = threading.Lock()
        self.epoch = self.step = self._position = self._first_step = 0
        self.loss, self.metrics = math.nan, dict[str, float]()
        self._started = time.perf_counter()
        self._model = networks.twin(json.loads(Path(os.environ["STUDIO_NETWORK"]).read_text()))
        self._model.to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=order.learning_rate)
        steps = self.steps_in_all()
        self._rate = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)
        if self._checkpoint.exists():
            self._restore()

    def steps_in_all(self) -> int:
        """Return how many there are to be."""
        return self._order.epochs * math.ceil(len(self._train) / self._order.batch_size)

    # In the thread

    def train(self) -> None:
        """Train until it is done or told to stop, and leave a checkpoint either way. Blocks."""
        try:
            self._tell({"event": "Resumed" if self.step else "RunStart", "step": self.step})
            self._started, self._first_step = time.perf_counter(), self.step
            while self.epoch < self._order.epochs and not self._stop.is_set():
                self._train_epoch()
            self._save()
        finally:
            self._waits.set()
            self._tell({"event": "RunEnd", "step": self.step})

    def _train_epoch(self) -> None:
        order = torch.randperm(len(self._train), generator=torch.Generator().manual_seed(self.epoch))
        for images, labels in self._batches(self._train, order[self._position :].tolist()):
            self._wait_where_paused()
            if self._stop.is_set():
                return
            self._learn(images, labels)
        self._evaluate()
        if not self._stop.is_set():
            self.epoch, self._position = self.epoch + 1, 0
            self._tell({"event": "EpochEnd", "epoch": self.epoch, "step": self.step, **self.metrics})
            self._save()

    def _batches(self, images: Images, order: list[int] | None = None) -> Any:
        return torch.utils.data.DataLoader(images, batch_size=self._order.batch_size, sampler=order)

    def _learn(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        logits = self._model(images.to(memory_format=torch.channels_last))
        loss = nn.functional.cross_entropy(logits, labels)
        self._optimizer.zero_grad()
        loss.backward()
        with self._updating:
            self._optimizer.step()
            self._rate.step()
            self.step += 1
            self._position += len(labels)
        self.loss = loss.item()
        self._tell({"event": "StepEnd", "epoch": self.epoch + 1, "step": self.step, "loss": self.loss})

    def _evaluate(self) -> None:
        right = 0
        self._model.eval()
        with torch.inference_mode():
            for images, labels in self._batches(self._test):
                self._wait_where_paused()
                if self._stop.is_set():
                    break
                logits = self._model(images.to(memory_format=torch.channels_last))
                right += int((logits.argmax(1) == labels).sum())
        self._model.train()
        self.metrics = {"validation.accuracy": right / len(self._test)}

    def _wait_where_paused(self) -> None:
        if not self._go_on.is_set():
            self._waits.set()
            self._tell({"event": "Paused", "step": self.step})
            self._go_on.wait()
            self._waits.clear()

    def _save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rate": self._rate.state_dict(),
            "place": [self.epoch, self._position, self.step],
        }
        partial = self._checkpoint.with_suffix(".part")
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def _restore(self) -> None:
        state = torch.load(self._checkpoint, weights_only=True)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rate.load_state_dict(state["rate"])
        self.epoch, self._position, self.step = state["place"]

    # From elsewhere

    def pause(self) -> None:
        """Let it wait before its next batch, and return when it does. Blocks."""
        self._go_on.clear()
        self._waits.wait()

    def resume(self) -> None:
        """Let it go on."""
        self._go_on.set()

    def stop(self) -> None:
        """Let it end before its next batch."""
        self._stop.set()
        self._go_on.set()

    def progress(self) -> dict[str, Any]:
        """Return how far it is."""
        rate = (self.step - self._first_step) * self._order.batch_size / (time.perf_counter() - self._started)
        left = (self.steps_in_all() - self.step) * self._order.batch_size
        return {
            "epoch": self.epoch + 1,
            "step": self.step,
            "steps": self.steps_in_all(),
            "loss": self.loss if math.isfinite(self.loss) else None,
            "metrics": self.metrics,
            "samples_per_second": rate,
            "eta": left / rate if rate else None,
            "paused": not self._go_on.is_set() and self._waits.is_set(),
        }

    def snapshot(self) -> nn.Module:
        """Return a copy of the network as it is after a step. Blocks."""
        with self._updating:
            return copy.deepcopy(self._model).eval()

    def predict(self, content: bytes) -> dict[str, Any]:
        """Return what is on an image. Blocks."""
        with Image.open(io.BytesIO(content)) as file:
            x = tensor_of(file, self._order.image_size)[None]
        with torch.inference_mode():
            shares = self.snapshot()(x.to(memory_format=torch.channels_last)).softmax(1)[0].tolist()
        top = sorted(zip(self.classes, shares, strict=False), key=lambda one: -one[1])
        return {"label": top[0][0], "top": top[:5]}


# The service


class Service:
    """Images in ``home/images``, a folder per class, runs in ``home/runs``, and one training at a time in a thread."""

    def __init__(self, home: Path) -> None:
        self.images = home / "images"
        self.runs = home / "runs"
        self._current = home / "current.json"
        self._task: asyncio.Task[None] | None = None
        self._ends = False
        self._events: list[tuple[str, str]] = []  # of this process: id and JSON
        self._news = asyncio.Event()
        self.training: Training | None = None
        self.name, self.error = "", ""

    async def __aenter__(self) -> Service:
        self.images.mkdir(parents=True, exist_ok=True)
        self.runs.mkdir(exist_ok=True)
        if self._current.exists():
            about = json.loads(self._current.read_text())
            self._begin(about["name"], Order(**about["order"]))
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._ends = True
        await self.stop()

    def keep(self, file: IO[bytes], name: str, label: str) -> None:
        """Store an image, or those of a zip with a folder per class. Blocks."""
        if not name.lower().endswith(".zip"):
            self._store(file, label, name)
            return
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                path = PurePosixPath(info.filename)
                if len(path.parts) > 1 and not info.is_dir():
                    with archive.open(info) as image:
                        self._store(image, path.parts[-2], path.name)

    def _store(self, file: IO[bytes], label: str, name: str) -> None:
        label, name = PurePosixPath(label).name, PurePosixPath(name).name
        if not label or not name:
            raise ValueError("an image needs a label and a name")
        (self.images / label).mkdir(exist_ok=True)
        with (self.images / label / name).open("wb") as target:
            shutil.copyfileobj(file, target)

    def counts(self) -> dict[str, int]:
        """Return how many images each class has. Blocks."""
        return {folder.name: sum(1 for _ in folder.iterdir()) for folder in sorted(self.images.iterdir())}

    async def start(self, order: Order) -> str:
        """Start to train on the images that are there, and return the run's name."""
        if self._task is not None and not self._task.done():
            raise HTTPException(409, "a run is under way; stop it first")
        name = f"{sum(1 for _ in self.runs.iterdir()):04}"
        await asyncio.to_thread(self._prepare, name, order)
        self._begin(name, order)
        return name

    def _prepare(self, name: str, order: Order) -> None:
        (self.runs / name).mkdir()
        classes = sorted(folder.name for folder in self.images.iterdir())
        samples = [(str(path), classes.index(path.parent.name)) for path in sorted(self.images.glob("*/*"))]
        (self.runs / name / "images.json").write_text(json.dumps({"classes": classes, "samples": samples}))
        self._current.write_text(json.dumps({"name": name, "order": order.model_dump()}))

    def _begin(self, name: str, order: Order) -> None:
        self.name, self.training, self.error = name, None, ""
        self._task = asyncio.create_task(self._run(name, order))

    async def _run(self, name: str, order: Order) -> None:
        loop = asyncio.get_running_loop()
        try:

            def tell(event: dict[str, Any]) -> None:
                loop.call_soon_threadsafe(self._publish, name, event)

            training = self.training = await asyncio.to_thread(Training, self.runs / name, order, tell)
            if not self._ends:
                await asyncio.to_thread(training.train)
        except (OSError, RuntimeError, ValueError) as error:
            self.error = str(error)
        if not self._ends:
            self._current.unlink(missing_ok=True)

    async def stop(self) -> None:
        """Let the training end, and wait until it has."""
        if self.training is not None:
            self.training.stop()
        if self._task is not None:
            await asyncio.wait([self._task])

    def current(self) -> Training:
        """Return the training of now, or the last one."""
        if self.training is None:
            raise HTTPException(409, self.error or "no run was started yet")
        return self.training

    def _publish(self, name: str, event: dict[str, Any]) -> None:
        self._events.append((f"{name}-{len(self._events)}", json.dumps(event | {"run": name})))
        self._news.set()
        self._news = asyncio.Event()  # of the next one

    async def follow(self, last: str) -> AsyncIterator[str]:
        """Yield the messages after the one with the id ``last``, or all."""
        number = next((place + 1 for place, (name, _) in enumerate(self._events) if name == last), 0)
        while True:
            news = self._news
            while number < len(self._events):
                name, told = self._events[number]
                number += 1
                yield f"id: {name}\ndata: {told}\n\n"
            await news.wait()


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Ours = Annotated[Service, Depends(_service)]
routes = APIRouter()


@routes.post("/images")
async def upload(service: Ours, files: list[UploadFile], label: str = "") -> dict[str, int]:
    for file in files:
        await asyncio.to_thread(service.keep, file.file, file.filename or "", label)
    return await asyncio.to_thread(service.counts)


@routes.get("/images")
async def images(service: Ours) -> dict[str, int]:
    return await asyncio.to_thread(service.counts)


@routes.post("/run", status_code=201)
async def start(service: Ours, order: Order) -> dict[str, str]:
    return {"run": await service.start(order)}


@routes.get("/run")
async def progress(service: Ours) -> dict[str, Any]:
    return {"run": service.name, "error": service.error, **service.current().progress()}


@routes.get("/run/events")
async def events(service: Ours, last_event_id: Annotated[str, Header()] = "") -> StreamingResponse:
    return StreamingResponse(
        service.follow(last_event_id), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


@routes.post("/run/pause")
async def pause(service: Ours) -> dict[str, int]:
    await asyncio.to_thread(service.current().pause)
    return {"step": service.current().step}


@routes.post("/run/resume")
async def resume(service: Ours) -> dict[str, int]:
    service.current().resume()
    return {"step": service.current().step}


@routes.post("/run/stop")
@routes.post("/run/cancel")
async def stop(service: Ours) -> dict[str, int]:
    service.current()
    await service.stop()
    return {"step": service.current().step}


@routes.post("/predict")
async def predict(service: Ours, request: Request) -> dict[str, Any]:
    return await asyncio.to_thread(service.current().predict, await request.body())


@routes.get("/model")
async def model(service: Ours) -> Response:
    file = io.BytesIO()
    await asyncio.to_thread(lambda: torch.save(service.current().snapshot().state_dict(), file))
    return Response(file.getvalue(), media_type="application/octet-stream")


def create_app() -> FastAPI:
    """Return the application."""
    if "STUDIO_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["STUDIO_THREADS"]))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with Service(Path(os.environ["STUDIO_HOME"])) as app.state.service:
            gc.freeze()  # as the example does
            yield

    app = FastAPI(title="The same studio on PyTorch", lifespan=lifespan)
    app.include_router(routes)
    return app
