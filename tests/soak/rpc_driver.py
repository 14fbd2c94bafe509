"""A training on gRPC workers, as a command: prints each step, then what came of it."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable

import numpy as np

import asynctrain as at
from asynctrain.arena import digest
from asynctrain.executors.ledger import Patience
from asynctrain.rpc import Access, GrpcExecutor
from asynctrain.train.events import StepEnd
from tests.rpc.faults import BATCH, CLASSES, MICROBATCH, MODEL, SIDE

STEPS = 400
PACE = 0.01  # seconds after each step, so that there is time for things to happen
HEARTBEAT = 1.0
LONGEST = 150.0  # seconds, after which it ends with a traceback of where it waited


async def train(executor: at.Executor, stepped: Callable[[int], None], pace: float) -> tuple[str, Counter[str]]:
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
                if pace:
                    await run.pause()
                    await asyncio.sleep(pace)
                    run.resume()
    assert seen == [BATCH] * STEPS
    state = run.history().state
    return digest(state.params) + digest(state.model_state), told


async def main(kind: str, addresses: list[str]) -> None:
    workers = GrpcExecutor(
        *addresses, access=Access(insecure=True), heartbeat=HEARTBEAT, patience=Patience(floor=0.5), join_wait=60
    )
    mixed = kind == "mixed"
    home = at.ExecutorGroup(at.ThreadExecutor(1), at.ProcessExecutor(1), workers) if mixed else workers
    async with asyncio.timeout(LONGEST), home as executor:
        outcome, told = await train(executor, lambda step: print("step", step, flush=True), PACE)  # noqa: T201
    print("told", *(f"{told[name]} {name}" for name in ("WorkerLost", "WorkerJoined", "Speculated")), flush=True)  # noqa: T201
    print("digest", outcome, flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
