"""What all benchmarks share: interleaved rounds in processes of their own, rows with a ratio, JSON and a table."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PEERS_PYTHON = Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. ratio: how many times ours is better. spread: of our rounds, interquartile range / median."""

    case: str
    metric: str
    ours: float
    peer: float | None
    peer_name: str
    ratio: float | None
    spread: float
    target: str
    met: bool | None  # None: nothing was asked, or the peer was not there


def child(module: str, *arguments: str, python: str | Path = sys.executable) -> Any:
    """Run ``python -m module arguments`` and return the JSON object it prints last on standard output."""
    done = subprocess.run(
        [str(python), "-m", module, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=clean_environment()
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def clean_environment() -> dict[str, str]:
    """Return this process's environment without settings that change how BLAS runs."""
    tuned = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    return {key: value for key, value in os.environ.items() if key not in tuned}


def interleave(cases: Mapping[str, Callable[[], Any]], rounds: int, seed: int = 0) -> dict[str, list[Any]]:
    """Call every case once a round, in an order drawn anew each round, and return each case's results."""
    shuffled = random.Random(seed)
    results: dict[str, list[Any]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in shuffled.sample(list(cases), len(cases)):
            print(f"\rround {number + 1} of {rounds}: {name:<60}", end="", file=sys.stderr, flush=True)
            results[name].append(cases[name]())
    print("\r" + " " * 90 + "\r", end="", file=sys.stderr)
    return results


def spread(values: Sequence[float]) -> float:
    """Return the distance between the quartiles as a share of the median."""
    if len(values) < 2:
        return 0.0
    first, median, third = statistics.quantiles(values, n=4)
    return (third - first) / median if median else 0.0


def report(
    name: str, rows: Sequence[Row], versions: Mapping[str, str], notes: Sequence[str] = (), **more: object
) -> None:
    """Write ``benchmarks/results/<name>.json``, with ``more`` entries that a plot needs, and print its table."""
    RESULTS.mkdir(exist_ok=True)
    content = {
        "machine": machine(),
        "versions": dict(versions),
        "notes": list(notes),
        "rows": [asdict(row) for row in rows],
        **more,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(table(rows))
    for note in notes:
        print(note)


def table(rows: Sequence[Row]) -> str:
    """Return the rows as an aligned table."""
    head = ("case", "metric", "ours", "peer", "", "ratio", "spread", "target", "met")
    body = [
        (
            row.case,
            row.metric,
            f"{row.ours:.4g}",
            "-" if row.peer is None else f"{row.peer:.4g}",
            row.peer_name,
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            f"{row.spread:.0%}",
            row.target,
            {True: "yes", False: "NO", None: "-"}[row.met],
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in (head, *body)) for column in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *body)
    )


def plot(name: str) -> None:
    """Draw ``benchmarks/results/<name>.png`` from the JSON: the ratios of rows with a target, beside their targets."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return
    content = json.loads((RESULTS / f"{name}.json").read_text())
    rows = [row for row in content["rows"] if row["ratio"] is not None and row["target"]]
    figure = Figure(figsize=(9, 1.2 + 0.36 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    for place, row in enumerate(rows):
        ratio, target = row["ratio"], row["target"]
        asked = float(target[:-1]) if target.endswith("x") else None
        color = {True: "tab:green", False: "tab:red"}.get(row["met"], "gray")
        axes.barh(place, ratio - 1, left=1, height=0.6, color=color)
        if asked is not None:
            axes.scatter(asked, place, marker="|", s=220, color="black", zorder=3)
        end = max(ratio, asked or 1, 1)
        axes.annotate(f"{ratio:.2f}", (end, place), (8, 0), textcoords="offset points", va="center")
    labels = [f"{row['case']}\n{row['metric']}, against {row['peer_name']}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize="small")
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.5)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.1, y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("times better than the peer; the mark is the target", fontsize="medium")
    axes.set_title(f"{name}: {content['machine']['cpu']}, {content['machine']['cpus']} CPUs", fontsize="medium")
    figure.savefig(RESULTS / f"{name}.png", dpi=120)


def machine() -> dict[str, object]:
    """Describe the machine: what a reader needs to judge the figures."""
    return {
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
