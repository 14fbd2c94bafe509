"""What a run leaves: figures by name, tables, plots, and all of it again from its folder."""

from __future__ import annotations

import asyncio
import csv
import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import asynctrain as at
from asynctrain.errors import CheckpointError
from asynctrain.train import plots
from asynctrain.train.events import EpochEnd, Evaluation, StepEnd

pytestmark = pytest.mark.one_loop

WORST = [{"source": "array[3]", "label": 0, "predicted": 1, "loss": 2.5}]


def evaluation(loss: float, metrics: dict[str, Any] | None = None) -> at.EvaluationResult:
    return at.EvaluationResult(loss, 1 - loss / 4, 60, metrics or {})


def history_of(losses: list[float], metrics: dict[str, Any] | None = None) -> at.History:
    """Return a history of epochs of five steps with ``losses`` on the validation data."""
    events: list[EpochEnd | Evaluation] = []
    for number, loss in enumerate(losses, start=1):
        result = evaluation(loss, metrics)
        events.append(Evaluation(number, 5 * number, result, 0.1))
        events.append(EpochEnd(number, 5 * number, loss / 2, 0.5, 180, 1.5, result))
    program = at.Program({"input_shape": [1], "layers": []}, "softmax_cross_entropy", at.Normalization(), "float32", 0)
    empty = at.TrainState(program, at.nn.Model([at.nn.Flatten()], (1, 1, 1)).init(0, "float32"), {})
    return at.History(empty, tuple(events), "finished", 180 * len(losses), 3.0, 60.0)


async def train(model: at.Model, loader: at.Loader, blobs: at.ArrayDataset, run_dir: Path) -> at.History:
    async with at.ThreadExecutor(1) as executor:
        trainer = at.Trainer(model, optimizer=at.optim.adam(1e-2), executor=executor)
        return await trainer.fit(loader, epochs=3, validate=blobs, run_dir=run_dir)


# The best epoch


@pytest.mark.parametrize(
    ("monitor", "mode", "epoch"),
    [
        ("validation.loss", None, 2),
        ("validation.loss", "max", 3),
        ("validation.accuracy", None, 2),
        ("loss", None, 2),
        ("validation.top_5", None, 1),
    ],
)
def test_the_best_epoch_is_that_of_the_lowest_loss_or_the_highest_other_figure(
    monitor: str, mode: Any, epoch: int
) -> None:
    assert history_of([2.0, 1.0, 3.0, 1.0], {"top_5": 0.5}).best(monitor, mode).epoch == epoch


def test_nan_is_never_the_best() -> None:
    assert history_of([math.nan, 2.0]).best().epoch == 2
    with pytest.raises(ValueError, match=r"of 1 epochs none has a validation\.loss"):
        history_of([math.nan]).best()


def test_epochs_before_the_first_evaluation_do_not_count_for_the_best() -> None:
    history = history_of([1.0])
    early = EpochEnd(1, 5, 9.0, 0.5, 180, 1.5, None)
    later = EpochEnd(2, 10, 9.0, 0.5, 180, 1.5, evaluation(3.0))
    assert at.History(history.state, (early, later), "finished", 360, 3.0, 60.0).best().epoch == 2


def test_a_monitor_that_is_not_there_is_refused_by_the_names_of_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"one of loss, accuracy, .* got 'validation\.f1'"):
        history_of([1.0]).best("validation.f1")


# Tables


def test_rows_hold_the_figures_of_each_epoch_and_no_lists() -> None:
    (row,) = history_of([2.0], {"top_5": 0.5, "confusion": [[1]]}).to_rows()
    assert row == {
        "epoch": 1,
        "step": 5,
        "samples": 180,
        "seconds": 1.5,
        "loss": 1.0,
        "accuracy": 0.5,
        "validation.loss": 2.0,
        "validation.accuracy": 0.5,
        "validation.top_5": 0.5,
    }


def test_csv_gives_the_rows_back_to_the_last_bit(tmp_path: Path) -> None:
    history = history_of([1 / 3, 2 / 3])
    history.to_csv(tmp_path / "history.csv")
    with (tmp_path / "history.csv").open(newline="") as file:
        read = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert read == history.to_rows()


def test_a_notebook_shows_a_table_of_the_epochs_and_their_curves() -> None:
    shown = history_of([2.0, 1.0])._repr_mimebundle_()["text/html"]
    assert shown.count("<tr>") == 3
    assert "<th>validation.loss</th>" in shown
    assert "<svg" in shown


def test_without_matplotlib_a_notebook_shows_the_table_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "asynctrain.train.plots", raising=False)
    monkeypatch.delattr("asynctrain.train.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    shown = history_of([2.0, 1.0])._repr_mimebundle_()
    assert shown["text/html"].count("<tr>") == 3
    assert "<svg" not in shown["text/html"]
    assert shown["text/plain"].startswith("<History")


# From a folder


async def test_a_loaded_history_is_the_one_that_the_run_returned(
    tmp_path: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    history = await train(model, loader, blobs, tmp_path / "run")
    loaded = await asyncio.to_thread(at.History.load, tmp_path / "run")
    assert loaded == history
    assert loaded.state.digest() == history.state.digest()
    assert loaded.seconds == history.seconds
    assert loaded.samples_per_second == pytest.approx(history.samples_per_second)


async def test_a_loaded_history_has_the_weights_that_early_stopping_restored(
    tmp_path: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    async with at.ThreadExecutor(1) as executor:
        spoiling = at.optim.sgd(lambda step: 0.05 if step < 10 else 5.0)
        trainer = at.Trainer(model, optimizer=spoiling, executor=executor)
        patient = at.EarlyStopping("validation.loss", patience=1)
        history = await trainer.fit(loader, epochs=9, validate=blobs, controllers=[patient], run_dir=tmp_path / "run")
    loaded = await asyncio.to_thread(at.History.load, tmp_path / "run")
    assert loaded.reason == "stopped"
    assert loaded.state.digest() == history.state.digest()


async def test_the_history_of_a_run_that_was_killed_has_no_reason_and_its_folder_stays_as_it_was(
    tmp_path: Path, model: at.Model, loader: at.Loader, blobs: at.ArrayDataset
) -> None:
    history = await train(model, loader, blobs, tmp_path / "run")
    told = tmp_path / "run" / "history.jsonl"
    torn = b"\n".join(told.read_bytes().splitlines()[:-1]) + b'\n{"event": "RunE'
    told.write_bytes(torn)
    loaded = await asyncio.to_thread(at.History.load, tmp_path / "run")
    assert loaded.reason is None
    assert "without an end" in repr(loaded)
    assert loaded.events == history.events
    assert told.read_bytes() == torn


def test_a_folder_without_a_run_or_without_a_checkpoint_has_no_history(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="this folder holds no run"):
        at.History.load(tmp_path)
    (tmp_path / "config.toml").write_text("")
    with pytest.raises(CheckpointError, match="this run has no checkpoint yet"):
        at.History.load(tmp_path)


# Plots


def test_the_curves_are_the_figures_over_the_epochs() -> None:
    figure = history_of([2.0, 1.0, 3.0], {"top_5": 0.5, "confusion": [[1]]}).plot()
    loss, accuracy, top_5 = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "accuracy", "top_5"]
    drawn = {str(line.get_label()): np.asarray(line.get_xydata()).tolist() for line in loss.lines}
    assert drawn == {
        "training": [[1, 1.0], [2, 0.5], [3, 1.5]],
        "validation": [[1, 2.0], [2, 1.0], [3, 3.0]],
        "best, 1": [[2, 1.0]],
    }
    assert [str(line.get_label()) for line in accuracy.lines][-1] == "best, 0.75"
    assert [str(line.get_label()) for line in top_5.lines] == ["validation", "best, 0.5"]


def test_the_averages_of_a_metric_share_a_panel() -> None:
    metrics = {"macro_f1": 0.5, "weighted_f1": 0.625, "micro_f1": 0.75}
    f1 = history_of([2.0, 1.0], metrics).plot().axes[2]
    assert f1.get_title(loc="left") == "f1"
    drawn = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in f1.lines}
    assert drawn == {"macro": [0.5, 0.5], "best, 0.5": [0.5], "weighted": [0.625, 0.625], "micro": [0.75, 0.75]}


def test_mistakes_of_several_labels_name_all_of_them() -> None:
    worst = [{"source": "array[3]", "label": [0, 2], "predicted": [], "loss": 2.5}]
    (axes,) = history_of([1.0], {"worst": worst}).plot_mistakes(("rose", "tulip", "daisy")).axes
    assert axes.get_title() == "none\nis rose, daisy, loss 2.50"


def test_a_curve_of_many_steps_is_drawn_by_the_means_of_parts_of_it() -> None:
    steps = [StepEnd(1, step, float(step % 2), 0.5, 8, 1.0) for step in range(1, 10_001)]
    loss = plots.curves([], [], steps).axes[0]
    (line,) = loss.lines
    assert len(np.asarray(line.get_xydata())) == plots.POINTS
    assert np.allclose(line.get_ydata(), 0.5)
    assert loss.get_xlabel() == "step"


def test_a_confusion_matrix_is_coloured_by_the_share_of_each_true_class() -> None:
    figure = history_of([1.0], {"confusion": [[8, 2, 0], [0, 1, 1], [0, 0, 0]]}).plot_confusion(("a", "b", "c"))
    (axes,) = figure.axes
    assert np.asarray(axes.images[0].get_array()).tolist() == [[0.8, 0.2, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 0.0]]
    assert [text.get_text() for text in axes.texts] == ["8", "2", "1", "1"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("matrix", "classes", "message"),
    [([[1, 2]], (), r"matrix must be \(K, K\) counts"), ([[1]], ("a", "b"), "classes must be 1 names, got 2")],
)
def test_what_is_no_confusion_matrix_is_refused(
    matrix: list[list[float]], classes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        plots.confusion_matrix(matrix, classes)


def test_mistakes_are_shown_as_images_where_they_are_files_and_by_name_where_not(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "red.png")
    file = {"source": str(tmp_path / "red.png"), "label": 1, "predicted": 0, "loss": 3.25}
    picture, name = history_of([1.0], {"worst": [file, *WORST]}).plot_mistakes(("rose", "tulip")).axes
    assert picture.get_title() == "rose\nis tulip, loss 3.25"
    pixels = np.asarray(picture.images[0].get_array())
    assert pixels[48, 48].tolist() == [255, 0, 0]  # all of the image, in its proportions, on white
    assert pixels[4, 48].tolist() == [255, 255, 255]
    assert [text.get_text() for text in name.texts] == ["array[3]"]
    assert name.get_title() == "tulip\nis rose, loss 2.50"


def test_plots_of_metrics_that_nobody_asked_for_say_so() -> None:
    with pytest.raises(ValueError, match="no evaluation of this run has the metric 'confusion'"):
        history_of([1.0]).plot_confusion()


def test_a_notebook_shows_a_plot_without_pyplot() -> None:
    with Image.open(io.BytesIO(history_of([2.0, 1.0]).plot()._repr_png_())) as image:
        assert image.format == "PNG"
        assert image.width > 500
