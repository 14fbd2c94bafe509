"""The progress display, in a notebook and without one; what a terminal sees is in tests/cli/test_progress.py."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

import asynctrain as at
from asynctrain.train.display import Display, NotebookView, TerminalView
from asynctrain.train.events import EpochEnd, Paused, Resumed, RunEnd, RunStart, StepEnd

START = RunStart(epochs=None, step=0, steps=None, steps_per_epoch=None, samples_per_epoch=None, parameters=1234)
STEP = StepEnd(1, 1, loss=0.5, accuracy=0.75, samples=100, samples_per_second=5000.0)


class Output:
    """The output of a cell, as IPython offers it: ``display(content, raw=True, display_id=True).update(content)``."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    def __call__(self, content: dict[str, str], *, raw: bool, display_id: bool) -> Output:
        assert display_id
        self.update(content, raw=raw)
        return self

    def update(self, content: dict[str, str], *, raw: bool) -> None:
        assert raw
        self.seen.append(content)

    @property
    def html(self) -> str:
        return self.seen[-1]["text/html"]


def notebook(now: Any) -> tuple[Output, Display]:
    output = Output()
    return output, Display(NotebookView(output, now))


def test_a_notebook_sees_a_bar_that_moves_and_at_the_end_the_lines_alone() -> None:
    output, display = notebook(iter(range(100)).__next__)
    display(RunStart(epochs=1, step=0, steps=4, steps_per_epoch=4, samples_per_epoch=400, parameters=1234))
    display(STEP)
    assert '<progress value="1" max="4"></progress>' in output.html
    assert "epoch 1/1" in output.html
    assert "step 1/4  loss 0.5000  accuracy 75.0%  5,000 images/s" in output.html
    display(EpochEnd(1, 4, 0.5, 0.75, 400, 1.0, at.EvaluationResult(0.4, 0.875, 8)))
    display(RunEnd("finished", 4, 1.0))
    assert "<progress" not in output.html
    assert output.seen[-1]["text/plain"].splitlines() == [
        "1,234 parameters, 400 training images, 1 epoch of 4 steps",
        "epoch 1/1  loss 0.5000  accuracy 75.00 %  test 87.50 %  400 images/s",
    ]


def test_a_notebook_is_redrawn_at_most_four_times_a_second() -> None:
    clock = iter(number / 100 for number in range(10_000))
    output, display = notebook(clock.__next__)
    display(START)
    for _ in range(200):  # two seconds, as each look at the clock is a hundredth later
        display(STEP)
    assert 7 <= len(output.seen) <= 10


def test_a_run_whose_end_nobody_knows_is_shown_without_it() -> None:
    output, display = notebook(iter(range(100)).__next__)
    display(START)
    display(STEP)
    assert "<progress></progress> step 1  loss" in output.html
    assert output.seen[-1]["text/plain"] == "1,234 parameters"


def test_a_terminal_shows_a_run_whose_end_nobody_knows() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None, legacy_windows=False)
    display = Display(TerminalView(console))
    display(START)
    display(STEP)
    display.close()
    assert "epoch 1 " in file.getvalue()
    assert "step 1  loss 0.5000" in file.getvalue()


def test_pauses_are_told() -> None:
    file = io.StringIO()
    display = Display(TerminalView(Console(file=file, width=120)))
    for event in (START, Paused(7), Resumed(7), RunEnd("finished", 7, 1.0)):
        display(event)
    assert file.getvalue().splitlines()[1:] == ["paused after step 7", "going on after step 7"]


async def test_the_progress_bar_tells_standard_error_and_nothing_else(
    loader: at.Loader, model: at.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    async with at.ThreadExecutor(1) as executor:
        trainer = at.Trainer(model, optimizer=at.optim.adam(1e-2), executor=executor)
        await trainer.fit(loader, epochs=2, callbacks=[at.callbacks.ProgressBar()])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert [line.split()[:2] for line in printed.err.splitlines()[1:]] == [["epoch", "1/2"], ["epoch", "2/2"]]
