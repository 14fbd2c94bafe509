"""A loader over images from the wild: each ends as it should, named, and in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest

from asynctrain.data import FileSource, Loader
from asynctrain.errors import DecodeError
from asynctrain.types import Record

Entry = dict[str, Any]


class Files:
    """Files as a dataset of one class."""

    classes = ("odd",)

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.labels = np.zeros(len(paths), np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Record:
        return Record(FileSource(str(self.paths[index])), 0)


@pytest.fixture
def entries(odd_images: Path) -> list[Entry]:
    manifest = json.loads((odd_images / "manifest.json").read_text())
    if manifest["pillow"].split(".")[0] != PIL.__version__.split(".")[0]:
        pytest.skip(f"the manifest was made with Pillow {manifest['pillow']}, this is {PIL.__version__}")
    assert len(manifest["entries"]) == 217
    return [entry for entry in manifest["entries"] if not entry["version_dependent"]]


async def test_in_one_run_that_skips_each_is_delivered_or_told(odd_images: Path, entries: list[Entry]) -> None:
    files = Files([odd_images / entry["file"] for entry in entries])
    delivered: list[str] = []
    async with Loader(files, batch_size=32, errors="skip", max_skipped=1.0).open() as batches:
        async for batch in batches:
            delivered += batch.sources
            assert batch.last or len(batch.images) == 32, "batches stay full"
        skipped = {skipped.source: skipped.reason for skipped in batches.skipped}
        report = batches.report()
    expected = {str(odd_images / entry["file"]) for entry in entries if entry["expect"] == "decode"}
    assert set(delivered) == expected
    assert len(delivered) + len(skipped) == len(entries)
    assert all(reason and path in report for path, reason in skipped.items())


async def test_each_alone_is_delivered_or_raises_its_name(odd_images: Path, entries: list[Entry]) -> None:
    wrong = []
    for entry in entries:
        path = odd_images / entry["file"]
        try:
            async with Loader(Files([path])).open() as batches:
                outcome = "decode" if (await anext(batches)).sources == (str(path),) else "named wrongly"
        except DecodeError as error:
            outcome = "reject" if error.path == str(path) else "named wrongly"
        if outcome != entry["expect"]:
            wrong.append((entry["file"], outcome))
    assert not wrong


LOAD_ALL = """
import asyncio, pathlib, sys
sys.path.insert(0, sys.argv[2])
from test_odd_images import Files
from asynctrain.data import Loader

async def load():
    files = Files([path for path in pathlib.Path(sys.argv[1]).rglob("*") if path.is_file()])
    async with Loader(files, errors="skip", max_skipped=1.0).open() as batches:
        return sum([batch.samples async for batch in batches])

assert asyncio.run(load()) > 100
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(status["VmHWM"].split()[0])  # in KiB; ru_maxrss would begin with that of the process which started this one
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the peak")
def test_the_peak_memory_of_a_process_that_loads_them_all_stays_below_600_mb(odd_images: Path) -> None:
    arguments = [sys.executable, "-c", LOAD_ALL, str(odd_images / "images"), str(Path(__file__).parent)]
    told = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    assert int(told) * 1024 < 600e6
