"""Pictures of a run, for light backgrounds: curves, a confusion matrix, the worst mistakes.

They are matplotlib figures that belong to the caller; nothing global is touched, so any thread may draw.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from asynctrain.train.controllers import usual_mode
from asynctrain.train.events import EpochEnd, Evaluation, StepEnd
from asynctrain.train.figures import scalars
from asynctrain.train.tiles import class_name, only_mistakes, tile

try:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('plots need matplotlib: pip install "asynctrain[plot]"', name=error.name) from error

TRAINING, VALIDATION, INK, FAINT = "#2f6db3", "#d1622b", "#333333", "#e4e4e4"
AVERAGES = ("macro", "weighted", "micro")  # of a metric over the classes: macro_f1, ...
LINES = ("-", "--", ":")
PANEL = (4.6, 3.0)  # inches
POINTS = 500  # of a curve over steps; more cannot be told apart
WRITTEN = 20  # classes, at most, whose names and numbers stand in a confusion matrix
MISTAKES = 24  # at most in a grid


class Picture(Figure):
    """A figure that notebooks show, whether or not pyplot was imported there."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def curves(epochs: Sequence[EpochEnd], evaluations: Sequence[Evaluation], steps: Sequence[StepEnd] = ()) -> Picture:
    """Return a panel for the loss, for the accuracy, and for each other metric; one for all averages of a metric.

    Args:
        epochs: their ends; what was trained on is a curve over them.
        evaluations: what was validated on is a curve over these, and its best value is marked.
        steps: if given, drawn behind the curves of the epochs.
    """
    names = {"loss": ["loss"], "accuracy": ["accuracy"], **_more(evaluations)}
    figure, panels = _panels(len(names))
    per_epoch = epochs[-1].step / epochs[-1].epoch if epochs else 0.0
    unit = per_epoch or 1.0
    for (name, shown), axes in zip(names.items(), panels, strict=True):
        axes.set_title(name, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("epoch" if per_epoch else "step", fontsize=9, color=INK)
        if name in ("loss", "accuracy"):
            _draw_steps(axes, [step.step / unit for step in steps], [getattr(step, name) for step in steps])
            _draw(axes, [e.step / unit for e in epochs], [getattr(e, name) for e in epochs], TRAINING, "training")
        for metric, line in zip(shown, LINES, strict=False):
            found = [(e.step / unit, _figure(e, metric)) for e in evaluations]
            label = "validation" if len(shown) == 1 else metric.removesuffix(f"_{name}")
            _draw(axes, [x for x, _ in found], [y for _, y in found], VALIDATION, label, line)
            _mark_best(axes, found if line == "-" else (), lowest=usual_mode(name) == "min")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return figure


def confusion_matrix(matrix: Sequence[Sequence[float]], classes: Sequence[str] = ()) -> Picture:
    """Return a matrix (K, K) of counts as colours: rows are true classes, columns predicted ones.

    A field's colour is its share of its row, so that rare classes are seen as well. Up to 20 classes the counts and
    names are written out.

    Raises:
        ValueError: ``matrix`` is not square, or ``classes`` are not as many as it has rows.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1]:
        raise ValueError(f"matrix must be (K, K) counts, got an array of shape {counts.shape}")
    if classes and len(classes) != len(counts):
        raise ValueError(f"classes must be {len(counts)} names, got {len(classes)}")
    size = len(counts)
    side = 2.2 + min(size, 2 * WRITTEN) * 0.3
    figure = Picture(figsize=(side + 0.4, side), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted", fontsize=9, color=INK)
    axes.set_ylabel("true", fontsize=9, color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    if size <= WRITTEN:
        names = [_shortened(name) for name in classes] or [str(label) for label in range(size)]
        axes.set_xticks(range(size), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(size), names)
        for (row, column), count in np.ndenumerate(counts):
            shade = "white" if shares[row, column] > 0.5 else INK
            if count:
                axes.text(column, row, f"{count:g}", ha="center", va="center", fontsize=7, color=shade)
    return figure


def mistakes(worst: Sequence[Mapping[str, Any]], classes: Sequence[str] = ()) -> Picture:
    """Return a grid of mistakes, the worst first, as images with what they are and what was seen on them. Blocks.

    Args:
        worst: mappings with ``source``, ``label``, ``predicted`` and ``loss``; the first 24 that were not predicted
            right are shown.
        classes: the names of the labels. What is no readable image file stands there by its name.
    """
    shown = only_mistakes(worst)[:MISTAKES]
    columns = max(1, min(6, len(shown)))
    rows = -(-len(shown) // columns) or 1
    figure = Picture(figsize=(1.6 * columns, 2.0 * rows), layout="constrained", facecolor="white")
    for number, mistake in enumerate(shown, start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.set_axis_off()
        pixels = tile(str(mistake["source"]))
        if pixels is None:
            axes.set_box_aspect(1)
            name = _shortened(str(mistake["source"]))
            axes.text(0.5, 0.5, name, ha="center", va="center", fontsize=7, color=INK, transform=axes.transAxes)
        else:
            axes.imshow(pixels, interpolation="nearest")
        seen, true = (_shortened(class_name(mistake[key], classes)) for key in ("predicted", "label"))
        axes.set_title(f"{seen}\nis {true}, loss {mistake['loss']:.2f}", fontsize=7, color=INK)
    return figure


def to_svg(figure: Figure) -> str:
    """Return a figure as an ``<svg>`` element, to stand within a page."""
    file = io.StringIO()
    figure.savefig(file, format="svg")
    text = file.getvalue()
    return text[text.index("<svg") :]


def _panels(count: int) -> tuple[Picture, list[Axes]]:
    columns = 2 if count in (2, 4) else 3  # loss and accuracy are always there
    rows = -(-count // columns)
    size = (PANEL[0] * columns, PANEL[1] * rows)
    figure = Picture(figsize=size, layout="constrained", facecolor="white")
    panels = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.grid(color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=8, labelcolor=INK)
    return figure, panels


def _draw(axes: Axes, x: list[float], y: list[float], colour: str, label: str, line: str = "-") -> None:
    if x:
        marker = "o" if len(x) == 1 else ""
        axes.plot(x, y, line, color=colour, linewidth=1.8, label=label, marker=marker, markersize=4)


def _draw_steps(axes: Axes, x: list[float], y: list[float]) -> None:
    """Draw a thin curve of at most 500 points, each the mean of as many steps."""
    if not x:
        return
    parts = min(POINTS, len(x))
    means = [[float(part.mean()) for part in np.array_split(np.asarray(values), parts)] for values in (x, y)]
    axes.plot(*means, color=TRAINING, linewidth=0.8, alpha=0.35)


def _mark_best(axes: Axes, found: Sequence[tuple[float, float]], lowest: bool) -> None:
    finite = [(x, y) for x, y in found if np.isfinite(y)]
    if len(finite) < 2:
        return
    x, y = min(finite, key=lambda point: point[1] if lowest else -point[1])
    axes.plot([x], [y], "o", markersize=6, markerfacecolor="white", markeredgecolor=VALIDATION, label=f"best, {y:.4g}")


def _more(evaluations: Sequence[Evaluation]) -> dict[str, list[str]]:
    """Return which metrics that are numbers each panel shows, besides loss and accuracy."""
    panels: dict[str, list[str]] = {}
    for metric in dict.fromkeys(name for event in evaluations for name in scalars(event.result.metrics)):
        average, _, name = metric.partition("_")
        panels.setdefault(name if average in AVERAGES else metric, []).append(metric)
    return panels


def _figure(event: Evaluation, name: str) -> float:
    figures = {"loss": event.result.loss, "accuracy": event.result.accuracy, **scalars(event.result.metrics)}
    return figures.get(name, float("nan"))


def _shortened(name: str, length: int = 16) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
