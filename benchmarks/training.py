"""From image files to a trained and tested network, side by side with PyTorch: ``make bench-training``.

Whole processes are timed, start-up and imports included. Architecture, initial parameters, optimizer, batch size and
epochs are the same, and so, within 0.3 points, must be the accuracy over the test images. What each side does is in
``benchmarks/trainers.py`` and ``benchmarks/torch_trainers.py``.

The machine should have nothing else to do: where others compute, PyTorch on two threads is many times slower, since the
threads of OpenMP wait for each other busily, and asynctrain's, which have a lower priority, wait for their turn. How
busy it was when the measurement began is in the notes.

Each case begins with a round in which memory is watched and time does not count: at every 50 ms the proportional set
sizes of the process and all those below it are summed. PyTorch's variants differ in workers and threads, those of
asynctrain in kernels (numpy, or numba, which has compiled them before) and home (two threads, or two processes). The
rounds that count have those of PyTorch that come near its fastest in the first, and those of asynctrain that come near
its fastest in the same home; of these, the one with the best median is the tuned one. asynctrain is held against
PyTorch as the quickstart has it, and tuned, in either home: processes are faster where Python itself takes much of the
time, and threads need less memory.

Accuracies need more runs than have to be timed: ``--accuracy`` trains both sides with as many seeds as a case names and
times nothing, so that it may run beside other work.

MNIST and the photos are those of the folder that ``ASYNCTRAIN_DATA`` names, unpacked once into the user's cache folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

import asynctrain as at
from asynctrain.data import unpack_digits
from benchmarks.harness import PEERS_PYTHON, Row, child, clean_environment, interleave, plot, report, spread, table
from benchmarks.loading import UNPACKED, made, unpack
from benchmarks.trainers import OURS, TUNED, TUTORIAL, Job

HOMES, KERNELS = ("threads", "processes"), ("numpy", "numba")  # ours
VARIANTS = [(workers, threads) for workers in (0, 1, 2) for threads in (1, 2)]  # of what is tuned
NEAR = 1.15  # times the fastest variant's seconds in the first round: up to there a variant takes part in the others
PERIOD = 0.05  # seconds between two looks at memory
MEMORY = 2.0  # how many times as much memory a peer is to need
CLOSE = 0.3  # points that the accuracy may be below a peer's

Result = dict[str, float]  # seconds, accuracy, tested, and bytes of memory where that was watched
Results = Mapping[str, list[Result]]


@dataclass(frozen=True, slots=True)
class Case:
    """A network that is to learn from a folder of images.

    Attributes:
        title: in the table.
        job: what is done; side and seed are put in.
        rounds: how many count; fewer where one takes minutes.
        seeds: how many runs of each side accuracies are compared by.
        targets: asynctrain's lines, ``CACHED`` or ``NOT_CACHED``, and for each, how many times as fast as each peer it
            is to be.
    """

    title: str
    job: Job
    rounds: int
    seeds: int
    targets: Mapping[str, Mapping[str, float]]

    def ours(self) -> dict[str, Job]:
        """Return asynctrain's jobs by name, those of each line from the one at the defaults on."""
        return {
            f"{line}, {home}, {kernels}": replace(self.job, cached=line == CACHED, home=home, kernels=kernels)
            for line in self.targets
            for home in HOMES
            for kernels in KERNELS
        }

    def peers(self, variants: list[tuple[int, int]]) -> dict[str, Job]:
        """Return PyTorch's jobs by name."""
        tuned = {
            f"{TUNED}, {workers} workers, {threads} threads": replace(
                self.job, side=TUNED, workers=workers, threads=threads
            )
            for workers, threads in variants
        }
        return {TUTORIAL: replace(self.job, side=TUTORIAL, workers=2), **tuned}


CACHED, NOT_CACHED = "decoded images cached", "no cache"
DEFAULTS = "threads, numpy"


def cases(names: str) -> Iterator[Case]:
    """Yield the lines of the comparison whose title has ``names`` in it."""
    wanted = {title: make for title, make in CASES.items() if names in title}
    for title, make in wanted.items():
        yield make(title)


def _mnist(title: str) -> Case:
    job = Job(OURS, _unpacked("mnist", "mnist.tar.xz"), "lenet", size=28, channels=1, batch=64, epochs=3, rate=1e-3)
    return Case(title, job, 5, 10, {CACHED: {TUNED: 1.6, TUTORIAL: 3.0}, NOT_CACHED: {TUNED: 1.2, TUTORIAL: 2.0}})


def _flowers(title: str) -> Case:
    folder = _unpacked("flower_photos_sub", "flower_photos.tar")
    job = Job(OURS, folder, "small_cnn", size=64, channels=3, batch=64, epochs=10, rate=1e-3)
    return Case(title, job, 6, 20, {CACHED: {TUNED: 1.6, TUTORIAL: 2.5}, NOT_CACHED: {TUNED: 1.2, TUTORIAL: 2.0}})


def _digits(title: str) -> Case:
    folder = made(UNPACKED / "digits", unpack_digits)
    job = Job(OURS, str(folder), "small_cnn", size=8, channels=1, batch=32, epochs=10, rate=3e-3)
    return Case(title, job, 10, 20, {CACHED: {TUNED: 3.0, TUTORIAL: 3.0}})


CASES: dict[str, Callable[[str], Case]] = {
    "MNIST's 60,000 PNG files, lenet, 3 epochs": _mnist,
    "750 flower photos at 64x64, small_cnn, 10 epochs": _flowers,
    "the demo's 1,797 digits, small_cnn, 10 epochs": _digits,
}


def _unpacked(folder: str, pack: str) -> str:
    if "ASYNCTRAIN_DATA" not in os.environ:
        sys.exit("this part of bench-training needs the images of ASYNCTRAIN_DATA, and that is not set")
    return str(made(UNPACKED / folder, partial(unpack, Path(os.environ["ASYNCTRAIN_DATA"]) / pack)))


# One process


def run(job: Job, seeds: Iterator[int], folder: Path, watched: bool = False) -> Result:
    """Do a job with the next seed in a process of its own, in its side's environment."""
    job = replace(job, seed=next(seeds))
    if job.side != OURS:
        job = replace(job, initial=str(_initial(job, folder)))
    python = sys.executable if job.side == OURS else str(PEERS_PYTHON)
    command = [python, "-m", "benchmarks.trainers", job.to_json()]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment()) as process:
        peak = _peak_memory(process) if watched else None
        told, _ = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{job.side} failed with exit code {process.returncode}")
    result: Result = {"seconds": seconds, **json.loads(told.splitlines()[-1])}
    return result if peak is None else result | {"memory": peak}


def _environment() -> dict[str, str]:
    """Return a user's environment: with compiled modules, which PyTorch brings along, so that start-ups compare."""
    return {key: value for key, value in clean_environment().items() if key != "PYTHONDONTWRITEBYTECODE"}


def _initial(job: Job, folder: Path) -> Path:
    """Return a file with asynctrain's architecture and initial parameters, for PyTorch to begin with."""
    path = folder / f"{Path(job.folder).name}-{job.seed}.npz"
    if not path.exists():
        classes = sum(entry.is_dir() for entry in Path(job.folder, "train").iterdir())
        model = at.models.get(job.model)(num_classes=classes, image_shape=(job.size, job.size, job.channels))
        arrays: dict[str, Any] = {"architecture": np.array(json.dumps(model.to_json())), **model.init(job.seed)}
        np.savez(path, **arrays)
    return path


def _peak_memory(process: subprocess.Popen[str]) -> float:
    """Return the most bytes that a process and those below it were seen to have in memory, until it ends."""
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, sum(_bytes_in_memory(pid) for pid in _tree(process.pid)))
        time.sleep(PERIOD)
    return peak


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for below in _text(task).split():
            yield from _tree(int(below))


def _bytes_in_memory(pid: int) -> float:
    """Return a process's proportional set size: what it shares counts in parts; 0 where it has ended."""
    lines = _text(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return 1024.0 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended
        return ""


# The figures


def measure(case: Case, variants: list[tuple[int, int]], rounds: int) -> tuple[Results, Results]:
    """Return what each side came to in the round in which memory is watched, and in those that count."""
    sides = case.ours() | (case.peers(variants) if PEERS_PYTHON.exists() else {})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _compile(case)
        looks = {name: partial(run, job, count(), folder, watched=True) for name, job in sides.items()}
        watched = interleave(looks, 1)
        tunable = [TUNED, *_at_home(case)]
        left_out = {name for start in tunable for name in _slow(watched, start) if not name.endswith(DEFAULTS)}
        runs = {name: partial(run, job, count(), folder) for name, job in sides.items() if name not in left_out}
        return watched, interleave(runs, rounds)


def _compile(case: Case) -> None:
    """Have numba compile what the case needs, which it does once for all processes to come."""
    child("benchmarks.trainers", replace(case.job, kernels="numba", epochs=1, images=2 * case.job.batch).to_json())


def _at_home(case: Case) -> list[str]:
    """Return how the names of asynctrain's variants begin, those of each line and home."""
    return [f"{line}, {home}" for line in case.targets for home in HOMES]


def _slow(watched: Results, start: str) -> Iterator[str]:
    """Yield the variants, whose names begin alike, that are far behind the fastest of them."""
    seconds = {name: results[0]["seconds"] for name, results in watched.items() if name.startswith(start)}
    yield from (name for name, took in seconds.items() if took > NEAR * min(seconds.values()))


def rows_of(case: Case, watched: Results, results: Results) -> Iterator[Row]:
    """Yield a row for each of asynctrain's lines, each peer, and each of seconds and memory."""
    for line, targets in case.targets.items():
        for own in dict.fromkeys((f"{line}, {DEFAULTS}", *(_best(results, f"{line}, {home}") for home in HOMES))):
            title = f"{case.title}, {own}"
            for side, target in targets.items():
                if not any(name.startswith(side) for name in results):
                    seconds = results[own]
                    yield Row(title, "seconds", _median(seconds), None, side, None, _spread(seconds), "", None)
                    continue
                peer = _best(results, side)
                yield _faster(title, results[own], results[peer], peer, target)
                yield _smaller(title, watched[own][0]["memory"], watched[peer][0]["memory"], peer)


def _best(results: Results, start: str) -> str:
    """Return the fastest of the variants whose names begin alike."""
    return min((name for name in results if name.startswith(start)), key=lambda name: _median(results[name]))


def _faster(title: str, ours: list[Result], theirs: list[Result], name: str, target: float) -> Row:
    own, other = _median(ours), _median(theirs)
    ratio = other / own
    return Row(title, "seconds", own, other, name, ratio, _spread(ours), f"{target:g}x", ratio >= target)


def _smaller(title: str, ours: float, theirs: float, name: str) -> Row:
    ratio = theirs / ours
    return Row(title, "peak memory, MB", ours / 1e6, theirs / 1e6, name, ratio, 0.0, f"{MEMORY:g}x", ratio >= MEMORY)


def accuracies(case: Case) -> dict[str, list[float]]:
    """Train both sides with each seed, and return the percentage of the test images that each run recognises."""
    ours = replace(case.job, cached=True)
    sides = {OURS: ours}
    if PEERS_PYTHON.exists():
        sides[TUNED] = replace(ours, side=TUNED, workers=1, threads=1)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: partial(run, job, count(), Path(folder)) for name, job in sides.items()}
        results = interleave(runs, case.seeds)
    if len({result["tested"] for of_side in results.values() for result in of_side}) > 1:
        raise RuntimeError(f"{case.title}: the sides were tested with different numbers of images")
    return {name: [100 * result["accuracy"] for result in of_side] for name, of_side in results.items()}


def accuracy_row(title: str, ours: list[float], theirs: list[float]) -> tuple[Row, str]:
    """Return the means beside each other, and a note on how sure their difference is."""
    own, target = statistics.mean(ours), f"at most {CLOSE:g} points below"
    title = f"{title}, {len(ours)} seeds"
    if not theirs:
        row = Row(title, "test accuracy, %", own, None, "PyTorch", None, spread(ours), target, None)
        return row, f"{title}: PyTorch was not there"
    other = statistics.mean(theirs)
    error = sqrt(sum(statistics.variance(side) / len(side) for side in (ours, theirs)))
    row = Row(title, "test accuracy, %", own, other, "PyTorch", own / other, spread(ours), target, own >= other - CLOSE)
    return row, f"{title}: the difference is {own - other:+.2f} points, its standard error {error:.2f}"


def _median(results: list[Result]) -> float:
    return statistics.median(result["seconds"] for result in results)


def _spread(results: list[Result]) -> float:
    return spread([result["seconds"] for result in results])


def versions() -> dict[str, str]:
    """Return what computed."""
    found: dict[str, str] = child("benchmarks.steps", "--about", "ours")["versions"]
    if PEERS_PYTHON.exists():
        found = child("benchmarks.steps", "--about", "peers", python=PEERS_PYTHON)["versions"] | found
    return found


def compare_accuracies(only: str) -> None:
    """Write what the sides learn in each case, or print it for those whose title has ``only`` in it."""
    found = {case.title: accuracies(case) for case in cases(only)}
    told = [accuracy_row(title, percent[OURS], percent.get(TUNED, [])) for title, percent in found.items()]
    rows, notes = [row for row, _ in told], [note for _, note in told]
    if only:
        print(table(rows), *notes, sep="\n")
        return
    report("accuracy", rows, versions(), notes, accuracies=found)


def main() -> None:
    """Measure all cases, or those whose title has ``--only`` in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 epochs of at most 512 images, for a look")
    parser.add_argument("--only", default="", help="the cases whose title has this in it; writes no results")
    parser.add_argument("--rounds", type=int, default=10, help="at most so many of each case")
    parser.add_argument("--accuracy", action="store_true", help="compare accuracies over many seeds, and time nothing")
    arguments = parser.parse_args()
    if arguments.accuracy:
        compare_accuracies(arguments.only)
        return
    variants = VARIANTS[::3] if arguments.quick else VARIANTS
    load = os.getloadavg()[0]
    rows: list[Row] = []
    seconds: dict[str, dict[str, list[float]]] = {}
    for case in cases(arguments.only):
        if arguments.quick:
            case = replace(case, job=replace(case.job, epochs=2, images=512), rounds=2)
        watched, results = measure(case, variants, min(case.rounds, arguments.rounds))
        rows += rows_of(case, watched, results)
        seconds[case.title] = {name: [result["seconds"] for result in of_side] for name, of_side in results.items()}
    if arguments.quick or arguments.only:
        print(table(rows))
        return
    notes = [
        "whole processes; memory: the most that all processes of a side had at once (PSS), in a round of its own",
        f"PyTorch keeps no decoded images; {TUNED}: the best of 0 to 2 workers x 1 or 2 threads, channels last",
        "asynctrain as its quickstart has it, numpy on two threads, and with its fastest kernels in either home",
        f"the load average when the measurement began: {load:.2f}",
    ]
    if not PEERS_PYTHON.exists():
        notes.append("PyTorch is left out: there is no .venv-peers (make bench-training makes it)")
    report("training", rows, versions(), notes, seconds=seconds)
    plot("training")


if __name__ == "__main__":
    main()
