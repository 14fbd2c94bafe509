"""A training on a Dask cluster, as a command: prints each step, then what came of it."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np

import asynctrain as at
from asynctrain import nn
from asynctrain.arena import digest
from asynctrain.executors.dask import DaskExecutor
from asynctrain.executors.ledger import Patience
from asynctrain.train.events import StepEnd

STEPS, BATCH, MICROBATCH, CLASSES, SIDE = 120, 12, 3, 4, 8
MODEL = nn.Model(
    [nn.Conv2D(4, 3), nn.BatchNorm(), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Dense(16), nn.Dense(CLASSES)],
    input_shape=(SIDE, SIDE, 1),
)


async def train(executor: at.Executor, stepped: Callable[[int], None]) -> tuple[str, Counter[str]]:
    """Return the digest after the last step, of which each has had all its samples once, and the events by name."""
    rng = np.random.default_rng(5)
    images = rng.integers(0, 256, (STEPS * BATCH, SIDE, SIDE, 1), dtype=np.uint8)
    data = at.ArrayDataset(images, rng.integers(0, CLASSES, len(images)))
    loader = at.Loader(data, batch_size=BATCH, image_size=(SIDE, SIDE), channels=1, seed=2)
    trainer = at.Trainer(MODEL, optimizer=at.optim.adamw(0.01), executor=executor, microbatch=MICROBATCH, seed=3)
    told: Counter[str] = Counter()
    seen = []
    async with trainer.start(loader, epochs=1) as run:
        async for event in run:
            told[type(event).__name__] += 1
            if isinstance(event, StepEnd):
                seen.append(event.samples)
                stepped(event.step)
    assert seen == [BATCH] * STEPS
    state = run.history().state
    return digest(state.params) + digest(state.model_state), told


async def main(address: str) -> None:
    async with DaskExecutor(address, patience=Patience(floor=0.5)) as executor:
        outcome, told = await train(executor, lambda step: print("step", step, flush=True))  # noqa: T201 - for a test
    print("told", told["WorkerLost"], "lost,", told["Speculated"], "speculated", flush=True)  # noqa: T201
    print("digest", outcome, flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
