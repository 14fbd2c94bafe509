"""Which threads make the batches of a run."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass

import numpy as np
import pytest

import asynctrain as at
from asynctrain.arena import Array
from asynctrain.data.augment import Augmentation, Draws, register
from asynctrain.errors import ClosedError
from asynctrain.executors.base import threads_of
from asynctrain.testing import Faults, SimulatedExecutor
from asynctrain.train.events import StepEnd

DATA = at.ArrayDataset(np.zeros((32, 2, 2, 1), np.uint8), np.arange(32) % 2, classes=("even", "odd"))
seen: set[str] = set()  # what the threads are called that augment, each by its pool


@register("test_seeing")
@dataclass(frozen=True)
class Seeing(Augmentation):
    """Changes nothing, and notes where it is called."""

    def __call__(self, images: Array, draws: Draws) -> Array:
        seen.add(threading.current_thread().name.rpartition("_")[0])
        return images


def loader(threads: int | None = None) -> at.Loader:
    seen.clear()
    return at.Loader(DATA, batch_size=4, image_size=(2, 2), channels=1, seed=0, augment=Seeing(), threads=threads)


def trainer(executor: at.Executor) -> at.Trainer:
    model = at.models.linear(num_classes=2, image_shape=(2, 2, 1))
    return at.Trainer(model, optimizer=at.optim.sgd(0.1), executor=executor)


async def test_a_run_that_computes_on_threads_makes_its_batches_on_the_same() -> None:
    async with at.ThreadExecutor(2) as executor:
        await trainer(executor).fit(loader(), epochs=2)
        assert seen == {"asynctrain-kernel"}
        seen.clear()
        await trainer(executor).evaluate(loader())
        assert seen == {"asynctrain-kernel"}


async def test_a_loader_that_was_given_threads_uses_its_own() -> None:
    async with at.ThreadExecutor(2) as executor:
        await trainer(executor).fit(loader(threads=1), epochs=2)
    assert seen == {"asynctrain-decode"}


async def test_so_does_one_of_a_run_that_computes_elsewhere() -> None:
    async with SimulatedExecutor(1, Faults(0, kill=0, freeze=0, slow=0, late=0, hire=(60, 60))) as executor:
        assert threads_of(executor) is None
        await trainer(executor).fit(loader(), epochs=1)
    assert seen == {"asynctrain-decode"}


async def test_the_bits_are_those_of_other_threads() -> None:
    async with at.ThreadExecutor(1) as executor:
        shared = await trainer(executor).fit(loader(), epochs=2)
        own = await trainer(executor).fit(loader(threads=3), epochs=2)
    assert shared.state.digest() == own.state.digest()


async def test_the_threads_go_on_when_a_run_that_shares_them_is_cancelled() -> None:
    async with at.ThreadExecutor(1) as executor:
        async with trainer(executor).start(loader(), epochs=1000) as run:
            async for event in run:
                if isinstance(event, StepEnd):
                    break
            await run.cancel()
        assert (await trainer(executor).fit(loader(), epochs=1)).state.step == 8


@pytest.mark.parametrize("threads", [None, 1])
async def test_closing_the_executor_fails_the_run_with_a_sentence(threads: int | None) -> None:
    executor = at.ThreadExecutor(1)

    async def train_and_close() -> None:
        async with trainer(executor).start(loader(threads), epochs=2**20) as run:
            async for event in run:
                if isinstance(event, StepEnd):
                    await executor.aclose()

    with pytest.raises(ClosedError, match=r"^the (executor|session) .*is closed"):
        await asyncio.wait_for(train_and_close(), 60)
