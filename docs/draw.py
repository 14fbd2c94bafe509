"""Draws the pictures of the documentation: ``python docs/draw.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

PICTURES = Path(__file__).parent / "pictures"
INK, STAGE, QUEUE, OUTSIDE = "#1f2933", "#d9e8fb", "#fff3d6", "#eef1f4"


def pipeline() -> None:
    """Draw the stages of a loader, the queues between them, and what runs where."""
    figure, axes = plt.subplots(figsize=(11, 3.6))
    axes.set(xlim=(0, 110), ylim=(0, 36))
    axes.axis("off")
    _box(axes, 1, 14, 11, 9, "source", "positions of\nthe epoch,\nin chunks", OUTSIDE)
    stages = (
        ("read", "one hop to a\nthread per chunk,\nor fetched on\nthe loop"),
        ("decode", "a hop per chunk:\ninto the batch's\nmemory, in place;\ncache, augment"),
        ("assemble", "full batches,\nbad samples left\nout; mixup"),
    )
    left = 18.0
    for name, told in stages:
        _queue(axes, left - 4.6, 18.5)
        _box(axes, left, 11, 17, 15, name, told, STAGE)
        left += 25
    _queue(axes, left - 5, 18.5)
    axes.text(left - 3.4, 12.4, "prefetch", ha="center", fontsize=8, color=INK)
    _box(axes, left, 14, 12, 9, "your loop", "async for\nbatch in batches", OUTSIDE)
    axes.add_patch(
        FancyArrowPatch(
            (left + 6, 13),
            (9, 13),
            connectionstyle="arc3,rad=-0.22",
            arrowstyle="-|>",
            mutation_scale=12,
            color="#9aa5b1",
            linestyle="--",
        )
    )
    axes.text(
        54, 1.2, "back-pressure: a full queue makes the stage before it wait", ha="center", fontsize=8.5, color=INK
    )
    axes.text(
        54,
        32,
        "each stage is one coroutine between two bounded queues; what travels is a chunk, in order",
        ha="center",
        fontsize=9.5,
        color=INK,
    )
    _save(figure, "pipeline")


def _box(axes: Axes, x: float, y: float, width: float, height: float, title: str, told: str, colour: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            height,
            boxstyle="round,pad=0.4,rounding_size=1.2",
            facecolor=colour,
            edgecolor=INK,
            linewidth=1.1,
        )
    )
    axes.text(x + width / 2, y + height - 1.6, title, ha="center", va="center", fontsize=10.5, weight="bold", color=INK)
    axes.text(x + width / 2, (y + y + height - 3.2) / 2, told, ha="center", va="center", fontsize=8, color=INK)


def _queue(axes: Axes, x: float, y: float) -> None:
    for place in range(3):
        axes.add_patch(Rectangle((x + 1.1 * place, y - 1.4), 1.0, 2.8, facecolor=QUEUE, edgecolor=INK, linewidth=0.8))


def _save(figure: Figure, name: str) -> None:
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "asynctrain"
    pipeline()
