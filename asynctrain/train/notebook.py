"""What a run looks like in a notebook: how far it is, its losses as a curve, its epochs as a table.

While a run is under way it is drawn on the event loop, some times a second, so the curve is a handful of points in an
SVG of our own; the plots of a ``History``, which take a tenth of a second each, are matplotlib's.
"""

from __future__ import annotations

import html
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from asynctrain.train.events import EpochEnd, Evaluation
from asynctrain.train.figures import table
from asynctrain.train.progress import Progress

Points = Sequence[tuple[float, float]]

REDRAWN = 0.5  # seconds between two looks
POINTS = 200  # of a curve, at most; more cannot be told apart
WIDTH, HEIGHT, EDGE = 480, 140, 16  # pixels
COLOURS = {"training": ("#2f6db3", 130), "validation": ("#d1622b", 70)}  # and how far from the right their names are


class Curve:
    """Values over steps, thinned: where there are too many, two neighbours become their mean."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = []
        self._stride = 1  # values in a point
        self._waiting: list[tuple[float, float]] = []  # of the point to come

    def add(self, step: int, value: float) -> None:
        """Add a value; what is not finite is left out."""
        if not math.isfinite(value):
            return
        self._waiting.append((step, value))
        if len(self._waiting) >= self._stride:
            self._points.append(_mean(self._waiting))
            self._waiting = []
        if len(self._points) >= POINTS:
            self._points = [_mean(self._points[i : i + 2]) for i in range(0, POINTS, 2)]
            self._stride *= 2

    @property
    def points(self) -> Points:
        """(step, value), at most ``POINTS`` of them."""
        return [*self._points, _mean(self._waiting)] if self._waiting else list(self._points)


def _mean(points: Points) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def html_of(
    title: str,
    epochs: Sequence[EpochEnd],
    evaluations: Sequence[Evaluation],
    losses: Points,
    progress: Progress | None = None,
) -> str:
    """Return a run as HTML that needs nothing beside it.

    Args:
        title: one line.
        epochs: their ends; a row each.
        evaluations: whose losses are a curve of their own.
        losses: of the training, over the steps.
        progress: how far it is, while it is under way.
    """
    lines = {"training": losses, "validation": [(told.step, told.result.loss) for told in evaluations]}
    return f"<p>{html.escape(title)}</p>{_bar(progress)}{curves('loss', lines)}{table(epochs)}"


def _bar(progress: Progress | None) -> str:
    if progress is None:
        return ""
    place = "" if progress.steps is None else f' value="{progress.step}" max="{progress.steps}"'
    left = "" if progress.eta is None else f", {progress.eta:,.0f} s left"
    told = f"loss {progress.loss:.4f}, {progress.samples_per_second:,.0f} images/s{left}"
    return f"<div><progress{place}></progress> {html.escape(told)}</div>"


def curves(what: str, lines: Mapping[str, Points]) -> str:
    """Return ``what`` of training and validation over the steps as an ``<svg>``, with its least and greatest value.

    Nothing without points.
    """
    shown = {name: [point for point in points if math.isfinite(point[1])] for name, points in lines.items()}
    steps = [step for points in shown.values() for step, _ in points]
    values = [value for points in shown.values() for _, value in points]
    if not steps:
        return ""
    left, wide, low, high = min(steps), max(steps) - min(steps) or 1.0, min(values), max(values) - min(values) or 1.0

    def at(step: float, value: float) -> str:
        x, y = (step - left) / wide, (value - low) / high
        return f"{EDGE + x * (WIDTH - 2 * EDGE):.1f},{HEIGHT - EDGE - y * (HEIGHT - 2 * EDGE):.1f}"

    drawn = "".join(_line(name, " ".join(at(*point) for point in points)) for name, points in shown.items() if points)
    scale = _text(EDGE, EDGE - 4, f"{what} {max(values):.4g}") + _text(EDGE, HEIGHT - 4, f"{low:.4g}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-size="11" font-family="sans-serif" style="background:#fff">{drawn}{scale}</svg>'
    )


def _line(name: str, points: str) -> str:
    """Return a line with its name in its colour above the curves."""
    colour, right = COLOURS[name]
    line = f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{points}"/>'
    return line + _text(WIDTH - right, EDGE - 4, name, colour)


def _text(x: float, y: float, text: str, colour: str = "#333333") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}">{html.escape(text)}</text>'


class Handle(Protocol):
    """An output of a notebook that can be replaced: what IPython's ``display`` returns."""

    def update(self, bundle: Mapping[str, str], *, raw: bool) -> None:
        """Show ``bundle`` in its place."""
        ...


class Outputs:
    """The outputs of a notebook in which a run is seen."""

    def __init__(self) -> None:
        self._handles: list[Handle] = []

    def add(self, bundle: Mapping[str, str]) -> None:
        """Show ``bundle`` in the cell that is run; in a notebook it can be replaced, in a terminal it stays."""
        from IPython import get_ipython
        from IPython.display import display

        handle: Any = display(dict(bundle), raw=True, display_id=True)  # type: ignore[no-untyped-call]
        if getattr(get_ipython(), "kernel", None) is not None:
            self._handles.append(handle)

    def __bool__(self) -> bool:
        return bool(self._handles)

    def update(self, bundle: Mapping[str, str]) -> None:
        """Show ``bundle`` in the place of what was shown; an output that fails is given up, for it is not the run's."""
        for handle in list(self._handles):
            try:
                handle.update(dict(bundle), raw=True)
            except Exception:
                logging.getLogger("asynctrain").exception("a run can no longer be shown")
                self._handles.remove(handle)
