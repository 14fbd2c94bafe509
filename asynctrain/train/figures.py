"""The figures of epochs and evaluations: as rows, as CSV, as a table of HTML, and the best of them."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

from asynctrain.train.controllers import Mode, is_better, monitored, usual_mode
from asynctrain.train.events import EpochEnd, Evaluation

Row = Mapping[str, float]


def best_of(epochs: Sequence[EpochEnd], monitor: str, mode: Mode | None = None) -> EpochEnd:
    """Return the epoch with the best ``monitor``; see ``History.best``."""
    best, value = None, None
    for epoch in epochs:
        found = monitored(epoch, monitor)
        if found is not None and is_better(found, value, mode or usual_mode(monitor)):
            best, value = epoch, found
    if best is None:
        raise ValueError(f"of {len(epochs)} epochs none has a {monitor} that could be the best")
    return best


def last_metric(evaluations: Sequence[Evaluation], metric: str) -> Any:
    """Return what the last evaluation that has it found as ``metric``, or None."""
    for evaluation in reversed(evaluations):
        if evaluation.result.metrics.get(metric) is not None:
            return evaluation.result.metrics[metric]
    return None


def row_of(epoch: EpochEnd) -> Row:
    """Return the figures of an epoch by the names that ``monitor`` has for them; what is no number is left out."""
    row: dict[str, float] = {
        "epoch": epoch.epoch,
        "step": epoch.step,
        "samples": epoch.samples,
        "seconds": epoch.seconds,
        "loss": epoch.loss,
        "accuracy": epoch.accuracy,
    }
    if epoch.validation is not None:
        row |= {"validation.loss": epoch.validation.loss, "validation.accuracy": epoch.validation.accuracy}
        row |= {f"validation.{name}": value for name, value in scalars(epoch.validation.metrics).items()}
    return row


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return those metrics that are a single number; NaN comes back from a file as None."""
    return {
        name: float("nan") if value is None else value
        for name, value in metrics.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }


def csv_of(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows as CSV; a column for each name that any of them has, in the order in which they come."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(epochs: Sequence[EpochEnd]) -> str:
    """Return an HTML table with a row for each epoch."""
    rows = [row_of(epoch) for epoch in epochs]
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    cells = [[as_text(row[name]) if name in row else "" for name in names] for row in rows]
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>" if rows else ""


def as_text(value: float) -> str:
    """Return a figure as people read it."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
