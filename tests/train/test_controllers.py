"""Controllers decide about a run, and a resumed run as one that was never stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import asynctrain as at
from asynctrain.inference import EvaluationResult
from asynctrain.optim import Optimizer
from asynctrain.train.controllers import Controller, Decision, EarlyStopping, ReduceOnPlateau, monitored
from asynctrain.train.events import EpochEnd, Event, StepEnd
from asynctrain.train.trainer import Options
from asynctrain.types import JSON

pytestmark = pytest.mark.one_loop


def epoch_end(loss: float, validation: float | None = None, **metrics: float) -> EpochEnd:
    found = None if validation is None else EvaluationResult(validation, 1 - validation, 10, metrics)
    return EpochEnd(1, 1, loss, 0.5, 10, 0.0, found)


def decisions(controller: Controller, losses: list[float]) -> list[Decision]:
    state, made = controller.begin(), []
    for loss in losses:
        state, decision = controller.update(state, epoch_end(1.0, loss))
        made.append(decision)
    return made


def test_early_stopping_waits_for_its_patience_and_keeps_each_best() -> None:
    made = decisions(EarlyStopping(patience=2), [0.5, 0.4, 0.4, 0.41])
    assert [decision.keep_best for decision in made] == [True, True, False, False]
    assert [bool(decision.stop) for decision in made] == [False, False, False, True]
    assert made[-1].restore_best
    assert made[-1].stop == "validation.loss has not become better than 0.4 for 2 epochs"


def test_a_gain_below_min_delta_does_not_count() -> None:
    made = decisions(EarlyStopping(patience=2, min_delta=0.05), [0.5, 0.46, 0.44])
    assert [decision.keep_best for decision in made] == [True, False, True]


def test_a_loss_that_is_no_number_is_never_better() -> None:
    made = decisions(EarlyStopping(patience=2), [0.5, math.nan, math.nan])
    assert made[-1].stop


def test_a_plateau_scales_again_and_again_down_to_the_smallest_share() -> None:
    made = decisions(ReduceOnPlateau(factor=0.1, patience=2, smallest=0.01), [0.5] * 9)
    assert [decision.scale_learning_rate for decision in made] == [1, 1, 0.1, 1, 0.1, 1, 1, 1, 1]


def test_more_is_better_for_accuracy_and_other_metrics_than_losses() -> None:
    controller = EarlyStopping(monitor="validation.f1", patience=1)
    state, first = controller.update(controller.begin(), epoch_end(1.0, 0.5, f1=0.3))
    state, second = controller.update(state, epoch_end(1.0, 0.5, f1=0.4))
    assert first.keep_best
    assert second.keep_best


def test_an_unknown_monitor_is_told_with_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"monitor must be one of loss, accuracy, validation.loss, .*validation.f1 .*, got"
    ):
        monitored(epoch_end(1.0, 0.5, f1=0.3), "validation.auc")


@pytest.mark.parametrize(
    ("arguments", "message"), [({"patience": 0}, "patience must be at least 1"), ({"min_delta": -1}, "min_delta")]
)
def test_arguments_out_of_range_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyStopping(**arguments)


class Scripted:
    """Decides at given steps."""

    name = "scripted"

    def __init__(self, script: dict[int, Decision]) -> None:
        self.script = script

    def begin(self) -> JSON:
        return {"seen": 0}

    def update(self, state: JSON, event: Event) -> tuple[JSON, Decision]:
        if not isinstance(event, StepEnd):
            return state, Decision()
        return {"seen": state["seen"] + 1}, self.script.get(event.step, Decision())


def trainer(model: at.Model, executor: at.Executor, optimizer: Optimizer | None = None) -> at.Trainer:
    optimizer = optimizer or at.optim.sgd(0.05, momentum=0.9)
    return at.Trainer(model, optimizer=optimizer, executor=executor, microbatch=12)


async def test_a_scaled_learning_rate_holds_from_the_next_step_on(model: at.Model, loader: at.Loader) -> None:
    async with at.InlineExecutor() as executor:
        scaled = await trainer(model, executor).fit(
            loader, steps=9, controllers=[Scripted({4: Decision(scale_learning_rate=0.5)})]
        )
        half = at.optim.sgd(at.optim.stepwise(0.05, (4,), 0.5), momentum=0.9)
        by_schedule = await trainer(model, executor, optimizer=half).fit(loader, steps=9)
    assert scaled.state.learning_rate_scale == 0.5
    assert scaled.state.digest() == by_schedule.state.digest()


async def test_stopped_by_a_controller_a_run_ends_with_the_weights_that_were_kept(
    model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    script = {3: Decision(keep_best=True), 7: Decision(stop="enough", restore_best=True)}
    async with at.ThreadExecutor(2) as executor:
        history = await trainer(model, executor).fit(loader, epochs=9, controllers=[Scripted(script)])
        third = await trainer(model, executor).fit(loader, steps=3)
    assert (history.reason, history.state.step) == ("stopped", 7)
    assert history.state.digest() == third.state.digest()
    assert history.state.controllers == {"scripted": {"seen": 7}}


@pytest.mark.parametrize("stopped_at", range(1, 12, 2))
async def test_resumed_anywhere_a_run_under_controllers_has_the_bits_and_the_history_of_one_never_stopped(
    model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, tmp_path: Path, stopped_at: int
) -> None:
    controllers: list[Controller] = [
        ReduceOnPlateau(patience=1, min_delta=0.3),
        EarlyStopping(patience=2, min_delta=0.25),
    ]
    options: Options = {"epochs": 20, "validate": blobs, "controllers": controllers}
    in_folder: Options = {**options, "run_dir": tmp_path}
    async with at.ThreadExecutor(2) as executor, at.InlineExecutor() as inline:
        whole = await trainer(model, executor).fit(loader, **options)
        async with trainer(model, executor).start(loader, **in_folder) as run:
            async for event in run:
                if isinstance(event, StepEnd) and event.step == stopped_at:
                    break
            await run.cancel()
        rest = await trainer(model, inline).resume(tmp_path, loader, **options)
    assert whole.reason == "stopped", "the test is about a run that ends early"
    assert whole.state.learning_rate_scale < 1
    assert rest == whole
    assert rest.state.digest() == whole.state.digest()
    for slot, arena in whole.state.optimizer_state.items():
        np.testing.assert_array_equal(rest.state.optimizer_state[slot].vector, arena.vector)


async def test_a_run_that_early_stopping_ended_goes_on_with_more_patience_and_stays_ended_with_the_same(
    model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, tmp_path: Path
) -> None:
    def options(patience: int, epochs: int) -> Options:
        impatient = EarlyStopping(patience=patience, min_delta=10.0)  # nothing is ever that much better
        return {"epochs": epochs, "validate": blobs, "controllers": [impatient], "resume": tmp_path}

    async with at.InlineExecutor() as executor:
        begin: Options = {**options(2, 9), "resume": None, "run_dir": tmp_path}
        ended = await trainer(model, executor).fit(loader, **begin)
        again = await trainer(model, executor).fit(loader, **options(2, 9))
        further = await trainer(model, executor).fit(loader, **options(5, 6))
    assert (ended.reason, len(ended.epochs)) == ("stopped", 3)
    assert again == ended
    assert (further.reason, len(further.epochs)) == ("stopped", 6)
