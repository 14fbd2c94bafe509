"""Cancelling stops the computing, at once, and leaves nothing but the last state."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter

import pytest

import asynctrain as at
from asynctrain.executors.worker import StopFlag
from asynctrain.train.events import Event, StepEnd


class Kernels:
    """Which thread began a layer's kernel, in order: a kernel runs when the check before it has passed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[int] = []
        check = StopFlag.check

        def counted(flag: StopFlag) -> None:
            check(flag)
            self.begun.append(threading.get_ident())

        monkeypatch.setattr(StopFlag, "check", counted)

    async def reach(self, count: int) -> None:
        while len(self.begun) < count:  # noqa: ASYNC110 - a thread counts, and must not pay for an event
            await asyncio.sleep(0)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return Kernels(monkeypatch)


async def states_of_a_whole_run(model: at.Model, loader: at.Loader) -> dict[int, str]:
    digests = {}
    async with at.InlineExecutor() as executor:
        trainer = at.Trainer(model, optimizer=at.optim.adamw(1e-2), executor=executor, microbatch=12)
        digests[0] = trainer.initial_state().digest()
        async with trainer.start(loader, epochs=3) as run:
            async for event in run:
                if isinstance(event, StepEnd):
                    digests[run.state.step] = run.state.digest()
    return digests


@pytest.mark.parametrize("moments", [6, pytest.param(25, marks=pytest.mark.soak)])
@pytest.mark.parametrize("split", ["microbatches", "layers"])
async def test_at_random_moments_at_most_one_more_kernel_runs_per_worker_and_the_last_state_is_whole(
    split: str, moments: int, model: at.Model, loader: at.Loader, kernels: Kernels
) -> None:
    digests = await states_of_a_whole_run(model, loader)
    kernels_of_a_run = len(kernels.begun)
    draw = random.Random(0)
    async with at.ThreadExecutor(2, split=split) as executor:  # type: ignore[arg-type]
        threads_of_the_executor = None
        for _ in range(moments):
            trainer = at.Trainer(model, optimizer=at.optim.adamw(1e-2), executor=executor, microbatch=12)
            kernels.begun.clear()
            fit = asyncio.create_task(trainer.fit(loader, epochs=3))
            await kernels.reach(draw.randrange(kernels_of_a_run * 9 // 10))
            fit.cancel()
            begun = len(kernels.begun)  # the flags are set: what is counted now had passed its check before
            with pytest.raises(asyncio.CancelledError):
                await fit
            further = Counter(kernels.begun[begun:])
            assert all(count <= 1 for count in further.values()), further
            state = trainer.state
            assert digests.get(state.step, state.digest()) == state.digest()
            names = {thread.name for thread in threading.enumerate() if thread.name.startswith("asynctrain")}
            threads_of_the_executor = threads_of_the_executor or names
            assert names == threads_of_the_executor, "a thread of the run is left beside the executor's own"


async def test_a_timeout_around_fit_ends_it_and_the_run_can_go_on_from_its_state(
    model: at.Model, loader: at.Loader, kernels: Kernels
) -> None:
    async with at.ThreadExecutor(2) as executor:
        trainer = at.Trainer(model, optimizer=at.optim.adamw(1e-2), executor=executor)
        deadline = asyncio.timeout(None)

        def let_it_pass(event: Event) -> None:
            if isinstance(event, StepEnd) and event.step == 3:
                deadline.reschedule(asyncio.get_running_loop().time())

        with pytest.raises(TimeoutError):
            async with deadline:
                await trainer.fit(loader, epochs=100_000, callbacks=[let_it_pass])
        state = trainer.state
        assert state.step >= 3
        epochs = state.cursor.epoch + 1
        history = await trainer.fit(loader, epochs=epochs, state=state)
    assert history.state.step == epochs * loader.batches_per_epoch


async def test_cancelling_one_who_waits_for_the_result_leaves_the_run_alone(model: at.Model, loader: at.Loader) -> None:
    async with at.ThreadExecutor(2) as executor:
        trainer = at.Trainer(model, optimizer=at.optim.adamw(1e-2), executor=executor)
        async with trainer.start(loader, epochs=2) as run:
            waiting = asyncio.create_task(run.result())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert (await run.result()).reason == "finished"


async def test_a_cancelled_run_leaves_its_model_in_the_run_folder(
    model: at.Model, loader: at.Loader, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    async with at.ThreadExecutor(2) as executor:
        trainer = at.Trainer(model, optimizer=at.optim.adamw(1e-2), executor=executor)
        async with trainer.start(loader, epochs=1000, run_dir=folder) as run:
            async for event in run:
                if isinstance(event, StepEnd) and event.step == 3:
                    break
    classifier = at.Classifier.load(folder / "model.safetensors")
    assert classifier.classes == ("top", "middle", "bottom")
    assert '"reason": "cancelled"' in (folder / "history.jsonl").read_text()
