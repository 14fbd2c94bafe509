"""What gRPC costs between the processes of one machine: ``make bench-grpc``.

Each case runs in a process of its own, the cases in random order, round after round. A round of broadcast and gradients
gives two workers the parameters and has one gradient of each, whose layers do no more than write it; it is held against
the same bytes through sockets that asyncio uses directly, to peers that run the same layers. The training service is
timed as its client sees it, and its loop by a heartbeat in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import uvloop

import asynctrain as at
from asynctrain.serve import TrainingClient, serve
from benchmarks import homes, hosts
from benchmarks.executors import IDLE, idle_lateness, microbatch_rate
from benchmarks.harness import Row, child, interleave, plot, report, spread
from benchmarks.loop import heartbeat

T = TypeVar("T")

SIZES = (1, 10, 100)  # MB of parameters
ENCRYPTED = (10, 100)
ROUNDS = {1: (10, 100), 10: (3, 20), 100: (1, 4)}  # to warm up, and to be timed, in one process
SAMPLES = 32  # in a microbatch, for about 50 ms
SENT, LOT = 400, 100  # MB of images
BEATS = 1_000  # while the service is busy
LATEST = 50.0  # ms

Rounds = Callable[[float], AbstractAsyncContextManager[homes.Round]]


async def round_seconds(rounds: Rounds, size: int) -> float:
    """Return the median seconds of a round."""
    async with rounds(size) as round_:
        return statistics.median(await homes.timed(round_, *ROUNDS[size]))


async def intake_rate() -> float:
    """Return MB/s of images from a client to a service's disk, until the service has said that they are there."""
    data = hosts.pixels(SENT)
    with TemporaryDirectory() as folder, hosts.service(folder) as address:
        async with TrainingClient(address) as client:
            await client.runs()
            start = time.perf_counter()
            async with client.train(data, model="linear", image_shape=hosts.IMAGE, epochs=1):
                return data.images.nbytes / 1e6 / (time.perf_counter() - start)


async def service_lateness() -> dict[str, Any]:
    """Return how late each beat is in a loop that serves, trains and takes in, and how many MB it has taken in."""
    with TemporaryDirectory() as folder:
        async with at.ThreadExecutor() as executor, serve(folder, executor) as server:
            with hosts.processes(1, "client", server.address, LOT) as (client,):
                assert client.stdout is not None
                await asyncio.to_thread(client.stdout.readline)  # one lot has been sent, and the other run trains
                late = await heartbeat(BEATS)
                if client.poll() is not None:
                    raise RuntimeError("the client ended while the loop was watched")
                client.terminate()
                return {"late": late, "taken": sum(map(int, client.stdout))}


def cases() -> dict[str, Callable[[], Any]]:
    """Return what is measured, by its name."""
    found: dict[str, Callable[[], Any]] = {IDLE: idle_lateness}
    for size in SIZES:
        found[f"round, gRPC, {size} MB"] = partial(_timed, hosts.grpc_rounds, size)
        found[f"round, bare loop, {size} MB"] = partial(_timed, hosts.bare_rounds, size)
    for size in ENCRYPTED:
        found[f"round, mutual TLS, {size} MB"] = partial(_timed, partial(hosts.grpc_rounds, encrypted=True), size)
    for workers in (1, 2):
        found[f"microbatches, {workers}"] = partial(_rate, workers)
    found["intake"] = lambda: _run(intake_rate())
    found["heartbeat"] = lambda: asyncio.run(service_lateness())  # uvloop's clock tells whole milliseconds
    return found


def _timed(rounds: Rounds, size: int) -> float:
    return _run(round_seconds(rounds, size))


def _rate(workers: int) -> float:
    return _run(microbatch_rate(hosts.GrpcHosts, workers, SAMPLES))


def _run(work: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the command line does
        return runner.run(work)


def rows_of(results: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Hold medians over the rounds against the targets."""
    return [
        *(
            _against(results, f"round, gRPC, {size} MB", f"round, bare loop, {size} MB", 1 / 2.5 if size > 1 else None)
            for size in SIZES
        ),
        *(_against(results, f"round, mutual TLS, {size} MB", f"round, gRPC, {size} MB", 1 / 1.6) for size in ENCRYPTED),
        _two_workers(results),
        _intake(results["intake"]),
        _heartbeat(results),
    ]


def _against(results: Mapping[str, Sequence[float]], ours: str, peer: str, asked: float | None) -> Row:
    """Return the row of a round, which must be as fast as ``asked``, or take at most 10 ms."""
    own, theirs = (statistics.median(results[case]) * 1e3 for case in (ours, peer))
    ratio = theirs / own
    target, met = ("at most 10 ms", own <= 10) if asked is None else (f"{asked:g}x", ratio >= asked)
    return Row(ours, "ms", own, theirs, peer, ratio, spread(results[ours]), target, met)


def _two_workers(results: Mapping[str, Sequence[float]]) -> Row:
    one, two = (statistics.median(results[f"microbatches, {workers}"]) for workers in (1, 2))
    case, own = f"two workers, {1e3 / one:.0f} ms each", spread(results["microbatches, 2"])
    return Row(case, "microbatches/s", two, one, "one worker", two / one, own, "1.6x", two / one >= 1.6)


def _intake(rates: Sequence[float]) -> Row:
    rate = statistics.median(rates)
    return Row(
        "TrainModel, raw images", "MB/s", rate, 200.0, "what is asked", rate / 200, spread(rates), "1x", rate >= 200
    )


def _heartbeat(results: Mapping[str, Sequence[Any]]) -> Row:
    """Return the row of the latest beat of all rounds."""
    worst = [max(one["late"]) * 1e3 for one in results["heartbeat"]]
    idle = max(max(beats) for beats in results[IDLE]) * 1e3
    late, target = max(worst), f"at most {LATEST:g} ms"
    return Row(
        "the service's loop", "latest beat, ms", late, idle, IDLE, idle / late, spread(worst), target, late <= LATEST
    )


def notes_of(results: Mapping[str, Sequence[Any]]) -> list[str]:
    late = [beat for one in results["heartbeat"] for beat in one["late"]]
    taken = statistics.median(one["taken"] for one in results["heartbeat"])
    p99 = float(np.quantile(late, 0.99)) * 1e3
    return [
        "A round gives two workers the parameters and has one gradient of each; the bare loop is asyncio's "
        "sock_sendall and sock_recv_into, from and into the arrays, to such peers. 0.4x is 2.5 times its time.",
        f"{SENT} MB of images are sent by the Python client to a service whose folder is on this machine's disk, until "
        "the last batch has been acknowledged.",
        f"Of {len(late)} beats in the loop of a service that trains and takes in (about {taken:g} MB while they were "
        f"counted), the 99th percentile is {p99:.2f} ms late.",
    ]


def main() -> None:
    """Run the rounds, or one case where ``--case`` names it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds, for a look")
    parser.add_argument("--case", choices=cases(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(cases()[arguments.case]()))
        return
    calls = {case: partial(child, "benchmarks.grpc", "--case", case) for case in cases()}
    results = interleave(calls, 2 if arguments.quick else 10)
    versions = {name: version(name) for name in ("grpcio", "protobuf", "numpy", "uvloop")}
    report("grpc", rows_of(results), versions, notes_of(results))
    plot("grpc")


if __name__ == "__main__":
    main()
