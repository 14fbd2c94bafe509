"""Draws the pictures of the documentation: ``python docs/draw.py``; the house is drawn by ``house.py``."""

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


def run_states() -> None:
    """Draw what can become of a run, and what brings it there."""
    figure, axes = plt.subplots(figsize=(11, 6.4))
    axes.set(xlim=(0, 118), ylim=(0, 68))
    axes.axis("off")
    _box(axes, 1, 35, 18, 10, "starting", "fit(...), start(...)\nchecks, reads the\ncheckpoint to resume", OUTSIDE)
    _box(axes, 35, 35, 20, 10, "running", "step after step; evaluates,\ntells events", STAGE)
    _box(axes, 35, 55, 20, 10, "paused", "between two steps;\nthe homes stay open", STAGE)
    _box(axes, 35, 16, 20, 10, "a checkpoint", "is written in a thread,\nbeside the training", QUEUE)
    _box(axes, 69, 35, 18, 10, "closing", "saves the last step\nthat was applied,\ntells RunEnd", STAGE)
    ends = (
        ("finished", "a limit is reached", 56.5),
        ("stopped", "stop(), a controller", 44.5),
        ("cancelled", "cancel(), a timeout,\nthe block is left", 30.5),
        ("failed", "any error; it is raised", 18.5),
    )
    for name, told, y in ends:
        _box(axes, 98, y, 18, 7.5, name, told, OUTSIDE)
        _arrow(axes, (87.7, 40), (97.3, y + 3.7))
    _box(axes, 61, 17, 18, 8, "killed", "SIGKILL, power cut:\nno RunEnd", "#f8d9d5")
    _box(axes, 1, 0.8, 115, 7, "run_dir", "config.toml    history.jsonl    checkpoints/    model.safetensors", QUEUE)
    _arrow(axes, (19.7, 40), (34.3, 40), "RunStart")
    _arrow(axes, (55.7, 40), (68.3, 40), "its end, or\nan error, or\na cancellation")
    _arrow(axes, (42, 45.7), (42, 54.3), "pause()\nPaused", side=-1)
    _arrow(axes, (48, 54.3), (48, 45.7), "resume()\nResumed", side=1)
    _arrow(axes, (55.7, 58), (73, 45.7), "stop(), cancel()", side=1, dashed=True)
    _arrow(axes, (45, 34.3), (45, 26.7), "checkpoint(), a step,\nan epoch, the clock", side=-1)
    _arrow(axes, (45, 15.3), (45, 8.5), "CheckpointSaved", side=-1)
    _arrow(axes, (54, 34.3), (65, 25.7), dashed=True)
    _arrow(axes, (10, 8.5), (10, 34.3), "resume=run_dir:\na new attempt, Resumed", side=1, dashed=True)
    _arrow(axes, (84, 34.3), (84, 8.5), "the last\ncheckpoint", side=1)
    _save(figure, "run_states")


def run_verbs() -> None:
    """Draw when what is asked of a run takes effect: steps from left to right, a line for each verb."""
    figure, axes = plt.subplots(figsize=(11, 4.4))
    axes.set(xlim=(0, 118), ylim=(0, 48))
    axes.axis("off")
    asked, first, width = 50.0, 18.0, 24.0
    ends = [first + width * step for step in range(1, 5)]
    axes.plot([asked, asked], [1, 43], color="#c0392b", linewidth=1.2, linestyle=":")
    axes.text(asked, 44.5, "asked here, in step 8", ha="center", fontsize=9, color="#c0392b")
    verbs = ("snapshot()", "pause()", "checkpoint()", "stop()", "cancel()")
    for line, verb in enumerate(verbs):
        y = 36 - 8.2 * line
        axes.text(1, y + 2, verb, fontsize=10, weight="bold", color=INK, va="center")
        steps = {"pause()": 2, "stop()": 2, "cancel()": 2}.get(verb, 4)
        for step in range(steps):
            end = asked + 2 if verb == "cancel()" and step == 1 else ends[step]
            _step(axes, ends[step] - width, y, end, f"step {7 + step}", given_up=end != ends[step])
    _told(axes, asked + 0.8, 37.2, "returns at once, with the weights after step 7", above=True)
    _told(axes, ends[1] + 1.5, 29.8, "waits; 8 steps are done; resume() goes on with step 9")
    axes.add_patch(Rectangle((ends[1], 16.9), 34, 2.4, facecolor=QUEUE, edgecolor=INK, linewidth=0.8))
    axes.text(ends[1] + 17, 18.05, "the file of step 8 is written", ha="center", va="center", fontsize=7, color=INK)
    _told(axes, ends[1] + 1.5, 13.4, "saves step 8, ends, returns the History")
    _told(axes, asked + 4, 5.2, "gives step 8 up within a layer's kernel, saves step 7")
    _save(figure, "run_verbs")


def bits() -> None:
    """Draw what the bits of a trained model depend on, and what they do not."""
    figure, axes = plt.subplots(figsize=(11, 3))
    axes.set(xlim=(0, 118), ylim=(0, 31))
    axes.axis("off")
    _box(
        axes,
        2,
        3,
        31,
        25,
        "the bits depend on",
        "seeds of trainer and loader\nfiles, their order and labels\nmodel, loss, optimizer, dtype\n"
        "batch size and microbatch size\nresize, augmentation, mixing\ndecoder and its version\n"
        "numpy, BLAS, CPU features",
        STAGE,
    )
    _box(axes, 46, 10.5, 22, 10, "training", "a pure function\nof what is on the left", QUEUE)
    _box(
        axes,
        82,
        3,
        33,
        25,
        "and not on",
        "kind of executor, number of workers\nsplit by microbatches or layers\nwho is done first, retries\n"
        "threads, processes, chunks, caches of\nthe loader; the event loop\npauses, stops, kills, resumes\n"
        "listeners, callbacks, snapshots",
        OUTSIDE,
    )
    _arrow(axes, (33.8, 15.5), (45.2, 15.5))
    axes.plot([69, 81], [15.5, 15.5], color="#9aa5b1", linestyle="--")
    axes.plot([73.5, 76.5], [13.5, 17.5], color="#c0392b", linewidth=2)
    axes.plot([73.5, 76.5], [17.5, 13.5], color="#c0392b", linewidth=2)
    _save(figure, "bits")


def flow() -> None:
    """Draw the way of the data, from files to the next state, and the only way back."""
    figure, axes = plt.subplots(figsize=(11, 5.4))
    axes.set(xlim=(0, 118), ylim=(0, 58))
    axes.axis("off")
    _box(axes, 1, 42, 15, 12, "Dataset", "what there is:\npaths, labels", OUTSIDE)
    _box(axes, 24, 42, 18, 12, "Sampler", "the order, a pure\nfunction of seed\nand epoch", STAGE)
    _box(axes, 50, 42, 20, 12, "Loader", "read, decode, augment,\nassemble, between\nbounded queues", STAGE)
    _box(axes, 78, 42, 17, 12, "Batch", "uint8 images, labels,\nand its Cursor", OUTSIDE)
    _box(axes, 103, 42, 14, 12, "cut", "into M\nmicrobatches", STAGE)
    for start, end in ((16.7, 23.3), (42.7, 49.3), (70.7, 77.3), (95.7, 102.3)):
        _arrow(axes, (start, 48), (end, 48))
    _arrow(axes, (110, 41.3), (110, 37))
    told = "each microbatch forward and backward,\non a Session of an Executor:\nthreads, processes, other machines"
    _box(axes, 84, 25, 33, 11, "compute", told, "#e2f0d9")
    _arrow(axes, (83.3, 30.5), (78.7, 30.5))
    _box(
        axes,
        56,
        25,
        22,
        11,
        "gather, reduce",
        "layer by layer, in the\norder of microbatches,\nwhoever was first",
        STAGE,
    )
    _arrow(axes, (55.3, 30.5), (50.7, 30.5))
    _box(axes, 29, 25, 21, 11, "update", "clipping; finite or an\nerror; the optimizer,\nlayer by layer", STAGE)
    _arrow(axes, (28.3, 30.5), (23.7, 30.5))
    _box(axes, 1, 25, 22, 11, "TrainState", "params, statistics,\noptimizer, controllers,\nstep, cursor: frozen", QUEUE)
    _arrow(axes, (12, 24.3), (12, 17.7))
    _box(axes, 1, 6, 22, 11, "for you", "events, checkpoints,\nsnapshots, progress", OUTSIDE)
    back = FancyArrowPatch(
        (20, 24.3), (99, 24.3), connectionstyle="arc3,rad=0.2", arrowstyle="-|>", mutation_scale=12, color="#c0392b"
    )
    axes.add_patch(back)
    axes.text(60, 9, "broadcast(params, version): the only way back", ha="center", fontsize=9, color="#c0392b")
    _save(figure, "flow")


def _step(axes: Axes, start: float, y: float, end: float, name: str, given_up: bool) -> None:
    colour = "#f8d9d5" if given_up else STAGE
    axes.add_patch(Rectangle((start, y), end - start, 4, facecolor=colour, edgecolor=INK, linewidth=0.8))
    axes.text((start + end) / 2, y + 2, name, ha="center", va="center", fontsize=8, color=INK)


def _told(axes: Axes, x: float, y: float, text: str, above: bool = False) -> None:
    axes.text(x, y + 4.2 if above else y, text, fontsize=8, color=INK, va="center", style="italic")


def _arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    side: int = 0,
    dashed: bool = False,
) -> None:
    """Draw an arrow with ``text`` above its middle, or to its left (side -1) or right (1)."""
    style = "--" if dashed else "-"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK, linestyle=style))
    x, y = (start[0] + end[0]) / 2 + side, (start[1] + end[1]) / 2 + (0 if side else 0.9)
    across = {-1: "right", 0: "center", 1: "left"}[side]
    axes.text(x, y, text, ha=across, va="center" if side else "bottom", fontsize=8, color=INK)


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
    run_states()
    run_verbs()
    bits()
    flow()
