"""Where chunks are decoded changes when they come, never what comes, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from asynctrain.data import ImageFolder, Loader, MemoryCache, augment, decoding
from asynctrain.errors import DecodeError, ExecutorError

pytestmark = pytest.mark.one_loop

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux shows it; nothing is written there by name


@pytest.fixture
def photos(tmp_path: Path) -> ImageFolder:
    """Return 30 JPEG files in two classes, the eighth of which is broken."""
    rng = np.random.default_rng(0)
    for number in range(30):
        path = tmp_path / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    (tmp_path / "a" / "08.jpg").write_bytes(b"no image")
    return ImageFolder(tmp_path)


@pytest.fixture(autouse=True)
def no_shared_memory_left() -> Iterator[None]:
    """Fail a test that leaves a block of shared memory behind."""
    before = shared_memory()
    yield
    assert shared_memory() == before


def shared_memory() -> set[str]:
    return {entry.name for entry in os.scandir(SHARED_MEMORY)} if SHARED_MEMORY.exists() else set()


async def told(loader: Loader) -> tuple[str, list[str]]:
    """Return a digest of everything that two epochs deliver, and the names of what they skip."""
    sha = hashlib.sha256()
    async with loader.open(epochs=2) as batches:
        async for batch in batches:
            sha.update(batch.images.tobytes())
            sha.update(repr((batch.labels.tolist(), batch.sources, batch.cursor)).encode())
        return sha.hexdigest(), [skipped.source for skipped in batches.skipped]


def loader(photos: ImageFolder, executor: decoding.Home, **options: object) -> Loader:
    return Loader(
        photos,
        batch_size=8,
        image_size=(16, 16),
        threads=2,
        executor=executor,
        augment=augment.standard(),
        errors="skip",
        max_skipped=2,
        **options,  # type: ignore[arg-type]
    )


async def test_processes_deliver_and_skip_what_threads_do(photos: ImageFolder) -> None:
    on_threads = await told(loader(photos, "threads"))
    assert [Path(name).name for name in on_threads[1]] == ["08.jpg"] * 2
    assert await told(loader(photos, "processes", chunk=3)) == on_threads
    assert await told(loader(photos, "processes", cache=MemoryCache(10**6))) == on_threads


async def test_auto_measures_once_and_changes_nothing(photos: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    on_threads = await told(loader(photos, "threads"))
    assert await told(loader(photos, "auto")) == on_threads, "so few images are not worth a process"
    monkeypatch.setattr(decoding, "START_UP", 0.0)
    monkeypatch.setattr(decoding, "SCALES", float("inf"))
    assert await told(loader(photos, "auto")) == on_threads


async def test_a_broken_image_is_named_from_a_process_too(photos: ImageFolder) -> None:
    with pytest.raises(DecodeError, match=r"08\.jpg"):
        async with Loader(photos, image_size=(16, 16), executor="processes", threads=1).open() as batches:
            await anext(batches)


async def test_a_decoding_process_that_is_killed_is_told_and_leaves_nothing(photos: ImageFolder) -> None:
    async with loader(photos, "processes", prefetch=1).open(epochs=1000) as batches:
        await anext(batches)
        for worker in multiprocessing.active_children():
            worker.kill()
        with pytest.raises(ExecutorError, match="a worker process died"):
            async for _ in batches:
                pass


async def test_leaving_early_ends_the_processes(photos: ImageFolder) -> None:
    async with loader(photos, "processes").open(epochs=1000) as batches:
        await anext(batches)


def test_another_executor_is_refused(photos: ImageFolder) -> None:
    with pytest.raises(ValueError, match="executor must be 'threads', 'processes' or 'auto', got 'gpu'"):
        loader(photos, "gpu")  # type: ignore[arg-type]
