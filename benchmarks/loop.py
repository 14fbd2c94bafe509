"""How late a 5 ms heartbeat is in a loop that trains: ``make bench-loop``.

Each case runs in a process of its own, the cases in random order, round after round. A beat's lateness is how long
after its time it ran. A case is held against an idle loop on a machine that two spinning processes keep busy, since
training keeps it busy too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.harness import PEERS_PYTHON, Row, child, interleave, report, spread

PERIOD = 0.005  # seconds
BEATS = 500  # a round
IMAGES, SIZE, CLASSES, BATCH = 20_000, 28, 10, 64

CASES = (
    "idle",
    "idle, busy machine",
    "fit, arrays",
    "fit, PNG files",
    "to_thread PyTorch, arrays",
    "to_thread PyTorch, PNG files",
)


def images() -> tuple[np.ndarray, np.ndarray]:
    """Return noisy blobs whose place is their class: cheap to make, and learnable."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, IMAGES)
    pixels = rng.integers(0, 60, (IMAGES, SIZE, SIZE, 1), np.uint8)
    for image, label in zip(pixels, labels, strict=True):
        row, column = divmod(int(label) * 2, 5)
        image[row * 5 : row * 5 + 6, column * 5 : column * 5 + 6] += 120
    return pixels, labels.astype(np.int64)


def write_files(folder: Path) -> None:
    """Write a tenth of the images as PNG files in class folders."""
    pixels, labels = images()
    for number in range(IMAGES // 10):
        path = folder / str(labels[number]) / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels[number, :, :, 0]).save(path)


async def heartbeat(beats: int) -> list[float]:
    """Return the lateness of each beat, in seconds."""
    loop = asyncio.get_running_loop()
    late, due = [], loop.time()
    for _ in range(beats):
        due += PERIOD
        await asyncio.sleep(max(0.0, due - loop.time()))
        late.append(loop.time() - due)
        due = max(due, loop.time() - PERIOD)  # a beat that was missed is not made up for
    return late


async def beside(work: Callable[[], Awaitable[object]]) -> list[float]:
    """Return the heartbeat's lateness while ``work`` runs, after a second to warm up."""
    task = asyncio.ensure_future(work())
    await asyncio.wait([task], timeout=1.5)
    if task.done():
        raise RuntimeError(f"the work ended before it was measured: {task.exception() or task.result()!r}")
    late = await heartbeat(BEATS)
    if task.done():
        raise RuntimeError("the work ended while it was measured")
    task.cancel()
    await asyncio.wait([task])
    return late


async def fit(folder: Path, from_files: bool) -> object:
    """Train LeNet on threads."""
    import asynctrain as at

    data = at.ImageFolder(folder) if from_files else at.ArrayDataset(*images())
    loader = at.Loader(data, batch_size=BATCH, image_size=(SIZE, SIZE), channels=1)
    model = at.models.lenet(num_classes=CLASSES, image_shape=(SIZE, SIZE, 1))
    async with at.ThreadExecutor() as executor:
        return await at.Trainer(model, optimizer=at.optim.sgd(0.01, momentum=0.9), executor=executor).fit(
            loader, epochs=1000
        )


def train_torch(folder: Path, from_files: bool, stop: Callable[[], bool]) -> None:
    """Train the same network on PyTorch, blocking, as one would in a thread."""
    import torch
    from torch import nn

    model = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = torch.utils.data.DataLoader(_torch_data(folder, from_files), batch_size=BATCH, shuffle=True)
    while True:
        for x, y in loader:
            if stop():
                return
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()


def _torch_data(folder: Path, from_files: bool) -> object:
    import torch

    if not from_files:
        pixels, labels = images()
        x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
        return torch.utils.data.TensorDataset(x, torch.from_numpy(labels))

    class Files(torch.utils.data.Dataset):  # type: ignore[misc]  # torch is not there to check
        def __init__(self) -> None:
            self.paths = sorted(folder.glob("*/*.png"))

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> tuple[object, int]:
            with Image.open(self.paths[index]) as image:
                pixels = np.asarray(image, np.float32)
            return torch.from_numpy((pixels / 255 - 0.5) / 0.25)[None], int(self.paths[index].parent.name)

    return Files()


async def torch_in_thread(folder: Path, from_files: bool) -> object:
    """What people do today: a blocking trainer in ``asyncio.to_thread``."""
    stopped = False
    try:
        return await asyncio.to_thread(train_torch, folder, from_files, lambda: stopped)
    finally:
        stopped = True


def spin() -> None:
    """Keep one CPU busy."""
    while True:
        pass


def measure(case: str, folder: Path) -> list[float]:
    """Return the lateness of each beat in ``case``."""
    if case == "idle":
        return asyncio.run(heartbeat(BEATS))
    if case == "idle, busy machine":
        spinners = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(2)]
        for spinner in spinners:
            spinner.start()
        time.sleep(1)  # until they spin
        late = asyncio.run(heartbeat(BEATS))
        for spinner in spinners:
            spinner.terminate()
        return late
    work = torch_in_thread if "PyTorch" in case else fit
    return asyncio.run(beside(partial(work, folder, "PNG" in case)))


def quantile(values: list[float], share: float) -> float:
    """Return the ``share`` quantile, in milliseconds."""
    return float(np.quantile(values, share)) * 1e3


def rows_of(results: dict[str, list[list[float]]]) -> list[Row]:
    """Compare what each case adds, at the 99th percentile over all rounds."""
    p99 = {case: quantile([beat for beats in rounds for beat in beats], 0.99) for case, rounds in results.items()}
    busy = "idle, busy machine"
    rows = [Row("idle", "p99 late, ms", p99["idle"], None, "", None, _spread(results["idle"]), "", None)]
    for case, allowed in (("fit, arrays", 5.0), ("fit, PNG files", 10.0)):
        late, own = p99[case], _spread(results[case])
        against = [(busy, f"at most {allowed:g} ms later", late <= p99[busy] + allowed)]
        torch_case = f"to_thread PyTorch, {case.removeprefix('fit, ')}"
        if torch_case in p99:
            against.append((torch_case, "not later", late <= p99[torch_case]))
        for other, target, met in against:
            rows.append(Row(case, "p99 late, ms", late, p99[other], other, p99[other] / late, own, target, met))
    return rows


def _spread(rounds: list[list[float]]) -> float:
    return spread([quantile(beats, 0.99) for beats in rounds])


def distribution(results: dict[str, list[list[float]]]) -> list[str]:
    """Return one line a case: median, p99 and the latest beat."""
    lines = []
    for case, rounds in results.items():
        beats = [beat for one in rounds for beat in one]
        lines.append(
            f"{case:<28} {len(beats)} beats, late by p50 {quantile(beats, 0.5):6.2f} ms, "
            f"p99 {quantile(beats, 0.99):6.2f} ms, max {max(beats) * 1e3:6.2f} ms"
        )
    return lines


def main() -> None:
    """Run the rounds, or one case where ``--case`` names it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, for a look")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(arguments.case, arguments.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder))
        peers = PEERS_PYTHON.exists()
        if not peers:
            print("PyTorch is left out: there is no .venv-peers (make bench-loop makes it)", file=sys.stderr)
        cases = {
            case: partial(
                child,
                "benchmarks.loop",
                *("--case", case, "--folder", folder),
                python=PEERS_PYTHON if "PyTorch" in case else sys.executable,
            )
            for case in CASES
            if peers or "PyTorch" not in case
        }
        results = interleave(cases, 2 if arguments.quick else 10)
    report("loop", rows_of(results), {"numpy": np.__version__}, distribution(results))


if __name__ == "__main__":
    main()
