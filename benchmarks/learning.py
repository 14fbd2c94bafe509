"""What networks learn, beside the same ones in PyTorch: ``make bench-learning``.

LeNet learns handwritten digits (MNIST), a residual network five kinds of flowers from 750 photos, each run in a process
of its own. PyTorch's runs get the same batches from asynctrain's Loader, the same augmentation included, and begin with
the same parameters; the optimizer and its schedule are the same too. What differs is whose kernels compute, and that
PyTorch normalises by batch, asynctrain by microbatch. Accuracies are those after the last epoch, never the best one.

The images are those of the folder that ``ASYNCTRAIN_DATA`` names, unpacked once into the user's cache folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import asynctrain as at
from asynctrain.data.cache import MemoryCache
from benchmarks.harness import PEERS_PYTHON, RESULTS, Row, child, interleave, report, table
from benchmarks.loading import UNPACKED, made, unpack

BATCH = 64
CACHE = 2**30  # bytes of decoded images that later epochs take from memory
OURS, PEER = "asynctrain", "PyTorch"

Curve = list[dict[str, float]]  # of each epoch: loss and accuracy in training and over the test images, and seconds


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be learnt, and how.

    Attributes:
        title: in the table.
        pack: the file in ``ASYNCTRAIN_DATA``.
        folder: what is in it, with ``train`` and ``test``.
        model: returns the network for a number of classes.
        size: height and width that the images get.
        channels: 1 or 3.
        augment: done to the training images.
        epochs: how many there are.
        peak: the learning rate after two epochs of warm-up; then half a cosine leads down to 0.
        weight_decay: of AdamW.
        wanted: the mean test accuracy that is to be reached, in percent.
        below: how far it may be below PyTorch's, in points; None where that is not asked.
        seeds: one run each.
    """

    title: str
    pack: str
    folder: str
    model: Callable[[int], at.Model]
    size: int
    channels: int
    augment: at.augment.Compose
    epochs: int
    peak: float
    weight_decay: float
    wanted: float
    below: float | None
    seeds: tuple[int, ...]

    def folders(self) -> tuple[Path, Path]:
        """Return the training and the test images' folders."""
        folder = made(UNPACKED / self.folder, partial(unpack, Path(os.environ["ASYNCTRAIN_DATA"]) / self.pack))
        return folder / "train", folder / "test"


TASKS = {
    "digits": Task(
        "MNIST, lenet",
        pack="mnist.tar.xz",
        folder="mnist",
        model=lambda classes: at.models.lenet(num_classes=classes, image_shape=(28, 28, 1)),
        size=28,
        channels=1,
        augment=at.augment.compose(at.augment.affine(degrees=10, translate=0.07, scale=(0.9, 1.1))),
        epochs=10,
        peak=3e-3,
        weight_decay=1e-2,
        wanted=99.2,
        below=None,
        seeds=(0,),
    ),
    "flowers": Task(
        "flower photos at 64x64, resnet(8)",
        pack="flower_photos.tar",
        folder="flower_photos_sub",
        model=lambda classes: at.models.resnet(depth=8, num_classes=classes, image_shape=(64, 64, 3)),
        size=64,
        channels=3,
        augment=at.augment.standard(),
        epochs=30,
        peak=5e-3,
        weight_decay=5e-2,
        wanted=68.0,
        below=3.0,
        seeds=(0, 1, 2),
    ),
}


@dataclass(frozen=True, slots=True)
class Job:
    """One run: a key of ``TASKS``, ``OURS`` or ``PEER``, its seed, its epochs, and how many images it may see."""

    task: str
    side: str
    seed: int
    epochs: int
    images: int | None = None

    def learn(self) -> Curve:
        """Return what each epoch brought."""
        curve: Curve = asyncio.run(_asynctrain(self) if self.side == OURS else _torch(self))
        return curve

    @property
    def label(self) -> str:
        """The name under which it is run."""
        return f"{TASKS[self.task].title}, {self.side}, seed {self.seed}"


# The runs


def loaders(job: Job) -> tuple[at.Loader, at.Loader]:
    """Return the training batches and the test batches."""
    task = TASKS[job.task]
    train, test = (_some(at.ImageFolder(folder), job.images) for folder in task.folders())
    loader = at.Loader(
        train,
        batch_size=BATCH,
        image_size=(task.size, task.size),
        channels=task.channels,
        augment=task.augment,
        cache=MemoryCache(CACHE),
        seed=job.seed,
    )
    return loader, loader.evaluating(test)


def _some(data: at.data.Dataset, images: int | None) -> at.data.Dataset:
    """Return at most ``images`` of the data, spread over it."""
    if images is None or images >= len(data):
        return data
    return at.data.Subset(data, np.linspace(0, len(data) - 1, images).astype(np.int64))


def schedule(job: Job, loader: at.Loader) -> Callable[[int], float]:
    """Return the learning rate as a function of the step."""
    per_epoch = loader.batches_per_epoch
    warmup = min(2, job.epochs - 1) * per_epoch
    return at.optim.cosine(TASKS[job.task].peak, steps=job.epochs * per_epoch, warmup=warmup)


def trainer_of(job: Job, loader: at.Loader, executor: at.Executor) -> at.Trainer:
    """Return the Trainer of a run; PyTorch's begins with its initial state."""
    task = TASKS[job.task]
    optimizer = at.optim.adamw(schedule(job, loader), weight_decay=task.weight_decay)
    return at.Trainer(task.model(len(loader.classes)), optimizer=optimizer, executor=executor, seed=job.seed)


async def _asynctrain(job: Job) -> Curve:
    train, test = loaders(job)
    async with at.ThreadExecutor() as executor:
        history = await trainer_of(job, train, executor).fit(train, epochs=job.epochs, validate=test)
    return [
        _epoch(end.loss, end.accuracy, end.validation.loss, end.validation.accuracy, end.seconds)
        for end in history.epochs
        if end.validation
    ]


async def _torch(job: Job) -> Curve:
    """Be PyTorch's usual loop over asynctrain's batches, on all CPUs, channels last."""
    import torch

    from benchmarks import networks

    train, test = loaders(job)
    rate = schedule(job, train)
    state = trainer_of(job, train, at.InlineExecutor()).initial_state()
    model = networks.load(networks.twin(state.program.architecture), state.params, state.model_state)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(_groups(model, TASKS[job.task].weight_decay))
    norm = state.program.normalization

    def sums(batch: at.Batch) -> tuple[Any, float, float]:
        x = torch.from_numpy(batch.images).permute(0, 3, 1, 2).float()
        y = torch.from_numpy(batch.labels)
        outputs = model((x / 255 - norm.mean) / norm.std)
        loss = torch.nn.functional.cross_entropy(outputs, y)
        return loss, loss.item() * len(y), float((outputs.argmax(1) == y).sum())

    curve, step = [], 0
    for epoch in range(job.epochs):
        start, seen = time.perf_counter(), np.zeros(3)
        model.train()
        async with train.open(at.Cursor(epoch=epoch), epochs=epoch + 1) as batches:
            async for batch in batches:
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
                optimizer.zero_grad()
                loss, *counted = sums(batch)
                loss.backward()
                optimizer.step()
                seen += (*counted, batch.samples)
                step += 1
        model.eval()
        tested = np.zeros(3)
        with torch.no_grad():
            async with test.open() as batches:
                async for batch in batches:
                    tested += (*sums(batch)[1:], batch.samples)
        (loss_mean, accuracy), (test_loss, test_accuracy) = seen[:2] / seen[2], tested[:2] / tested[2]
        curve.append(_epoch(loss_mean, accuracy, test_loss, test_accuracy, time.perf_counter() - start))
    return curve


def _groups(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters, of which those with one axis do not decay, as with asynctrain."""
    decaying = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _epoch(loss: float, accuracy: float, test_loss: float, test_accuracy: float, seconds: float) -> dict[str, float]:
    told = {"loss": loss, "accuracy": accuracy, "test_loss": test_loss, "test_accuracy": test_accuracy}
    return {name: round(float(value), 5) for name, value in told.items()} | {"seconds": round(seconds, 2)}


# The figures


def run(job: Job) -> Curve:
    """Do a run in a process of its own, in its side's environment (the peers' finds asynctrain in this folder)."""
    python = sys.executable if job.side == OURS else PEERS_PYTHON
    curve: Curve = child("benchmarks.learning", "--job", json.dumps(asdict(job)), python=python)
    return curve


def rows_of(name: str, curves: Mapping[str, Mapping[str, Sequence[Curve]]]) -> Iterator[Row]:
    """Yield whether asynctrain's mean is as high as wanted, and how it compares with PyTorch's.

    The spread is the distance between the best and the worst seed as a share of the mean.
    """
    task, sides = TASKS[name], curves[name]
    final = {side: [curve[-1]["test_accuracy"] * 100 for curve in of_side] for side, of_side in sides.items()}
    ours = statistics.mean(final[OURS])
    spread = (max(final[OURS]) - min(final[OURS])) / ours
    epochs, runs = len(sides[OURS][0]), len(sides[OURS])
    case, metric = (
        f"{task.title}, {epochs} epochs, {f'mean of {runs} seeds' if runs > 1 else '1 seed'}",
        "test accuracy, %",
    )
    yield Row(case, metric, ours, None, "", None, spread, f"at least {task.wanted:g} %", ours >= task.wanted)
    told = "" if task.below is None else f"at most {task.below:g} points below"
    if PEER not in final:
        yield Row(case, metric, ours, None, PEER, None, spread, told, None)
        return
    theirs = statistics.mean(final[PEER])
    met = None if task.below is None else ours >= theirs - task.below
    yield Row(case, metric, ours, theirs, PEER, ours / theirs, spread, told, met)


def plot() -> None:
    """Draw ``benchmarks/results/learning.png`` from the JSON: the test accuracy of each run by epoch."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return
    curves = json.loads((RESULTS / "learning.json").read_text())["curves"]
    figure = Figure(figsize=(5.5 * len(curves), 4), layout="constrained")
    for axes, (name, sides) in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves.items(), strict=True):
        task = TASKS[name]
        for color, (side, of_side) in zip(("tab:blue", "tab:orange"), sides.items(), strict=False):
            for number, curve in enumerate(of_side):
                accuracies = [epoch["test_accuracy"] * 100 for epoch in curve]
                epochs = range(1, len(curve) + 1)
                axes.plot(epochs, accuracies, color=color, alpha=0.8, label=side if number == 0 else None)
        axes.axhline(task.wanted, color="black", linewidth=0.5, linestyle="--", label="wanted of asynctrain")
        if name == "digits":
            axes.set_ylim(97, 100)  # all of it happens there
        axes.set(title=task.title, xlabel="epoch", ylabel="test accuracy, %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize="small")
    figure.savefig(RESULTS / "learning.png", dpi=120)


def jobs_of(names: Sequence[str], sides: Sequence[str], quick: bool) -> list[Job]:
    """Return the runs: each task, side and seed; only a look at each where it is to be quick."""
    jobs = [Job(name, side, seed, TASKS[name].epochs) for name in names for side in sides for seed in TASKS[name].seeds]
    return [replace(job, epochs=2, images=512) for job in jobs if job.seed == 0] if quick else jobs


def main() -> None:
    """Do all runs, or those of the tasks whose title has ``--only`` in it, or one where ``--job`` says which."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two epochs of 512 images, for a look; writes no results")
    parser.add_argument("--only", default="", help="the tasks whose title has this in it; writes no results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(Job(**json.loads(arguments.job)).learn()))
        return
    if "ASYNCTRAIN_DATA" not in os.environ:
        sys.exit("bench-learning needs the images of ASYNCTRAIN_DATA, and that is not set")
    names = [name for name, task in TASKS.items() if arguments.only in task.title]
    for name in names:
        TASKS[name].folders()  # unpacked before a clock runs
    sides = [OURS, PEER] if PEERS_PYTHON.exists() else [OURS]
    jobs = jobs_of(names, sides, arguments.quick)
    runs = interleave({job.label: partial(run, job) for job in jobs}, rounds=1)
    curves = {
        name: {side: [runs[job.label][0] for job in jobs if (job.task, job.side) == (name, side)] for side in sides}
        for name in names
    }
    rows = [row for name in names for row in rows_of(name, curves)]
    if arguments.only or arguments.quick:
        print(table(rows))
        return
    notes = ["PyTorch gets the same batches and begins with the same parameters; it normalises by batch"]
    if PEER not in sides:
        notes = ["PyTorch is left out: there is no .venv-peers (make bench-learning makes it)"]
    report("learning", rows, versions(sides), notes, curves=curves)
    plot()


def versions(sides: Sequence[str]) -> dict[str, str]:
    """Return what computed."""
    found: dict[str, str] = {}
    for side in sides:
        whose, python = ("ours", sys.executable) if side == OURS else ("peers", str(PEERS_PYTHON))
        found = child("benchmarks.steps", "--about", whose, python=python)["versions"] | found
    return found


if __name__ == "__main__":
    main()
