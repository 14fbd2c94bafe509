"""The same images through every loader: one side a process, ``python -m benchmarks.loaders JOB`` with the job as JSON.

Runs in asynctrain's environment and in the peers', so what only one of them has is imported where it is used. Every
side delivers batches of 64 float32 images, ``(pixel / 255 - 0.5) / 0.25``, without end; the clock starts when the first
batch is out, and stops in the midst of the stream.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCH = 64
SCALE, SHIFT = np.float32(1 / (255 * 0.25)), np.float32(0.5 / 0.25)
PADDING = 4  # of the random crop
CHUNK = 32  # samples decoded in one go where a peer is given chunks
THREADS = 2  # of the bare loop, and workers of the DataLoader: the machine's CPUs


@dataclass(frozen=True, slots=True)
class Job:
    """What one process is to measure.

    Attributes:
        side: a key of ``SIDES``.
        folder: class folders of images.
        size: height and width that the images get.
        channels: 1 or 3.
        images: how many are counted.
        decoder: ``"pillow"``; ``"draft"``, Pillow with ``Image.draft``, as asynctrain's ``"pillow"`` always does it;
            ``"imagecodecs"``.
        augment: whether each image is cropped and flipped at random.
        epochs_before: passes over the data before the clock starts; a cache is filled by then.
        repeats: how often each file is in the data, for folders that are smaller than ``images``.
        watched: whether memory is looked at all the while.
    """

    side: str
    folder: str
    size: int
    channels: int
    images: int
    decoder: str = "pillow"
    augment: bool = False
    epochs_before: int = 0
    repeats: int = 1
    watched: bool = False

    def to_json(self) -> str:
        """Return the job as JSON."""
        return json.dumps(asdict(self))

    def paths(self) -> list[str]:
        """Return the files, each ``repeats`` times, in an order that has nothing to do with their names."""
        paths = sorted(str(path) for path in Path(self.folder).glob("*/*") if path.suffix in (".jpg", ".png"))
        return random.Random(0).sample(paths * self.repeats, len(paths) * self.repeats)


class Clock:
    """Counts batches, from the first that is out after the passes before."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._before = job.epochs_before * len(job.paths())
        self._images = self._batches = 0
        self._start: tuple[float, float] | None = None  # clock and CPU seconds
        self._peak = 0.0
        self.result: dict[str, float] = {}

    def done(self, batch: Any) -> bool:
        """Count a batch; return whether it was the last one that counts."""
        side = self._job.size
        if tuple(batch.shape[1:]) != (side, side, self._job.channels) or "float32" not in str(batch.dtype):
            raise ValueError(f"a batch is {tuple(batch.shape)} of {batch.dtype}")
        self._images += len(batch)
        self._batches += 1
        if self._job.watched and self._batches % 8 == 0:
            self._peak = max(self._peak, memory_in_use())
        if self._start is None:
            if self._images > self._before:
                cpu = cpu_seconds()
                self._start, self._images = (time.perf_counter(), cpu), 0
        elif self._images >= self._job.images:
            self._finish(*self._start)
        return "memory" in self.result

    def _finish(self, start: float, cpu: float) -> None:
        seconds = time.perf_counter() - start
        self.result |= {
            "images_per_second": self._images / seconds,
            "cpu_per_image": (cpu_seconds() - cpu) / self._images,
            "memory": max(self._peak, memory_in_use()),
        }


def cpu_seconds() -> float:
    """Return the CPU seconds so far of this process and its children, which must be running."""
    return sum(sum(map(int, _stat(process)[11:13])) for process in _processes()) / os.sysconf("SC_CLK_TCK")


def memory_in_use() -> float:
    """Return the bytes in memory of this process and its children; what they share counts once (PSS)."""
    rolled_up = ((process / "smaps_rollup").read_text().splitlines() for process in _processes())
    return 1024.0 * sum(int(line.split()[1]) for lines in rolled_up for line in lines if line.startswith("Pss:"))


def _processes() -> list[Path]:
    tasks = Path("/proc/self/task").iterdir()
    children = [child for task in tasks for child in (task / "children").read_text().split()]
    return [Path("/proc/self"), *(Path("/proc") / child for child in children)]


def _stat(process: Path) -> list[str]:
    return (process / "stat").read_text().rpartition(")")[2].split()


def normalized(images: np.ndarray) -> np.ndarray:
    """Return uint8 images as float32, the whole batch at once."""
    result: np.ndarray = np.multiply(images, SCALE, dtype=np.float32)
    result -= SHIFT
    return result


# asynctrain


def asynctrain_loader(job: Job, clock: Clock) -> None:
    """Be asynctrain's Loader at its defaults, on uvloop, each batch normalised in a thread."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_consume(job, clock))


async def _consume(job: Job, clock: Clock) -> None:
    loader = _loader(job)
    clock.result |= {"memory_before": memory_in_use(), "bound": _bound(loader, job)} if job.watched else {}
    async with loader.open(epochs=1_000_000) as batches:
        async for batch in batches:
            if clock.done(await asyncio.to_thread(normalized, batch.images)):
                return


def _loader(job: Job) -> Any:
    import asynctrain as at
    from asynctrain.data.augment import compose, horizontal_flip, random_crop
    from asynctrain.data.cache import MemoryCache

    data = at.ImageFolder(job.folder)
    return at.Loader(
        at.data.Subset(data, np.tile(np.arange(len(data)), job.repeats)),
        batch_size=BATCH,
        image_size=(job.size, job.size),
        channels=job.channels,
        decoder=job.decoder,
        augment=compose(random_crop(padding=PADDING), horizontal_flip()) if job.augment else None,
        cache=MemoryCache(2**30) if job.epochs_before else None,
    )


def _bound(loader: Any, job: Job) -> float:
    """Return the bytes that the Loader's docstring states, and what is held here: a batch, and two as float32."""
    batch = BATCH * job.size * job.size * job.channels
    encoded = np.mean([Path(path).stat().st_size for path in job.paths()])
    decoded = 12 * 500 * 500  # no photo has more pixels
    stated = (loader.prefetch + loader.threads + 4) * batch + (2 * loader.threads + 4) * BATCH * encoded
    return float(stated + loader.threads * decoded + (1 + 2 * 4) * batch)


# No pipeline at all


def bare_threads(job: Job, clock: Clock) -> None:
    """Be two threads that read and decode, with asynctrain's decoder, a batch each at a time: no order, no queues."""
    from asynctrain.data.images import ImageSettings, decode, quiet_pillow

    settings = ImageSettings((job.size, job.size), job.channels)
    paths, lock, done = _endless(job.paths()), threading.Lock(), threading.Event()

    def work() -> None:
        with quiet_pillow():
            while not done.is_set():
                images = np.empty((BATCH, *settings.shape), np.uint8)
                with lock:
                    chosen = [next(paths) for _ in range(BATCH)]
                for path, out in zip(chosen, images, strict=True):
                    with open(path, "rb", buffering=0) as file:  # noqa: PTH123 (as asynctrain's FileSource)
                        decode(file.read(), settings, path, out=out)
                batch = normalized(images)
                with lock:
                    if not done.is_set() and clock.done(batch):
                        done.set()

    with ThreadPoolExecutor(THREADS) as pool:
        for future in [pool.submit(work) for _ in range(THREADS)]:
            future.result()


def _endless(paths: list[str]) -> Iterator[str]:
    while True:
        yield from paths


# The peers decode with Pillow, or with the library that the job names


def decoder_of(job: Job) -> Callable[[str], np.ndarray]:
    """Return path -> (H, W, C) uint8, as one writes it by hand."""
    mode, size = "L" if job.channels == 1 else "RGB", (job.size, job.size)

    def by_pillow(path: str) -> np.ndarray:
        with Image.open(path) as image:
            if job.decoder == "draft":
                image.draft(mode, size)
            converted = image if image.mode == mode else image.convert(mode)
            if converted.size != size:
                gap = 2.0 if job.decoder == "draft" else None
                converted = converted.resize(size, Image.Resampling.BILINEAR, reducing_gap=gap)
            return np.asarray(converted).reshape(job.size, job.size, job.channels)

    def by_imagecodecs(path: str) -> np.ndarray:
        import imagecodecs

        pixels: np.ndarray = imagecodecs.png_decode(Path(path).read_bytes())
        return pixels.reshape(job.size, job.size, job.channels)

    return by_imagecodecs if job.decoder == "imagecodecs" else by_pillow


def cropped_and_flipped(image: np.ndarray) -> np.ndarray:
    """Return a random crop of a padded image, flipped or not."""
    padded = np.zeros((image.shape[0] + 2 * PADDING, image.shape[1] + 2 * PADDING, image.shape[2]), np.uint8)
    padded[PADDING:-PADDING, PADDING:-PADDING] = image
    top, left = random.randint(0, 2 * PADDING), random.randint(0, 2 * PADDING)
    crop = padded[top : top + image.shape[0], left : left + image.shape[1]]
    return crop[:, ::-1] if random.random() < 0.5 else crop


def torch_loader(job: Job, clock: Clock) -> None:
    """Be PyTorch's DataLoader: two persistent workers, each sample decoded, augmented and normalised there."""
    import torch

    decode, paths = decoder_of(job), job.paths()

    class Images(torch.utils.data.Dataset):  # type: ignore[misc]  # torch is not there to check
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> tuple[Any, int]:
            image = decode(paths[index])
            if job.augment:
                image = cropped_and_flipped(image)
            return torch.from_numpy(np.multiply(image, SCALE, dtype=np.float32) - SHIFT), 0

    loader = torch.utils.data.DataLoader(
        Images(), batch_size=BATCH, shuffle=True, num_workers=THREADS, persistent_workers=True, drop_last=True
    )
    while True:
        for images, _ in loader:
            if clock.done(images):
                return


def spdl_native(job: Job, clock: Clock) -> None:
    """Be SPDL with its own decoder: a batch of paths at a time, each decoded to size by FFmpeg."""
    import spdl.io  # type: ignore[import-not-found]
    from spdl.pipeline import PipelineBuilder  # type: ignore[import-not-found]

    one_thread = spdl.io.decode_config(decoder_options={"threads": "1"})
    pixels = "gray" if job.channels == 1 else "rgb24"

    def decode(paths: list[str]) -> np.ndarray:
        buffer = spdl.io.load_image_batch(
            paths, width=job.size, height=job.size, pix_fmt=pixels, decode_config=one_thread
        )
        return normalized(spdl.io.to_numpy(buffer).reshape(-1, job.size, job.size, job.channels))

    threads = 3  # of 2, 3, 4 and 8 the best on two CPUs
    builder = PipelineBuilder().add_source(_endless(job.paths())).aggregate(BATCH).pipe(decode, concurrency=threads)
    _run_spdl(builder.add_sink(3).build(num_threads=threads), clock)


def spdl_pillow(job: Job, clock: Clock) -> None:
    """Be SPDL with Pillow: a stage that decodes file by file, one that makes batches."""
    from spdl.pipeline import PipelineBuilder

    def collated(images: list[np.ndarray]) -> np.ndarray:
        return normalized(np.stack(images))

    threads = 4  # of 2, 3, 4 and 8 the best on two CPUs
    builder = PipelineBuilder().add_source(_endless(job.paths())).pipe(decoder_of(job), concurrency=threads)
    pipeline = builder.aggregate(BATCH).pipe(collated).add_sink(3).build(num_threads=threads + 1)
    _run_spdl(pipeline, clock)


def spdl_pillow_chunks(job: Job, clock: Clock) -> None:
    """Be SPDL with Pillow, given the chunks that asynctrain makes by itself."""
    from spdl.pipeline import PipelineBuilder

    decode = decoder_of(job)

    def decoded(paths: list[str]) -> np.ndarray:
        return np.stack([decode(path) for path in paths])

    def collated(chunks: list[np.ndarray]) -> np.ndarray:
        return normalized(np.concatenate(chunks))

    builder = PipelineBuilder().add_source(_endless(job.paths())).aggregate(CHUNK).pipe(decoded, concurrency=THREADS)
    pipeline = builder.aggregate(BATCH // CHUNK).pipe(collated).add_sink(3).build(num_threads=THREADS + 1)
    _run_spdl(pipeline, clock)


def _run_spdl(pipeline: Any, clock: Clock) -> None:
    with pipeline.auto_stop():
        for batch in pipeline:
            if clock.done(batch):
                return


SIDES: dict[str, Callable[[Job, Clock], None]] = {
    "asynctrain": asynctrain_loader,
    "bare threads": bare_threads,
    "DataLoader": torch_loader,
    "SPDL native": spdl_native,
    "SPDL Pillow": spdl_pillow,
    "SPDL Pillow, chunks": spdl_pillow_chunks,
}
OURS = ("asynctrain", "bare threads")  # the sides that run in asynctrain's own environment
PEERS = tuple(side for side in SIDES if side not in OURS)
PACKAGES = ("asynctrain", "numpy", "pillow", "uvloop", "torch", "spdl_io", "imagecodecs")


def versions() -> dict[str, str]:
    """Return the versions of what is installed here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def missing(side: str) -> str:
    """Return why a side cannot run in this environment, or nothing."""
    try:
        if side.startswith("SPDL"):
            import spdl.io
            import spdl.pipeline

            spdl.io.decode_config()  # its native part is loaded late, and fails without the FFmpeg libraries
        elif side == "DataLoader":
            import torch  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return ""


def main() -> None:
    """Run one job, or tell about this environment."""
    if sys.argv[1] == "--about":
        print(json.dumps({"versions": versions(), "missing": {side: missing(side) for side in SIDES}}))
        return
    job = Job(**json.loads(sys.argv[1]))
    clock = Clock(job)
    SIDES[job.side](job, clock)
    print(json.dumps(clock.result))


if __name__ == "__main__":
    main()
