"""How near a loader comes to the rate of slow sources: ``make bench-sources``.

A remote source is played by one that takes 20 ms an image and allows 32 at once, so at best 1,600 images/s. Mixed with
a local one, three of whose images come for each remote one, the best is the sum of both rates.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

import asynctrain as at
from asynctrain.types import Record
from benchmarks.harness import Row, interleave, report, spread

SECONDS, PLACES, LOCAL_SHARE = 0.020, 32, 3
IDEAL = PLACES / SECONDS
IMAGES = 6_400


def png() -> bytes:
    """Return a small grey image."""
    encoded = io.BytesIO()
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(encoded, "PNG")
    return encoded.getvalue()


@dataclass(frozen=True, eq=False)
class SlowSource:
    """An image that is fetched in 20 ms, when one of the places is free."""

    places: asyncio.Semaphore
    content: bytes = field(default_factory=png, repr=False)
    connection: AbstractAsyncContextManager[object] = field(default_factory=nullcontext)

    def read(self) -> bytes:
        """Return the image after the wait. Blocks."""
        time.sleep(SECONDS)
        return self.content

    async def fetch(self) -> bytes:
        """Return the image after the wait."""
        async with self.places:
            await asyncio.sleep(SECONDS)
        return self.content

    def __str__(self) -> str:
        return "slow image"


class SlowImages(at.data.Splitting):
    """As many images as are wanted, all the same and all slow."""

    classes = ("image",)
    in_flight = PLACES

    def __init__(self, count: int) -> None:
        self.labels = np.zeros(count, np.int64)
        self._source = SlowSource(asyncio.Semaphore(PLACES))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> Record:
        return Record(self._source, 0)


async def rate(dataset: at.data.Dataset) -> float:
    """Return images/s over one epoch, from the first batch on."""
    loader = at.Loader(dataset, image_size=(28, 28), channels=1)
    async with loader.open() as batches:
        await anext(batches)
        start, delivered = time.perf_counter(), 0
        async for batch in batches:
            delivered += batch.samples
        return delivered / (time.perf_counter() - start)


async def slow() -> float:
    """Return the rate of the slow source alone."""
    return await rate(SlowImages(IMAGES))


async def mixed() -> float:
    """Return the rate of the slow source and a local one, interleaved."""
    count = LOCAL_SHARE * IMAGES
    local = at.ArrayDataset(np.zeros((count, 28, 28), np.uint8), np.zeros(count, np.int64), classes=("image",))
    return await rate(at.data.Interleave([SlowImages(IMAGES), local], weights=[1, LOCAL_SHARE]))


def main() -> None:
    """Run the rounds and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, for a look")
    rounds = 2 if parser.parse_args().quick else 10
    cases: dict[str, Callable[[], float]] = {
        "20 ms an image, 32 in flight": lambda: asyncio.run(slow()),
        "the same and a local source": lambda: asyncio.run(mixed()),
    }
    ideals = dict(zip(cases, (IDEAL, IDEAL * (1 + LOCAL_SHARE)), strict=True))
    rows = []
    for case, rates in interleave(cases, rounds).items():
        median, ideal = statistics.median(rates), ideals[case]
        share = median / ideal
        rows.append(Row(case, "images/s", median, ideal, "ideal", share, spread(rates), "0.9", share >= 0.9))
    report("sources", rows, {"numpy": np.__version__})


if __name__ == "__main__":
    main()
