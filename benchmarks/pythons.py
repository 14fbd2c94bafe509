"""How decoding and training scale from one thread to two, on each Python there is: ``make bench-pythons``.

With a global interpreter lock only what lets go of it scales: large images and large arrays do, small ones do not. On
a free-threaded build nothing has to wait. The interpreters are those that ``make test-pythons`` has made environments
for.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import asynctrain as at
from asynctrain.data.images import ImageSettings, decode
from benchmarks import harness
from benchmarks.harness import Row, child, interleave, report, spread

ROOT = Path(__file__).parents[1]
SECONDS = 1.5  # that each rate is measured for
CHUNK = 64  # images that a thread takes at once


def encoded(kind: str, height: int, width: int) -> bytes:
    """Return a picture with some structure, as a file."""
    rows, columns = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width))
    pixels = np.stack([rows % 200 + noise, columns % 200 + noise, (rows + columns) % 200 + noise], axis=2)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, kind)
    return file.getvalue()


def decoding(content: bytes, size: tuple[int, int], threads: int) -> float:
    """Return how many images a second so many threads decode."""
    settings, deadline, done = ImageSettings(size), time.perf_counter() + SECONDS, [0] * threads

    def work(number: int) -> None:
        while time.perf_counter() < deadline:
            for _ in range(CHUNK):
                decode(content, settings)
            done[number] += CHUNK

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return sum(done) / (time.perf_counter() - start)


def training(model: str, side: int, batch: int, threads: int) -> float:
    """Return how many images a second are trained with on so many threads."""
    images = np.random.default_rng(0).integers(0, 256, (1024, side, side, 3), np.uint8)
    data = at.ArrayDataset(images, np.arange(1024) % 10)
    network = at.models.get(model)(num_classes=10, image_shape=(side, side, 3))
    loader = at.Loader(data, batch_size=batch, image_size=(side, side), seed=0)

    async def run() -> float:
        async with at.ThreadExecutor(threads) as executor:
            trainer = at.Trainer(network, optimizer=at.optim.adamw(1e-3), executor=executor, microbatch=batch // 2)
            warm = (await trainer.fit(loader, epochs=1_000_000, steps=3)).state
            history = await trainer.fit(loader, epochs=1_000_000, seconds=SECONDS, state=warm)
        return history.samples_per_second

    return asyncio.run(run())


CASES: dict[str, Callable[[int], float]] = {
    "decode PNG 32x32": partial(decoding, encoded("PNG", 32, 32), (32, 32)),
    "decode JPEG 333x500": partial(decoding, encoded("JPEG", 333, 500), (64, 64)),
    "train small_cnn 32x32": partial(training, "small_cnn", 32, 64),
    "train lenet 16x16": partial(training, "lenet", 16, 16),
}


def measure() -> dict[str, list[float]]:
    """Return the rates of one and of two threads of each case."""
    return {name: [case(1), case(2)] for name, case in CASES.items()}


def told() -> str:
    """Return what this Python is."""
    free = " free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
    return f"Python {platform.python_version()}{free}"


def rows_of(name: str, rounds: list[dict[str, list[float]]]) -> list[Row]:
    """Compare two threads with one, by the medians of all rounds."""
    rows = []
    for case in rounds[0]:
        one, two = (statistics.median(round_[case][threads] for round_ in rounds) for threads in (0, 1))
        two_spread = spread([round_[case][1] for round_ in rounds])
        rows.append(Row(f"{case}, {name}", "images/s", two, one, "one thread", two / one, two_spread, "", None))
    return rows


def main() -> None:
    """Run the rounds, or one where ``--measure`` says so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, for a look; writes no results")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps({"name": told(), "rates": measure()}))
        return
    others = ROOT.glob(".venv-python*/bin/python")
    own = "python{}.{}".format(*sys.version_info)
    pythons = [Path(sys.executable), *sorted(path for path in others if path.parts[-3] != f".venv-{own}")]
    cases = {str(python): partial(child, "benchmarks.pythons", "--measure", python=python) for python in pythons}
    results: dict[str, list[dict[str, Any]]] = interleave(cases, 1 if arguments.quick else arguments.rounds)
    by_name = {rounds[0]["name"]: [round_["rates"] for round_ in rounds] for rounds in results.values()}
    rows = [row for name, rounds in sorted(by_name.items()) for row in rows_of(name, rounds)]
    if arguments.quick:
        print(harness.table(rows))
        return
    report("pythons", rows, {"numpy": np.__version__})


if __name__ == "__main__":
    main()
