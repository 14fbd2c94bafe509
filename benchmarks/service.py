"""A web service that trains, beside the same one on PyTorch: ``make bench-service``.

The one is ``examples/fastapi_service`` as it stands, with numpy and with numba, the other
``benchmarks/torch_service.py``: the same endpoints around a PyTorch loop in ``asyncio.to_thread``. Both run under
uvicorn on uvloop in a process of their own, and train the same network on the same photos, with the same batch size
and kinds of augmentation. All is observed from this process:

* latency: ``GET /run`` is asked ``RATE`` times a second while it trains, whether or not earlier answers are there; from
  sending the request to having the whole answer.
* throughput: images trained on per second under that load, by the steps that the answers tell; evaluations included.
* cancel: from sending ``POST /run/cancel`` to the last moment at which the process used more than ``QUIET`` of a CPU.
* SIGTERM: from the signal to the exit. Then the service is started again, and must go on from no earlier step than the
  last one that was seen before the signal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

import asynctrain as at
from asynctrain.nn.kernels import choice
from benchmarks import harness
from benchmarks.harness import PEERS_PYTHON, Row, clean_environment, interleave, report, spread
from benchmarks.loop import quantile
from benchmarks.serving import write_photos
from benchmarks.training import versions

RATE = 100  # requests a second
LOAD, IDLE = 5.0, 1.0  # seconds of them, while it trains and when it does not
WARM_UP = 1.5  # seconds of training before anything is measured
CANCELS = 2  # in a round
PERIOD = 0.005  # seconds between two looks at the CPU time
QUIET = 0.2  # of a CPU, at most, in each period: then nothing is computed any more
SILENCE = 0.5  # seconds for which it must be so
PATIENCE = 30.0  # seconds, for anything
IMAGES, CLASSES = 1200, 10  # of the photos, four fifths to train on
ORDER = {"epochs": 1000, "image_size": 64, "batch_size": 64}
ROOT = Path(__file__).parents[1]

EXAMPLE, TWIN = "examples.fastapi_service.app:create_app", "benchmarks.torch_service:create_app"

Latencies = list[float]  # seconds


def _counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


@dataclass(frozen=True, slots=True)
class Side:
    """One of the services. threads: it trains on; kernels: that asynctrain trains with."""

    name: str
    python: str
    application: str
    threads: int
    kernels: str = "numpy"


OURS = [
    Side(f"asynctrain, {kernels}, {_counted(threads)}", sys.executable, EXAMPLE, threads, kernels)
    for threads, kernels in ((2, "numpy"), (2, "numba"), (1, "numba"))
]
PEERS = [Side(f"PyTorch, {_counted(threads)}", str(PEERS_PYTHON), TWIN, threads) for threads in (2, 1)]


@dataclass(frozen=True, slots=True)
class Round:
    """What one round of a service has shown.

    Attributes:
        latencies: while it trained.
        idle: latencies when nothing was trained.
        rate: images a second.
        stopped: seconds from asking for each cancellation until the computing had stopped.
        answered: seconds until that was answered.
        exit: seconds from SIGTERM.
        lost: steps that were seen before SIGTERM and that the service did not go on from.
    """

    latencies: Latencies
    idle: Latencies
    rate: float
    stopped: list[float]
    answered: list[float]
    exit: float
    lost: int


class Server:
    """A service in a process of its own, and a client of it."""

    def __init__(self, process: asyncio.subprocess.Process, client: aiohttp.ClientSession) -> None:
        self._process = process
        self._client = client

    async def wait_until_up(self) -> None:
        while True:
            if self._process.returncode is not None:
                raise RuntimeError(f"the service has ended with exit code {self._process.returncode}")
            try:
                await self._json("GET", "/images")
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.05)
            else:
                return

    async def start(self) -> None:
        """Start a run, and return when it has made a step."""
        await self._json("POST", "/run", json=ORDER)
        await self.events("StepEnd")

    async def step(self) -> int:
        """Return how many steps are done."""
        told = await self._json("GET", "/run")
        return int(told["step"])

    async def events(self, last: str) -> list[dict[str, Any]]:
        """Return what the stream of events tells, up to the first one of the kind ``last``."""
        told: list[dict[str, Any]] = []
        async with self._client.get("/run/events") as answer:
            async for line in answer.content:
                if line.startswith(b"data: "):
                    told.append(json.loads(line.removeprefix(b"data: ")))
                    if told[-1]["event"] == last:
                        break
        return told

    async def load(self, seconds: float) -> tuple[Latencies, dict[int, float]]:
        """Ask for the progress ``RATE`` times a second; return the latencies, and when each step was seen first."""
        latencies: Latencies = []
        seen: dict[int, float] = {}

        async def ask() -> None:
            start = time.perf_counter()
            told = await self._json("GET", "/run")
            latencies.append(time.perf_counter() - start)
            seen.setdefault(told["step"], time.perf_counter())

        async with asyncio.TaskGroup() as group:
            start = time.perf_counter()
            for number in range(round(seconds * RATE)):
                await asyncio.sleep(max(0.0, start + number / RATE - time.perf_counter()))
                group.create_task(ask())
        return latencies, seen

    async def cancel(self) -> tuple[float, float]:
        """Cancel the run; return the seconds until nothing is computed any more, and until that was answered."""
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            quiet = group.create_task(until_quiet(self._process.pid, start))
            await self._json("POST", "/run/cancel")
            answered = time.perf_counter() - start
        return quiet.result(), answered

    async def terminate(self) -> float:
        """Send SIGTERM and return the seconds until the exit."""
        start = time.perf_counter()
        self._process.send_signal(signal.SIGTERM)
        code = await self._process.wait()
        seconds = time.perf_counter() - start
        if code not in (0, -signal.SIGTERM):
            raise RuntimeError(f"the service has ended with exit code {code}")
        return seconds

    async def _json(self, method: str, path: str, **content: Any) -> Any:
        async with self._client.request(method, path, raise_for_status=True, **content) as answer:
            return await answer.json()


async def until_quiet(pid: int, start: float) -> float:
    """Return the seconds from ``start`` until the process's threads last computed."""
    last, moment, used = start, time.perf_counter(), cpu_seconds(pid)
    while moment - last < SILENCE:
        await asyncio.sleep(PERIOD)
        now, so_far = time.perf_counter(), cpu_seconds(pid)
        if so_far - used > QUIET * (now - moment):
            last = now
        moment, used = now, so_far
    return last - start


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of all threads that a process has or had; to the nanosecond, on Linux alone."""
    return time.clock_gettime((~pid << 3) | 2)  # what clock_getcpuclockid(3) gives


@asynccontextmanager
async def serving(side: Side, home: Path, network: Path) -> AsyncIterator[Server]:
    """Start a service that lives in ``home``; it is gone at the end of the block."""
    port = free_port()
    settings = {"STUDIO_THREADS": str(side.threads), "STUDIO_KERNELS": side.kernels}
    process = await asyncio.create_subprocess_exec(
        *(side.python, "-m", "uvicorn", "--factory", side.application, "--loop", "uvloop", "--port", str(port)),
        *("--timeout-graceful-shutdown", "2", "--log-level", "warning", "--no-access-log"),
        env={**clean_environment(), "STUDIO_HOME": str(home), "STUDIO_NETWORK": str(network), **settings},
        cwd=ROOT,
    )
    try:
        connector = aiohttp.TCPConnector(limit=0)  # nobody waits for a connection
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as client:
            server = Server(process, client)
            async with asyncio.timeout(PATIENCE):
                await server.wait_until_up()
            yield server
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def one_round(side: Side, photos: Path, network: Path, delays: random.Random) -> Round:
    """Start a service, terminate it amid a run, let it go on, put it under load, and cancel what it does."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        await asyncio.to_thread(shutil.copytree, photos, home / "images")
        async with asyncio.timeout(4 * PATIENCE), serving(side, home, network) as server:
            await server.start()
            await asyncio.sleep(WARM_UP + delays.random())
            reached = await server.step()
            exit_ = await server.terminate()
        async with asyncio.timeout(4 * PATIENCE), serving(side, home, network) as server:
            resumed = (await server.events("Resumed"))[-1]["step"]
            await asyncio.sleep(WARM_UP)
            latencies, steps = await server.load(LOAD)
            cancelled = [await server.cancel()]
            idle, _ = await server.load(IDLE)
            for _ in range(CANCELS - 1):
                await server.start()
                await asyncio.sleep(WARM_UP + delays.random())
                cancelled.append(await server.cancel())
    stopped, answered = ([pair[place] for pair in cancelled] for place in (0, 1))
    return Round(latencies, idle, rate_of(steps), stopped, answered, exit_, max(0, reached - resumed))


def rate_of(steps: Mapping[int, float]) -> float:
    """Return images a second, by the moments when steps were first seen."""
    first, *_, last = sorted(steps)
    return (last - first) * ORDER["batch_size"] / (steps[last] - steps[first])


# The figures


def rows_of(results: Mapping[str, Sequence[Round]]) -> list[Row]:
    """Compare every figure of each of ours with that of each peer."""
    figures = {name: _figures(rounds) for name, rounds in results.items()}
    peers = [side.name for side in PEERS if side.name in results] or ["PyTorch"]
    return [
        _row(f"{side.name}: {case}", metric, own, figures.get(peer, {}).get((case, metric)), peer)
        for side in OURS
        for peer in peers
        for (case, metric), own in figures[side.name].items()
    ]


Figure = tuple[float, float]  # and its spread


def _row(case: str, metric: str, ours: Figure, theirs: Figure | None, peer: str) -> Row:
    own, varies = ours
    if theirs is None:
        return Row(case, metric, own, None, peer, None, varies, "", None)
    other = theirs[0]
    ratio = own / other if metric == "images/s" else other / own
    target = "" if metric in NO_TARGET else "1x"
    return Row(case, metric, own, other, peer, ratio, varies, target, ratio > 1 if target else None)


NO_TARGET = ("p50, ms", "images/s", "ms to the answer")


def _figures(rounds: Sequence[Round]) -> dict[tuple[str, str], Figure]:
    """Return each figure, over all rounds, and its spread."""
    latencies = [latency for one in rounds for latency in one.latencies]
    stopped, answered = ([value for one in rounds for value in getattr(one, name)] for name in ("stopped", "answered"))
    latency, training = "latency while it trains", "training under load"
    figures = {
        (latency, f"{name}, ms"): (
            quantile(latencies, share),
            spread([quantile(one.latencies, share) for one in rounds]),
        )
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }
    rates, exits = [one.rate for one in rounds], [one.exit for one in rounds]
    return figures | {
        (training, "images/s"): (statistics.median(rates), spread(rates)),
        ("cancel", "ms to the stop"): (statistics.median(stopped) * 1e3, spread(stopped)),
        ("cancel", "ms to the answer"): (statistics.median(answered) * 1e3, spread(answered)),
        ("SIGTERM", "ms to the exit"): (statistics.median(exits) * 1e3, spread(exits)),
    }


def notes_of(results: Mapping[str, Sequence[Round]]) -> list[str]:
    """Return, for each service, what the rows do not tell."""
    lines = []
    for name, rounds in results.items():
        idle = [latency for one in rounds for latency in one.idle]
        stopped = [seconds for one in rounds for seconds in one.stopped]
        lines.append(
            f"{name}: {sum(len(one.latencies) for one in rounds)} requests while it trained; without training "
            f"p50 {quantile(idle, 0.5):.2f} ms, p99 {quantile(idle, 0.99):.2f} ms, max {max(idle) * 1e3:.2f} ms; "
            f"{len(stopped)} cancellations, stopped after {max(stopped) * 1e3:.0f} ms at the latest; "
            f"steps lost by {len(rounds)} terminations: {sum(one.lost for one in rounds)}"
        )
    return lines


def draw(results: Mapping[str, Sequence[Round]], machine: Mapping[str, object]) -> None:
    """Draw ``benchmarks/results/service.png``: latencies as curves, and a point for each other measurement."""
    try:
        from matplotlib import figure as matplotlib_figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return
    figure = matplotlib_figure.Figure(figsize=(9, 5.5), layout="constrained")
    places = figure.subplot_mosaic([["latency"] * 3, ["images", "cancel", "exit"]])
    colors = dict(zip(results, ("tab:green", "tab:blue", "tab:cyan", "tab:orange", "tab:red"), strict=False))
    axes = places["latency"]
    for name, rounds in results.items():
        late = np.sort([latency * 1e3 for one in rounds for latency in one.latencies])
        axes.step(late, 1 - np.arange(len(late)) / len(late), color=colors[name], label=name)
    axes.axhline(0.01, color="black", linewidth=0.5, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="latency of GET /run while it trains, ms", ylabel="share slower")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.legend(frameon=False, loc="lower left")
    points: dict[str, tuple[str, Callable[[Round], list[float]]]] = {
        "images": ("images trained on a second", lambda one: [one.rate]),
        "cancel": ("ms from cancel to the stop", lambda one: [value * 1e3 for value in one.stopped]),
        "exit": ("ms from SIGTERM to the exit", lambda one: [one.exit * 1e3]),
    }
    for place, (title, values_of) in points.items():
        for row, (name, rounds) in enumerate(results.items()):
            values = [value for one in rounds for value in values_of(one)]
            places[place].scatter(values, [row] * len(values), color=colors[name], alpha=0.5, s=18)
            places[place].scatter(statistics.median(values), row, color="black", marker="|", s=300)
        places[place].set(title=title, xlim=(0, None), ylim=(len(results) - 0.5, -0.5))
        places[place].set_yticks(range(len(results)), list(results) if place == "images" else [""] * len(results))
        places[place].title.set_fontsize("medium")
    for axes in places.values():
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"A service that trains: {machine['cpu']}, {machine['cpus']} CPUs", fontsize="medium")
    figure.savefig(harness.RESULTS / "service.png", dpi=120)


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, for a look; writes no results")
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    sides = [*OURS, *(PEERS if PEERS_PYTHON.exists() else [])]
    choice.get("numba").warm_up(np.float32)  # compiles, once for all processes to come
    if not PEERS_PYTHON.exists():
        print("PyTorch is left out: there is no .venv-peers (make bench-service makes it)", file=sys.stderr)
    busy = f"the load average when the measurement began: {os.getloadavg()[0]:.2f}"
    delays = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        photos, network = Path(scratch) / "photos", Path(scratch) / "network.json"
        photos.mkdir()
        write_photos(photos, IMAGES)
        size = ORDER["image_size"]
        network.write_text(json.dumps(at.models.small_cnn(num_classes=CLASSES, image_shape=(size, size, 3)).to_json()))
        cases = {side.name: partial(_run_round, side, photos, network, delays) for side in sides}
        results = interleave(cases, 1 if arguments.quick else arguments.rounds)
    rows, notes = rows_of(results), [*notes_of(results), busy]
    if arguments.quick:
        print(harness.table(rows), *notes, sep="\n")
        return
    report("service", rows, versions(), notes)
    draw(results, harness.machine())


def _run_round(side: Side, photos: Path, network: Path, delays: random.Random) -> Round:
    return asyncio.run(one_round(side, photos, network, delays))


if __name__ == "__main__":
    main()
