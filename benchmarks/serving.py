"""What twenty predictions a second cost the training they are made beside: ``make bench-serving``.

A network trains from image files on threads. In slices of some seconds, drawn at random, its ``snapshot()`` is asked
for a prediction of an image file twenty times a second, or it is left alone; a heartbeat runs in both. What is compared
is one training with itself, so a machine that is slow for a minute is slow for both. Each answer is held against what
a copy of the weights of its step says when the training is over, and some against those of a training that stopped at
that very step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import asynctrain as at
from benchmarks import loop
from benchmarks.harness import Row, child, interleave, report, spread

RATE = 20  # predictions a second
SLICE = 2.0  # seconds, about
PAIRS = 4  # slices of each kind in a round
WARM_UP = 2.0  # seconds
REPEATED = 3  # steps to which the training is done again
BATCH = 64
FOREVER = 10**6  # epochs
KEPT = 0.85  # share of the throughput that must be left
ALLOWED = 10.0  # ms later than in an idle loop on a busy machine, where small images are decoded on threads
BUSY = "idle, busy machine"
CASES = {"LeNet, 28x28 PNG files": ("lenet", 28, 1), "small_cnn, 32x32 of JPEG photos": ("small_cnn", 32, 3)}


@dataclass
class Answered:
    """A prediction: the step of its weights, a classifier with a copy of them, the image, the answer, the seconds."""

    step: int
    copy: at.Classifier
    image: Path
    answer: at.Prediction
    seconds: float


@dataclass
class Seen:
    """What slices of one kind have shown.

    Attributes:
        images: that were trained on.
        seconds: how long the slices took together.
        late: of each beat, seconds.
    """

    images: int = 0
    seconds: float = 0.0
    late: list[float] = field(default_factory=list)


def write_photos(folder: Path, count: int = 1000) -> None:
    """Write JPEG files of 128x128 pixels in ten class folders: a tint, a gradient and noise."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 90, 128)[:, None, None]
    for number in range(count):
        tint = np.array([number % 10 * 9, 40, 90 - number % 10 * 9])
        pixels = (ramp + tint + rng.integers(0, 60, (128, 128, 3))).astype(np.uint8)
        path = folder / str(number % 10) / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)


def set_up(case: str, folder: Path, executor: at.Executor) -> tuple[at.Trainer, at.Loader]:
    """Return what trains the case's network, and on what."""
    name, size, channels = CASES[case]
    loader = at.Loader(
        at.ImageFolder(folder), batch_size=BATCH, image_size=(size, size), channels=channels, drop_last=True
    )
    model = at.models.get(name)(num_classes=len(loader.classes), image_shape=(size, size, channels))
    return at.Trainer(model, optimizer=at.optim.sgd(1e-3, momentum=0.9), executor=executor), loader


async def ask(run: at.Run, loader: at.Loader, images: Sequence[Path], answered: list[Answered]) -> None:
    """Ask snapshots of the run ``RATE`` times a second, until it is cancelled; a late answer delays no question."""
    clock = asyncio.get_running_loop().time
    draw = random.Random(len(answered))

    async def one() -> None:
        image, start = draw.choice(images), clock()
        step, snapshot = run.progress.step, run.snapshot()
        arrays = dict(snapshot.params), dict(snapshot.model_state)  # which are copied, as an arena of a run's is not
        copy = at.Classifier(snapshot.program, *arrays, loader.classes, loader.settings)
        answer = await snapshot.predict(image)
        answered.append(Answered(step, copy, image, answer, clock() - start))

    async with asyncio.TaskGroup() as group:
        due = clock()
        while True:
            group.create_task(one())
            due += 1 / RATE
            await asyncio.sleep(max(0.0, due - clock()))


async def next_step(run: at.Run) -> tuple[int, float]:
    """Return the next step and the time at its end, so that a slice is of whole steps."""
    step = run.progress.step
    while run.progress.step == step:  # noqa: ASYNC110 - a listener would be a part of what is measured
        await asyncio.sleep(0.001)
    return run.progress.step, time.perf_counter()


async def slices(
    run: at.Run, loader: at.Loader, images: Sequence[Path], seed: int
) -> tuple[dict[bool, Seen], list[Answered]]:
    """Return what was seen with and without predictions, and these."""
    seen = {True: Seen(), False: Seen()}
    answered: list[Answered] = []
    order = [serving for _ in range(PAIRS) for serving in random.Random(seed).sample([True, False], 2)]
    for serving in order:
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(ask(run, loader, images, answered)) if serving else None
            first, start = await next_step(run)
            late = await loop.heartbeat(round(SLICE / loop.PERIOD))
            last, end = await next_step(run)
            own = seen[serving]
            own.images += (last - first) * BATCH
            own.seconds += end - start
            own.late += late
            if asking is not None:
                asking.cancel()
    return seen, answered


async def is_right(case: str, folder: Path, model: at.Model, loader: at.Loader, answered: Sequence[Answered]) -> bool:
    """Return whether each answer is that of the copied weights, and some those of a training stopped at their step."""
    for told in answered:
        if await told.copy.predict(told.image) != told.answer:
            return False
    for told in sorted(answered, key=lambda told: told.step)[:REPEATED]:
        async with at.ThreadExecutor() as executor:
            trainer, again = set_up(case, folder, executor)
            stopped = (await trainer.fit(again, steps=told.step)).state if told.step else trainer.initial_state()
        copy = at.Classifier.from_state(model, stopped, classes=loader.classes, settings=loader.settings)
        if await copy.predict(told.image) != told.answer:
            return False
    return True


async def measure(case: str, folder: Path, images: Sequence[Path], seed: int) -> dict[str, Any]:
    """Return one round of a case, which trains on ``folder`` and predicts ``images``, as JSON."""
    async with at.ThreadExecutor() as executor:
        trainer, loader = set_up(case, folder, executor)
        async with trainer.start(loader, epochs=FOREVER) as run:
            await asyncio.sleep(WARM_UP)
            seen, answered = await slices(run, loader, images, seed)
            await run.stop()
    name, size, channels = CASES[case]
    model = at.models.get(name)(num_classes=len(loader.classes), image_shape=(size, size, channels))
    return {
        "with": asdict(seen[True]),
        "without": asdict(seen[False]),
        "predictions": len(answered),
        "seconds": [told.seconds for told in answered],
        "right": await is_right(case, folder, model, loader, answered),
    }


def rows_of(results: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Compare each case with itself, left alone, and its heartbeat with that of an idle loop."""
    idle = loop.quantile([beat for beats in results[BUSY] for beat in beats], 0.99)
    rows = []
    for case in CASES:
        rounds = results[case]
        own, alone = ([_rate(one[kind]) for one in rounds] for kind in ("with", "without"))
        ratio = statistics.median(mine / other for mine, other in zip(own, alone, strict=True))
        rate, left = statistics.median(own), statistics.median(alone)
        name = "the same training, left alone"
        rows.append(Row(case, "images/s", rate, left, name, ratio, spread(own), f"{KEPT}x", ratio >= KEPT))
        beats = [beat for one in rounds for beat in one["with"]["late"]]
        late, varies = loop.quantile(beats, 0.99), spread([loop.quantile(one["with"]["late"], 0.99) for one in rounds])
        target = f"at most {ALLOWED:g} ms later"
        rows.append(Row(case, "p99 late, ms", late, idle, BUSY, idle / late, varies, target, late <= idle + ALLOWED))
        right = sum(one["predictions"] for one in rounds if one["right"])
        asked = sum(one["predictions"] for one in rounds)
        rows.append(Row(case, "right answers", right, asked, "all", right / asked, 0.0, "all", right == asked))
    return rows


def _rate(seen: Mapping[str, Any]) -> float:
    return float(seen["images"] / seen["seconds"])


def latencies(results: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return one line a case: how many predictions there were, and how long they took."""
    lines = []
    for case in CASES:
        seconds = [second for one in results[case] for second in one["seconds"]]
        per_second = len(seconds) / sum(one["with"]["seconds"] for one in results[case])
        lines.append(
            f"{case}: {per_second:.1f} predictions a second, answered within p50 {loop.quantile(seconds, 0.5):.1f} ms, "
            f"p99 {loop.quantile(seconds, 0.99):.1f} ms"
        )
    return lines


def main() -> None:
    """Run the rounds, or one case where ``--case`` names it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, for a look")
    parser.add_argument("--case", choices=[*CASES, BUSY], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case == BUSY:
        print(json.dumps(loop.measure(BUSY, Path())))
    elif arguments.case:
        images = sorted(arguments.folder.glob("*/*"))[::7]
        seed = random.SystemRandom().randrange(2**32)  # of the order of the slices
        print(json.dumps(asyncio.run(measure(arguments.case, arguments.folder, images, seed))))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folders = [Path(scratch) / "png", Path(scratch) / "jpeg"]
            for folder, write in zip(folders, (loop.write_files, write_photos), strict=True):
                folder.mkdir()
                write(folder)
            cases = {
                case: partial(child, "benchmarks.serving", "--case", case, "--folder", str(folder))
                for case, folder in zip(CASES, folders, strict=True)
            }
            cases[BUSY] = partial(child, "benchmarks.serving", "--case", BUSY)
            results = interleave(cases, 2 if arguments.quick else 10)
        report("serving", rows_of(results), {"numpy": np.__version__}, latencies(results))


if __name__ == "__main__":
    main()
