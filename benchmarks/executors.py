"""What it costs to compute in other processes: ``make bench-executors``.

Each case runs in a process of its own, the cases in random order, round after round. A round of broadcast and gradients
gives two workers the parameters, and has one gradient of each of them; its layers do no more than write it, so that it
is the way there and back that is timed. It is held against the least that could do the same: memory and sockets used
directly by a caller that blocks, whose workers run the same code; on Dask, its scatter, submit and gather.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import uvloop

import asynctrain as at
from asynctrain.executors import worker_process
from asynctrain.executors.messages import Inbox, Message, encoded
from asynctrain.types import GradientWork, Program
from benchmarks import homes
from benchmarks.harness import Row, child, interleave, plot, report, spread
from benchmarks.loop import BEATS, heartbeat, spin

T = TypeVar("T")

SIZES = (1, 10, 100)  # MB of parameters
ROUNDS = {1: 200, 10: 50, 100: 10}  # in one process, for a median
DASK_ROUNDS = {1: 20, 10: 20, 100: 5}  # each takes ten times as long
MICROBATCHES, SAMPLES = 8, 64
COUNTED = 10  # rounds, of which messages are counted
HAS_DASK = find_spec("distributed") is not None
IDLE = "idle, busy machine"
ALLOWED = {10: 10.0, 100: 50.0}  # ms that a heartbeat may be later


def processes(workers: int = homes.WORKERS) -> at.Executor:
    return at.ProcessExecutor(workers)


def dask(workers: int = homes.WORKERS) -> at.Executor:
    return at.DaskExecutor(workers=workers)


Rounds = Callable[[float], AbstractAsyncContextManager[homes.Round]]


async def round_seconds(rounds: Rounds, number: Mapping[int, int], size: int) -> float:
    """Return the median seconds of a round."""
    async with rounds(size) as round_:
        return statistics.median(await homes.timed(round_, 5, number[size]))


async def microbatch_rate(make: Callable[[int], at.Executor], workers: int, samples: int = SAMPLES) -> float:
    """Return microbatches of so many samples a second, of a model of less than 1 MB."""
    model = at.models.resnet(num_classes=10, image_shape=(32, 32, 3), depth=8)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (samples, 32, 32, 3), dtype=np.uint8)
    works = [GradientWork(0, i, MICROBATCHES, images, rng.integers(0, 10, samples)) for i in range(MICROBATCHES)]
    params, state = model.init(0), model.init_state()
    async with make(workers) as executor, executor.open(Program(model.to_json())) as session:
        await homes.complete(session, workers)
        version = 0

        async def step() -> None:
            nonlocal version
            version += 1
            await session.broadcast(params, state, version)
            for result in await asyncio.gather(*(session.compute(work, version) for work in works)):
                result.release()

        return MICROBATCHES / statistics.median(await homes.timed(step, 1, 5))


async def bytes_moved(size: int) -> dict[str, float]:
    """Return what goes to a worker and back in a round: on sockets, parameters and state, and of its slot."""
    sent = received = 0

    def counted(message: Message) -> bytes:
        nonlocal sent
        data = encoded(message)
        sent += len(data)
        return data

    def fed(inbox: Inbox, data: bytes, feed: Callable[[Inbox, bytes], Iterator[Message]] = Inbox.feed) -> Any:
        nonlocal received
        received += len(data)
        return feed(inbox, data)

    with patch.object(worker_process, "encoded", counted), patch.object(Inbox, "feed", fed):
        async with homes.executor_rounds(processes(), size) as round_:
            await round_()
            sent = received = 0
            await homes.timed(round_, 0, COUNTED)
    model = homes.model_of(size)
    arrays = homes.params_of(size).vector.nbytes
    small = model.state_layout.size * 8 + model.statistics_layout.size * 8 + homes.IMAGES.nbytes + homes.LABELS.nbytes
    messages = (sent + received) / COUNTED / homes.WORKERS
    return {"moved": 2 * arrays + small + messages, "allowed": 1.01 * 2 * arrays + 4096}


async def lateness(size: int) -> list[float]:
    """Return how late each beat is while rounds of this size go on."""
    async with homes.executor_rounds(processes(), size) as round_:

        async def work() -> None:
            while True:
                await round_()

        task = asyncio.create_task(work())
        await asyncio.sleep(1)
        late = await heartbeat(BEATS)
        if task.done():
            raise RuntimeError(f"the work ended while it was measured: {task.exception()!r}")
        task.cancel()
        await asyncio.wait([task])
    return late


def idle_lateness() -> list[float]:
    """Return how late each beat is in an idle loop, beside as many spinning processes as there were workers."""
    spinners = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(homes.WORKERS)]
    for spinner in spinners:
        spinner.start()
    time.sleep(1)  # until they spin
    late = asyncio.run(heartbeat(BEATS))
    for spinner in spinners:
        spinner.terminate()
    return late


def _run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the command line does
        return runner.run(work)


def cases() -> dict[str, Callable[[], Any]]:
    """Return what is measured, by its name."""
    found: dict[str, Callable[[], Any]] = {IDLE: idle_lateness}
    for size in SIZES:
        found[f"round, processes, {size} MB"] = partial(_timed, partial(_rounds_on, processes), ROUNDS, size)
        found[f"round, bare loop, {size} MB"] = partial(_timed, homes.bare_rounds, ROUNDS, size)
        found[f"bytes, {size} MB"] = partial(_in_loop, bytes_moved, size)
    for size in ALLOWED:
        found[f"heartbeat, {size} MB"] = partial(_in_plain_loop, lateness, size)
    for workers in (1, 2):
        found[f"microbatches, processes, {workers}"] = partial(_rate, processes, workers)
    return found | (_dask_cases() if HAS_DASK else {})


def _dask_cases() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {}
    for size in SIZES:
        found[f"round, Dask, {size} MB"] = partial(_timed, partial(_rounds_on, dask), DASK_ROUNDS, size)
        found[f"round, bare Dask, {size} MB"] = partial(_timed, homes.bare_dask_rounds, DASK_ROUNDS, size)
    for workers in (1, 2):
        found[f"microbatches, Dask, {workers}"] = partial(_rate, dask, workers)
    return found


def _in_loop(measure: Callable[[int], Coroutine[Any, Any, object]], size: int) -> object:
    return _run(measure(size))


def _in_plain_loop(measure: Callable[[int], Coroutine[Any, Any, object]], size: int) -> object:
    return asyncio.run(measure(size))  # uvloop's clock tells whole milliseconds


def _rounds_on(make: Callable[[], at.Executor], size: float) -> AbstractAsyncContextManager[homes.Round]:
    return homes.executor_rounds(make(), size)


def _timed(rounds: Rounds, number: Mapping[int, int], size: int) -> float:
    return _run(round_seconds(rounds, number, size))


def _rate(make: Callable[[int], at.Executor], workers: int) -> float:
    return _run(microbatch_rate(make, workers))


def rows_of(results: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Hold medians over the rounds against the targets."""
    rows = [_against(results, "processes", "bare loop", size, 1 / 1.5) for size in SIZES]
    if HAS_DASK:
        rows += [_against(results, "Dask", "bare Dask", size, 1.0 if size > 1 else None) for size in SIZES]
    for kind, asked in (("processes", 1.7), ("Dask", 1.5)):
        if f"microbatches, {kind}, 2" in results:
            one, two = (statistics.median(results[f"microbatches, {kind}, {workers}"]) for workers in (1, 2))
            case = f"two workers, {kind}, {1e3 / one:.0f} ms each"
            own = spread(results[f"microbatches, {kind}, 2"])
            rows.append(
                Row(case, "microbatches/s", two, one, "one worker", two / one, own, f"{asked}x", two / one >= asked)
            )
    for size in SIZES:
        moved, allowed = (results[f"bytes, {size} MB"][0][key] for key in ("moved", "allowed"))
        target = "at most 1.01x + 4 KiB"
        rows.append(
            Row(f"bytes, {size} MB", "per round and worker", moved, None, "", None, 0.0, target, moved <= allowed)
        )
    idle = _p99(results[IDLE])
    for size, later in ALLOWED.items():
        late = _p99(results[f"heartbeat, {size} MB"])
        own = spread([_p99([beats]) for beats in results[f"heartbeat, {size} MB"]])
        target = f"at most {later:g} ms later"
        rows.append(
            Row(
                f"heartbeat, {size} MB",
                "p99 late, ms",
                late,
                idle,
                IDLE,
                idle / late,
                own,
                target,
                late <= idle + later,
            )
        )
    return rows


def _against(results: Mapping[str, Sequence[float]], ours: str, peer: str, size: int, asked: float | None) -> Row:
    mine, theirs = (results[f"round, {name}, {size} MB"] for name in (ours, peer))
    own, other = (statistics.median(seconds) * 1e3 for seconds in (mine, theirs))
    target, met = (f"{asked:.2g}x", other / own >= asked) if asked else ("", None)
    return Row(f"round, {ours}, {size} MB", "ms", own, other, peer, other / own, spread(mine), target, met)


def _p99(rounds: Sequence[Sequence[float]]) -> float:
    return float(np.quantile([beat for beats in rounds for beat in beats], 0.99)) * 1e3


def main() -> None:
    """Run the rounds, or one case where ``--case`` names it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, for a look")
    parser.add_argument("--case", choices=cases(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(cases()[arguments.case]()))
        return
    calls = {case: partial(child, "benchmarks.executors", "--case", case) for case in cases()}
    results = interleave(calls, 2 if arguments.quick else 10)
    versions = {"numpy": np.__version__, "uvloop": version("uvloop")}
    if HAS_DASK:
        versions["distributed"] = version("distributed")
    else:
        print("Dask is left out: it is not installed (pip install 'asynctrain[dask]')", file=sys.stderr)
    notes = [
        "A round gives two workers the parameters and has one gradient of each; the bare loop is shared memory and "
        "socketpairs used directly by a caller that blocks, its workers running the same code. 0.67x is 1.5 times its "
        "time.",
        "Bare Dask is client.scatter(broadcast=True), submit and gather on Dask's LocalCluster of two processes, of "
        "the same bytes; its task doubles the parameters, as our layers do.",
        "Bytes are those of messages on the sockets, counted, and of the arrays that lie in shared memory.",
    ]
    report("executors", rows_of(results), versions, notes)
    plot("executors")


if __name__ == "__main__":
    main()
