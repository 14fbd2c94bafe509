"""The progress display."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator

import pytest
from rich.console import Console

from asynctrain.cli.progress import show
from asynctrain.inference import EvaluationResult
from asynctrain.train.events import EpochEnd, Event, RunEnd, RunStart, SampleSkipped, StepEnd


async def three_epochs(seconds: float) -> AsyncIterator[Event]:
    """Yield the events of a run of three epochs of one step, each of which takes ``seconds``."""
    yield RunStart(epochs=3, step=0, steps=3, steps_per_epoch=1, samples_per_epoch=100, parameters=1234)
    for epoch in (1, 2, 3):
        yield StepEnd(epoch, epoch, loss=0.5, accuracy=0.75, samples=100, samples_per_second=5000.0)
        yield EpochEnd(epoch, epoch, 0.5, 0.75, 100, seconds, EvaluationResult(0.4, 0.875, 8))
    yield RunEnd("finished", 3, 3 * seconds)


async def shown(seconds: float, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None, legacy_windows=False)
    await show(three_epochs(seconds), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


async def test_a_file_gets_a_line_for_each_epoch() -> None:
    assert (await shown(2.0, terminal=False)).splitlines() == [
        "1,234 parameters, 100 training images, 3 epochs of 1 step",
        *(f"epoch {n}/3  loss 0.5000  accuracy 75.00 %  test 87.50 %  50 images/s" for n in (1, 2, 3)),
    ]


async def test_of_quick_epochs_the_first_and_the_last_are_told_and_others_at_most_once_a_second() -> None:
    lines = (await shown(0.25, terminal=False)).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["1/3", "3/3"]


async def test_a_sample_that_is_left_out_in_each_epoch_is_told_once() -> None:
    async def events() -> AsyncIterator[Event]:
        for epoch in (1, 2):
            yield SampleSkipped(epoch, 7, "rose/00.png", "is torn")

    console = Console(file=io.StringIO(), width=120)
    await show(events(), console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == "left out rose/00.png: is torn\n"


@pytest.mark.parametrize("part", ["epoch 3/3", "step 3/3", "loss 0.5000", "accuracy 75.0%", "5,000 images/s", "left"])
async def test_a_terminal_sees_epoch_step_loss_accuracy_speed_and_time_left(part: str) -> None:
    assert part in await shown(0.25, terminal=True)
