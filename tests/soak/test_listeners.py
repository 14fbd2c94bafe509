"""Listeners of a run that tells more events than are kept; ``make test`` has the same with a log of few."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import numpy as np
import pytest

import asynctrain as at
from asynctrain.train.events import Event, Missed, StepEnd

KEPT = 65_536
STEPS = 2 * KEPT + 10_000
MEASURED_FROM = KEPT + 5_000  # events: by then as many are kept as ever will be
GROWTH = 8 * 2**20  # bytes, at most, after that


class Listening:
    """A listener that checks the order of what it hears, and keeps nothing of it."""

    def __init__(self) -> None:
        self.heard = 0
        self.memory: list[int] = []
        self.missed = 0
        self.steps = 0

    async def follow(self, run: at.Run) -> None:
        """Hear all events of the run."""
        async for event in run:
            self.hear(event)

    def hear(self, event: Event) -> None:
        """Take the next event."""
        assert event.number == self.heard, "every event in order, none twice"
        self.heard += 1
        self.missed += isinstance(event, Missed)
        if isinstance(event, StepEnd):
            self.steps += 1
            assert event.step == self.steps
        if event.number in (MEASURED_FROM, STEPS):
            self.memory.append(resident_bytes())


def resident_bytes() -> int:
    """Return how much memory this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def make_trainer() -> tuple[at.Trainer, at.Loader]:
    """Return what makes the shortest steps there are."""
    images = np.random.default_rng(0).integers(0, 255, (4096, 2, 2, 1), dtype=np.uint8)
    loader = at.Loader(at.ArrayDataset(images, np.arange(4096) % 2), batch_size=2, image_size=(2, 2), channels=1)
    model = at.models.linear(num_classes=2, image_shape=(2, 2, 1))
    return at.Trainer(model, optimizer=at.optim.sgd(1e-3), executor=at.InlineExecutor()), loader


async def seconds_for(steps: int, idle: bool, run_dir: Path) -> float:
    """Return how long so many steps take beside two listeners, and a third that never reads if ``idle``."""
    trainer, loader = make_trainer()
    start = time.perf_counter()
    async with trainer.start(loader, steps=steps, run_dir=run_dir) as run, asyncio.TaskGroup() as group:
        listeners = [Listening(), Listening()]
        for listener in listeners:
            group.create_task(listener.follow(run))
        lazy = run.events()
        if idle:
            assert (await anext(lazy)).number == 0
        await run.result()
    assert [listener.steps for listener in listeners] == [steps, steps]
    return time.perf_counter() - start


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_of_three_listeners_one_that_never_reads_bounds_no_other_and_costs_no_memory_and_no_time(
    tmp_path: Path,
) -> None:
    async def work() -> tuple[list[Listening], list[Event]]:
        trainer, loader = make_trainer()
        async with trainer.start(loader, steps=STEPS, run_dir=tmp_path / "run") as run, asyncio.TaskGroup() as group:
            listeners = [Listening(), Listening()]
            for listener in listeners:
                group.create_task(listener.follow(run))
            idle = run.events()
            first = [await anext(idle)]
            await run.result()
            return listeners, first + [event async for event in idle]

    listeners, late = asyncio.run(work())
    for listener in listeners:
        assert (listener.missed, listener.steps) == (0, STEPS)
        grown = listener.memory[1] - listener.memory[0]
        assert grown < GROWTH, f"{grown / 2**20:.1f} MiB more after {STEPS - MEASURED_FROM} more events"
    assert isinstance(late[1], Missed)
    assert (late[1].first, late[1].last) == (1, listeners[0].heard - KEPT - 1)
    assert [event.number for event in late[2:]] == list(range(late[1].last + 1, listeners[0].heard))

    took = [asyncio.run(seconds_for(10_000, idle, tmp_path / f"{n}")) for n, idle in enumerate([True, False] * 3)]
    with_idle, without = min(took[::2]), min(took[1::2])
    assert with_idle < 1.5 * without, (
        f"10,000 steps: {with_idle:.1f} s with a listener that never reads, {without:.1f} s"
    )
    print(  # noqa: T201 - what the run of the long tests shows
        f"{listeners[0].heard} events to two listeners in order, a third that never read; "
        f"{(listeners[0].memory[1] - listeners[0].memory[0]) / 2**20:.1f} MiB more in the second half; 10,000 steps in "
        f"{with_idle:.1f} s with it and {without:.1f} s without"
    )
