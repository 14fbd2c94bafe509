"""Training steps and predictions, side by side with PyTorch, JAX, scikit-learn, ONNX Runtime: ``make bench-kernels``.

What each side does is in ``benchmarks/steps.py``. A training step is timed from one StepEnd event of the Trainer to the
next; asynctrain normalises by microbatch (ghost batch norm), the peers by batch. Of the variants of a peer the fastest
counts; those that are far behind it after two rounds are left out of the others. All runs of asynctrain that differ
only in where they compute must end with the same parameters, to the bit.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

import asynctrain as at
from asynctrain.arena import Arena
from asynctrain.types import ForwardWork
from benchmarks.harness import PEERS_PYTHON, Row, child, interleave, plot, report, spread, table
from benchmarks.steps import OURS, PEERS, Job, Result, largest_piece, missing_numba

BATCH = 128  # of training
PREDICTED = (1, 64)  # batches of prediction
NEAR = 1.25  # times the fastest variant's time
CLOSE = 1e-4  # how far the twin's outputs may be from ours, as a share of the largest; float32 sums in another order

Results = Mapping[Job, list[Result]]


@dataclass(frozen=True, slots=True)
class Network:
    """One of the models that are compared.

    Attributes:
        title: in the table.
        make: returns it.
        steps: training steps that a round times, about two seconds' worth.
        calls: predictions that a round times, of each batch size.
        targets: how many times as fast as the fastest variant of each peer a training step is to be; None: no matter.
        numba: the same of numba's kernels, against PyTorch; None: they are not measured.
    """

    title: str
    make: Callable[[], at.Model]
    steps: int
    calls: int
    targets: Mapping[str, float | None]
    numba: float | None = None


NETWORKS = {
    "mlp": Network(
        "MLP 784-512-256-10",
        partial(at.models.mlp, num_classes=10, image_shape=(28, 28, 1)),
        steps=300,
        calls=500,
        targets={"PyTorch": 1.1, "JAX": 0.8, "scikit-learn": None},
    ),
    "lenet": Network(
        "LeNet-5 28x28x1",
        partial(at.models.lenet, num_classes=10, image_shape=(28, 28, 1)),
        steps=150,
        calls=300,
        targets={"PyTorch": 1.5},
        numba=2.0,
    ),
    "vgg_small": Network(
        "VGG-like 32x32x3",
        partial(at.models.vgg_small, num_classes=10, image_shape=(32, 32, 3)),
        steps=12,
        calls=50,
        targets={"PyTorch": 1.15},
        numba=2.0,
    ),
    "resnet20": Network(
        "ResNet-20 32x32x3",
        partial(at.models.resnet, depth=20, num_classes=10, image_shape=(32, 32, 3)),
        steps=12,
        calls=50,
        targets={"PyTorch": 0.8},
        numba=1.5,
    ),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the comparison: a job of ours, and those it is held against.

    Attributes:
        name: of the line.
        ours: what is measured.
        peers: what it is compared with.
        targets: by what the sides of its variants begin with, each peer: how many times as fast as the fastest of them
            ours is to be, or None.
        batch: whose time counts.
        told: the target in words, where a number of times does not say it.
    """

    name: str
    ours: Job
    peers: Sequence[Job]
    targets: Mapping[str, float | None]
    batch: int = BATCH
    told: str = ""

    @property
    def jobs(self) -> list[Job]:
        """Ours and theirs."""
        return [self.ours, *self.peers]


def cases(folder: str) -> list[Case]:
    """Return the lines of the comparison."""
    numba = () if missing_numba() else [name for name, network in NETWORKS.items() if network.numba]
    with_numpy = [case for name in NETWORKS for case in _cases_of(name, folder)]
    return with_numpy + [case for name in numba for case in _numba_cases(name, folder)]


def _cases_of(name: str, folder: str) -> Iterator[Case]:
    network, train = NETWORKS[name], _training(name, folder)
    others = [replace(train, side=side) for side in network.targets if side != "PyTorch"]
    yield Case(f"{network.title}, step", train, [*_torch(train, name), *others], network.targets)
    yield from _predictions(name, folder)
    if name == "lenet":
        bare = [replace(train, side="bare threads")]
        yield Case(f"{network.title}, asynchronous overhead", train, bare, {"bare": 1 / 1.05}, told="at most 5 % more")
    if name == "vgg_small":
        yield Case(f"{network.title}, two workers", train, [replace(train, threads=1)], {"asynctrain": 1.4})
    if name in ("mlp", "vgg_small"):
        layers = replace(train, microbatch=BATCH, split="layers")
        one = replace(train, microbatch=BATCH, threads=1)
        yield Case(f"{network.title}, two workers, split by layers", layers, [one], {"asynctrain": 1.25})


def _numba_cases(name: str, folder: str) -> Iterator[Case]:
    network, train = NETWORKS[name], replace(_training(name, folder), kernels="numba")
    yield Case(f"{network.title}, step, numba", train, _torch(train, name), {"PyTorch": network.numba})
    if name == "vgg_small":
        yield Case(f"{network.title}, two workers, numba", train, [replace(train, threads=1)], {"asynctrain": 1.6})


def _training(name: str, folder: str) -> Job:
    return Job("asynctrain", name, folder, batches=(BATCH,), steps=NETWORKS[name].steps, warm_up=5)


def _predictions(name: str, folder: str) -> Iterator[Case]:
    network = NETWORKS[name]
    threads = Job("asynctrain", name, folder, "predict", PREDICTED, network.calls, warm_up=5)
    inline = replace(threads, side="asynctrain inline", threads=1)
    runtime = [replace(threads, side="ONNX Runtime", threads=count) for count in (1, 2)]
    peers = [*_torch(threads, name), *runtime]
    targets: dict[str, float | None] = {"PyTorch": 1.0, "ONNX Runtime": None}
    for batch in PREDICTED:
        yield Case(f"{network.title}, predict {batch}", threads, peers, targets, batch)
    yield Case(f"{network.title}, predict 1 inline", inline, peers, targets, 1)


def _torch(job: Job, name: str) -> list[Job]:
    """Return PyTorch's variants of a job; a network without convolutions has no channels."""
    sides = ["PyTorch", "PyTorch channels last", "PyTorch compiled"]
    if name == "mlp":
        sides.remove("PyTorch channels last")
    return [replace(job, side=side, threads=count, kernels="numpy") for side in sides for count in (1, 2)]


# The figures


def title(job: Job) -> str:
    """Return how the table names a side."""
    if job.side in ("JAX", "scikit-learn"):
        return job.side
    told = [job.side, "1 thread" if job.threads == 1 else f"{job.threads} threads"]
    return ", ".join(told)


def label(job: Job) -> str:
    """Return the name under which a job is run."""
    own = f"microbatch {job.microbatch or 'default'}, {job.split}, {job.kernels}" if job.side in OURS else ""
    return f"{job.model} {job.task}, {title(job)} {own}".strip()


def run(job: Job) -> Result:
    """Run a job in a process of its own, in its side's environment."""
    python = sys.executable if job.side in OURS else PEERS_PYTHON
    result: Result = child("benchmarks.steps", job.to_json(), python=python)
    return result


def rows_of(case: Case, results: Results) -> Iterator[Row]:
    """Yield a row against the fastest of each peer's variants, with the target, and one against each of the others."""
    for family, target in case.targets.items():
        variants = [job for job in case.peers if job.side.startswith(family) and job in results]
        by_speed = sorted(variants, key=lambda job: milliseconds(results[job], case.batch))
        told = case.told or (f"{target:g}x" if target else "")
        yield compared(case, by_speed[0] if by_speed else None, results, family, target, told)
        for job in by_speed[1:]:
            yield compared(case, job, results, family)


def compared(
    case: Case, peer: Job | None, results: Results, family: str, target: float | None = None, told: str = ""
) -> Row:
    """Return the row of one figure, a median on either side."""
    own = milliseconds(results[case.ours], case.batch)
    own_spread = spread([result["seconds"][str(case.batch)] for result in results[case.ours]])
    if peer is None:
        return Row(case.name, "ms", own, None, family, None, own_spread, told, None)
    other = milliseconds(results[peer], case.batch)
    met = other / own >= target if target else None
    return Row(case.name, "ms", own, other, title(peer), other / own, own_spread, told, met)


def milliseconds(results: list[Result], batch: int) -> float:
    """Return the median over the rounds of what each round's median step or call took."""
    return 1e3 * float(statistics.median(result["seconds"][str(batch)] for result in results))


def bit_rows(results: Results) -> Iterator[Row]:
    """Yield, for each network and microbatch, how many different sets of parameters our runs ended with: one."""
    groups: dict[str, list[str]] = {}
    for job, rounds in results.items():
        if job.side in OURS and job.task == "train":
            name = f"{NETWORKS[job.model].title}, microbatch {largest_piece(BATCH, job.microbatch)}, {job.kernels}"
            groups.setdefault(name, []).extend(result["digest"] for result in rounds)
    for name, digests in groups.items():
        different = len(set(digests))
        case = f"same bits: {name}, {len(digests)} runs"
        yield Row(case, "digests", different, None, "", None, 0.0, "1 digest", different == 1)


# The networks


def prepare(folder: Path, names: Iterable[str], peers: bool) -> None:
    """Write each network as JSON and weights, and hold PyTorch's twin against it.

    Raises:
        RuntimeError: the twin gives other outputs, or has more or fewer parameters.
    """
    for name in names:
        model = NETWORKS[name].make()
        write(model, folder, name)
        if not peers:
            continue
        about = child("benchmarks.steps", Job("PyTorch", name, str(folder), "prepare").to_json(), python=PEERS_PYTHON)
        count = sum(array.size for array in model.init(0).values())
        if about["parameters"] != count or not about["difference"] < CLOSE:
            raise RuntimeError(
                f"{name}: PyTorch's twin has {about['parameters']} parameters, the model {count}; "
                f"their outputs differ by {about['difference']:.1e} of the largest"
            )


def write(model: at.Model, folder: Path, name: str) -> None:
    """Write a network's JSON, its parameters and running statistics, slightly disturbed, and outputs to check."""
    rng = np.random.default_rng(0)
    params, state = model.init(0), model.init_state()
    for array in params.values():
        array += 0.01 * rng.standard_normal(array.shape, np.float32)
    for array in state.values():
        array += 0.5 * rng.random(array.shape)  # means from 0 to 0.5, variances from 1 to 1.5
    images = rng.integers(0, 256, (4, *model.input_shape), np.uint8)
    outputs = _outputs(model, params, state, images)
    parts = {"params": params, "state": state, "check": {"images": images, "outputs": outputs}}
    arrays = {f"{part}:{key}": array for part, named in parts.items() for key, array in named.items()}
    np.savez(folder / f"{name}.npz", allow_pickle=False, **arrays)
    (folder / f"{name}.json").write_text(json.dumps(model.to_json()))


def _outputs(model: at.Model, params: Arena, state: Arena, images: np.ndarray) -> np.ndarray:
    import asyncio

    async def forward() -> np.ndarray:
        async with at.InlineExecutor() as executor, executor.open(at.Program(model.to_json())) as session:
            await session.broadcast(params, state, 0)
            return (await session.compute(ForwardWork(images), 0)).outputs

    return asyncio.run(forward())


def left_out() -> tuple[dict[str, str], dict[str, str]]:
    """Return why which peers cannot be run, and the versions of the others."""
    if not PEERS_PYTHON.exists():
        return dict.fromkeys(PEERS, "there is no .venv-peers (make bench-kernels makes it)"), {}
    about = child("benchmarks.steps", "--about", "peers", python=PEERS_PYTHON)
    return {side: why for side, why in about["missing"].items() if why}, about["versions"]


def rounds(jobs: Iterable[Job], count: int) -> dict[Job, list[Result]]:
    """Return what so many rounds of all jobs, interleaved, brought."""
    by_label = {label(job): job for job in jobs}
    results = interleave({name: partial(run, job) for name, job in by_label.items()}, count)
    return {by_label[name]: found for name, found in results.items()}


def is_near(job: Job, chosen: Iterable[Case], results: Results) -> bool:
    """Return whether ``job`` is ours, or not far behind the fastest variant of its peer in one of the cases."""
    if job.side in OURS:
        return True
    for case in chosen:
        family = next((family for family in case.targets if job.side.startswith(family)), None)
        if job in case.peers and family is not None:
            variants = [peer for peer in case.peers if peer.side.startswith(family) and peer in results]
            fastest = min(milliseconds(results[peer], case.batch) for peer in variants)
            if milliseconds(results[job], case.batch) <= NEAR * fastest:
                return True
    return False


def shortened(job: Job) -> Job:
    """Return a job with a tenth of the steps, for a look."""
    return replace(job, steps=max(3, job.steps // 10), warm_up=2)


def main() -> None:
    """Run the rounds of all cases, or of those whose name has ``--only`` in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, a tenth of the steps, for a look")
    parser.add_argument("--only", default="", help="the cases whose name has this in it; writes no results")
    parser.add_argument("--rounds", type=int, default=10, help="of all sides, those that are far behind aside")
    arguments = parser.parse_args()
    without, versions = left_out()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [case for case in cases(folder) if arguments.only in case.name]
        if arguments.quick:
            chosen = [
                replace(case, ours=shortened(case.ours), peers=[shortened(job) for job in case.peers])
                for case in chosen
            ]
        prepare(Path(folder), dict.fromkeys(case.ours.model for case in chosen), "PyTorch" not in without)
        jobs = dict.fromkeys(job for case in chosen for job in case.jobs if job.side not in without)
        results = rounds(jobs, 2)
        if not arguments.quick:
            further = rounds([job for job in jobs if is_near(job, chosen, results)], arguments.rounds - 2)
            results = {job: [*found, *further.get(job, [])] for job, found in results.items()}
    rows = [*(row for case in chosen for row in rows_of(case, results)), *bit_rows(results)]
    if arguments.only:
        print(table(rows))
        return
    versions |= child("benchmarks.steps", "--about", "ours")["versions"]
    report("kernels", rows, versions, notes(without))
    plot("kernels")


def notes(without: Mapping[str, str]) -> list[str]:
    """Return what the table does not say."""
    numba = missing_numba()
    return [
        f"asynctrain normalises by microbatch (ghost batch norm, {largest_piece(BATCH, None)} samples), the peers by "
        "batch",
        *([f"asynctrain with numba is left out: {numba}"] if numba else []),
        *(f"{side} is left out: {why}" for side, why in without.items()),
    ]


if __name__ == "__main__":
    main()
