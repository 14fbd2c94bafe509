"""The same training in asynctrain and in PyTorch: one side a process, ``python -m benchmarks.trainers JOB``, JSON.

The whole process is timed from outside, so each side imports what it needs and no more. Adam at a constant rate; pixels
become ``(pixel / 255 - 0.5) / 0.25``; the test images are evaluated once, at the end. PyTorch's side is in
``benchmarks/torch_trainers.py``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import TypedDict

CACHE = 2**30  # bytes of decoded images that later epochs take from memory, where they are cached
OURS, TUTORIAL, TUNED = "asynctrain", "PyTorch, tutorial", "PyTorch, tuned"


class Tested(TypedDict):
    """accuracy: share of the test images that are recognised, 0 to 1. tested: how many there are."""

    accuracy: float
    tested: int


@dataclass(frozen=True, slots=True)
class Job:
    """What one process is to do.

    Attributes:
        side: ``OURS``, ``TUTORIAL`` or ``TUNED``.
        folder: with ``train`` and ``test``, each of class folders of images.
        model: the name of a network of ``asynctrain.models``.
        size: height and width that the images get.
        channels: 1 or 3.
        batch: samples in a step.
        epochs: how many there are.
        rate: Adam's.
        cached: whether asynctrain keeps decoded images in memory for later epochs.
        home: where asynctrain computes on two CPUs, ``threads`` or ``processes``.
        kernels: that asynctrain computes with, ``numpy`` or ``numba``.
        workers: of PyTorch's DataLoader.
        threads: PyTorch computes on; None leaves it what it is.
        seed: of order, initial parameters and dropout.
        initial: a file with the twin's architecture and initial parameters, which are asynctrain's.
        images: at most how many of each folder are used, for a look; None: all.
    """

    side: str
    folder: str
    model: str
    size: int
    channels: int
    batch: int
    epochs: int
    rate: float
    cached: bool = False
    home: str = "threads"
    kernels: str = "numpy"
    workers: int = 0
    threads: int | None = None
    seed: int = 0
    initial: str = ""
    images: int | None = None

    def to_json(self) -> str:
        """Return the job as JSON."""
        return json.dumps(asdict(self))


def train(job: Job) -> Tested:
    """Train and test as a script of asynctrain's does, on uvloop; but for the job's own settings, at the defaults."""
    import asyncio

    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_train(job))


async def _train(job: Job) -> Tested:
    import asynctrain as at

    images = _images(job, "train")
    loader = at.Loader(
        images,
        batch_size=job.batch,
        image_size=(job.size, job.size),
        channels=job.channels,
        cache=at.data.MemoryCache(CACHE) if job.cached else None,
        seed=job.seed,
    )
    model = at.models.get(job.model)(num_classes=len(images.classes), image_shape=loader.image_shape)
    home = at.ProcessExecutor(2) if job.home == "processes" else at.ThreadExecutor(2)
    optimizer = at.optim.adam(job.rate)
    async with home as executor:
        trainer = at.Trainer(model, optimizer=optimizer, executor=executor, kernels=job.kernels, seed=job.seed)
        await trainer.fit(loader, epochs=job.epochs)
        found = await trainer.evaluate(loader.evaluating(_images(job, "test")))
    return {"accuracy": found.accuracy, "tested": found.samples}


def _images(job: Job, part: str) -> at.data.Dataset:  # type: ignore[name-defined]  # noqa: F821
    import asynctrain as at

    folder = at.ImageFolder(f"{job.folder}/{part}")
    return folder if job.images is None else at.data.Subset(folder, spread_over(len(folder), job.images))


def spread_over(samples: int, wanted: int) -> list[int]:
    """Return at most ``wanted`` of the numbers below ``samples``, at even distances."""
    wanted = min(wanted, samples)
    return [number * samples // wanted for number in range(wanted)]


def main() -> None:
    """Do one job."""
    job = Job(**json.loads(sys.argv[1]))
    if job.side == OURS:
        print(json.dumps(train(job)))
        return
    from benchmarks import torch_trainers

    print(json.dumps(torch_trainers.train(job)))


if __name__ == "__main__":
    main()
