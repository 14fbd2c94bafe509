"""A run and its history as a notebook shows them, and what is left when a cell is interrupted."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Mapping
from xml.etree import ElementTree

import nbformat
import pytest
from jupyter_core.utils import ensure_async
from nbclient import NotebookClient

import asynctrain as at
from asynctrain.train.events import StepEnd
from asynctrain.train.notebook import POINTS, Curve


@pytest.fixture
def trainer(model: at.Model) -> at.Trainer:
    return at.Trainer(model, optimizer=at.optim.adamw(1e-2), executor=at.InlineExecutor(), microbatch=12, seed=3)


def test_a_curve_keeps_the_mean_and_the_order_of_what_it_thins_and_no_more_points_than_can_be_told_apart() -> None:
    curve = Curve()
    for step in range(100_000):
        curve.add(step, 2.0 * step)
    curve.add(100_000, math.nan)
    steps = [step for step, _ in curve.points]
    assert POINTS // 2 <= len(steps) <= POINTS
    assert steps == sorted(steps)
    assert steps[-1] > 99_000
    assert all(value == pytest.approx(2 * step) for step, value in curve.points)


@pytest.mark.anyio
async def test_a_run_shows_its_progress_and_curve_while_it_trains_and_its_epochs_after(
    trainer: at.Trainer, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    async with trainer.start(loader, epochs=3, validate=blobs) as run:
        assert "<svg" not in run._repr_mimebundle_()["text/html"], "there is nothing to draw yet"
        async for event in run:
            if isinstance(event, StepEnd) and event.step == 7:
                break
        await run.pause()
        shown = run._repr_mimebundle_()["text/html"]
        assert f'<progress value="{run.progress.step}" max="15">' in shown
        assert points_of(shown)[0] == run.progress.step
        run.resume()
        await run.result()
        bundle = run._repr_mimebundle_()
    assert "<progress" not in bundle["text/html"]
    assert bundle["text/html"].count("<tr>") == 4
    assert points_of(bundle["text/html"]) == [15, 3]
    assert bundle["text/plain"] == repr(run)


def points_of(shown: str) -> list[int]:
    """Return how many points each line of the curve has; fails where it is no well-formed picture."""
    (picture,) = re.findall(r"<svg.*?</svg>", shown)
    drawn = ElementTree.fromstring(picture)  # noqa: S314 - it is our own
    lines = [line for line in drawn.iter() if line.tag.endswith("polyline")]
    return [len(line.attrib["points"].split()) for line in lines]


@pytest.mark.anyio
async def test_drawing_a_run_takes_less_than_the_loop_can_spare(trainer: at.Trainer, loader: at.Loader) -> None:
    async with trainer.start(loader, epochs=60) as run:
        await run.result()
    run._repr_mimebundle_()
    took = []
    for _ in range(5):
        start = time.perf_counter()
        run._repr_mimebundle_()
        took.append(time.perf_counter() - start)
    assert min(took) < 0.005


class Output:
    """An output that fails after a while."""

    def __init__(self, lasts: int) -> None:
        self.seen: list[Mapping[str, str]] = []
        self._lasts = lasts

    def update(self, bundle: Mapping[str, str], *, raw: bool) -> None:
        if len(self.seen) == self._lasts:
            raise ConnectionError("the notebook is gone")
        self.seen.append(bundle)


@pytest.mark.anyio
async def test_outputs_keep_up_with_the_run_and_one_that_fails_is_not_the_runs_failure(
    trainer: at.Trainer, loader: at.Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asynctrain.train.run.REDRAWN", 0.001)
    whole, failing = Output(10**6), Output(1)
    async with trainer.start(loader, epochs=5) as run:
        run._outputs._handles += [whole, failing]
        history = await run.result()
    assert history.reason == "finished"
    assert len(failing.seen) == 1
    assert len(whole.seen) > 2
    assert "finished" in whole.seen[-1]["text/html"]


@pytest.mark.anyio
async def test_of_a_run_that_was_cancelled_or_has_failed_the_trainer_keeps_the_history(
    trainer: at.Trainer, loader: at.Loader
) -> None:
    assert trainer.history is None

    def fail(event: at.events.Event) -> None:
        if isinstance(event, StepEnd) and event.step == 7:
            raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        await trainer.fit(loader, epochs=3, callbacks=[fail])
    assert trainer.history is not None
    assert (trainer.history.reason, len(trainer.history.epochs), trainer.history.state.step) == ("failed", 1, 7)

    async with trainer.start(loader, epochs=3) as run:
        async for event in run:
            if isinstance(event, StepEnd) and event.step == 12:
                under_way = trainer.history
                break
    assert under_way.reason is None
    assert trainer.history.reason == "cancelled"
    assert len(trainer.history.epochs) == 2
    assert trainer.history.state.digest() == trainer.state.digest()
    whole = await trainer.fit(loader, epochs=3, state=trainer.history.state)
    assert whole == await trainer.fit(loader, epochs=3)


SETUP = """
import numpy as np, asynctrain as at
images = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 1), dtype=np.uint8)
loader = at.Loader(at.ArrayDataset(images, np.arange(40) % 2), batch_size=10, image_size=(8, 8), channels=1)
model = at.models.linear(num_classes=2, image_shape=(8, 8, 1))
trainer = at.Trainer(model, optimizer=at.optim.sgd(1e-3), executor=at.InlineExecutor())
"""
SHOWN = """
async with trainer.start(loader, epochs=10**9, seconds=1.5) as run:
    display(run)
    history = await run.result()
"""


@pytest.mark.timeout(120)
def test_in_a_kernel_a_run_is_drawn_live_and_an_interrupt_ends_it_and_keeps_its_history() -> None:
    cells = [SETUP, SHOWN, "history", "await trainer.fit(loader, epochs=10**9)", "trainer.history"]
    code = [nbformat.v4.new_code_cell(source) for source in cells]  # type: ignore[no-untyped-call]
    book = nbformat.v4.new_notebook(cells=code)  # type: ignore[no-untyped-call]
    client = NotebookClient(book, timeout=60, allow_errors=True)

    async def work() -> None:
        async with client.async_setup_kernel():
            for number in range(3):
                await client.async_execute_cell(book.cells[number], number)
            fitting = asyncio.create_task(client.async_execute_cell(book.cells[3], 3))
            await asyncio.sleep(1)
            assert client.km is not None
            await ensure_async(client.km.interrupt_kernel())
            await fitting
            await client.async_execute_cell(book.cells[4], 4)

    asyncio.run(work())
    (live,) = book.cells[1].outputs
    assert "finished" in live["data"]["text/html"], "it was replaced to the end"
    assert "<svg" in live["data"]["text/html"]
    assert "<table>" in book.cells[2].outputs[0]["data"]["text/html"]
    assert book.cells[3].outputs[-1]["output_type"] == "error"
    kept = book.cells[4].outputs[0]["data"]
    assert kept["text/plain"].startswith("<History cancelled")
    assert "<table>" in kept["text/html"]
