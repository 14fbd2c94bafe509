"""What is particular to Dask: workers that come, go, freeze and differ, and what the executor starts itself."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, Security
from distributed.batched import BatchedSend

import asynctrain as at
from asynctrain import nn
from asynctrain.errors import ClosedError, FingerprintError, WorkerLostError
from asynctrain.executors.ledger import Patience
from asynctrain.types import GradientResult, GradientWork, Notice, Program, Speculated, WorkerJoined, WorkerLost
from tests.executors.dask_clusters import HOST, ROOT, DaskCluster
from tests.executors.dask_faults import hold, schedule
from tests.executors.process_layers import Counting, Gate, wait_for
from tests.executors.schedules import train, undisturbed
from tests.processes import children, is_alive

pytestmark = [pytest.mark.timeout(120), pytest.mark.one_loop]

LARGE = nn.Model([nn.Flatten(), nn.Dense(400), nn.ReLU(), nn.Dense(10)], (28, 28, 1))  # 1.3 MB of parameters
PROGRAM = Program(LARGE.to_json(), seed=1)
PARAMS = LARGE.init(0)
RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 256, (16, 28, 28, 1), dtype=np.uint8), RNG.integers(0, 10, 16)
WORK = [GradientWork(0, i, 2, IMAGES[8 * i : 8 * i + 8], LABELS[8 * i : 8 * i + 8]) for i in range(2)]
FOREIGN = {"OPENBLAS_CORETYPE": "Nehalem"}  # other kernels, other bits
GONE = 2.0  # seconds in which workers have noticed that the program is no more


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskCluster]:
    """Have a cluster of two workers, for tests that do it no harm."""
    with DaskCluster(tmp_path_factory.mktemp("dask"), workers=2) as cluster:
        yield cluster


@pytest.fixture
def lone(tmp_path: Path) -> Iterator[DaskCluster]:
    """Have a cluster of one worker."""
    with DaskCluster(tmp_path, workers=1) as cluster:
        yield cluster


async def gradients(executor: at.Executor) -> list[bytes]:
    async with executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        return [(await session.compute(work, 0)).gradients.vector.tobytes() for work in WORK]


async def until(holds: Any) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - other processes know no event
            await asyncio.sleep(0.02)


# Its own workers


def surroundings() -> list[Any]:
    """Return what a program may have set up, and wants to find again: signal handlers, and those of logs."""
    loggers = logging.getLogger(), logging.getLogger("distributed")
    handlers = [(handler, handler.level) for logger in loggers for handler in logger.handlers]
    return [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM)), *handlers]


def workers_besides(others: list[int]) -> list[int]:
    new = (process for process in descendants(os.getpid()) if process not in others)
    return [process for process in new if "distributed.Worker" in command(process)]


async def test_without_an_address_it_starts_workers_of_its_own_and_nothing_of_them_is_left() -> None:
    before, others = surroundings(), descendants(os.getpid())
    notices: list[Notice] = []
    async with at.DaskExecutor(workers=2) as executor, at.InlineExecutor() as inline:
        assert (await train(executor)).digest == (await train(executor)).digest == undisturbed()
        assert await gradients(executor) == await gradients(inline), "large results come straight from the workers"
        async with executor.open(PROGRAM, notices.append) as session:
            await until(lambda: session.slots == 2)
            processes = [process for process in descendants(os.getpid()) if process not in others]
    joined = [notice.address for notice in notices if isinstance(notice, WorkerJoined)]
    assert len(joined) == 2
    assert all(address.startswith(f"tcp://{HOST}:") for address in joined), "nobody else may reach them"
    assert surroundings() == before
    assert len(processes) == 4, "a keeper, a scheduler, two workers"
    assert not any(map(is_alive, processes))


async def test_workers_of_its_own_may_take_longer_to_start_than_work_waits_for_one() -> None:
    async with at.DaskExecutor(workers=1, worker_wait=0.05) as executor:
        assert (await train(executor)).digest == undisturbed()


async def test_a_worker_of_its_own_that_dies_is_replaced() -> None:
    notices: list[Notice] = []
    others = descendants(os.getpid())
    async with at.DaskExecutor(workers=1) as executor, executor.open(PROGRAM, notices.append) as session:
        await session.broadcast(PARAMS, {}, 0)
        await session.compute(WORK[0], 0)
        (worker,) = workers_besides(others)
        os.kill(worker, signal.SIGKILL)
        await session.compute(WORK[1], 0)
    assert [type(notice) for notice in notices] == [WorkerJoined, WorkerLost, WorkerJoined]


async def test_closing_it_under_an_open_session_ends_the_session_and_the_workers() -> None:
    executor = at.DaskExecutor(workers=1)
    async with executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        await executor.aclose()
        with pytest.raises(ClosedError):
            await session.compute(WORK[0], 0)


async def test_cancelled_while_its_workers_start_it_leaves_none() -> None:
    executor = at.DaskExecutor(workers=1)
    others = descendants(os.getpid())
    opening = asyncio.create_task(gradients(executor))
    await until(lambda: workers_besides(others))
    processes = [process for process in descendants(os.getpid()) if process not in others]
    opening.cancel()
    await asyncio.wait([opening])
    assert opening.cancelled()
    assert not any(map(is_alive, processes))
    await executor.aclose()


HOLDER = """
import asyncio, os, asynctrain as at
from tests.executors.test_dask import PARAMS, PROGRAM, WORK, descendants

async def main():
    async with at.DaskExecutor(workers=2) as executor, executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        await asyncio.gather(*(session.compute(work, 0) for work in WORK))
        print(*descendants(os.getpid()), flush=True)
        await asyncio.sleep(SECONDS)

asyncio.run(main())
"""


def hold_workers(seconds: float, scratch: Path) -> subprocess.Popen[str]:
    """Start a program that has workers of its own, tells their ids, and keeps them for some seconds."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER.replace("SECONDS", str(seconds))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
    )


def test_a_program_that_ends_says_nothing_of_it_and_leaves_no_file(tmp_path: Path) -> None:
    with hold_workers(0, tmp_path) as program:
        told, complaints = program.communicate(timeout=60)
    assert len(told.split()) == 4
    assert complaints == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_the_program_is_killed_its_workers_and_their_files_go_too(tmp_path: Path, number: signal.Signals) -> None:
    with hold_workers(60, tmp_path) as program:
        assert program.stdout is not None
        processes = [int(pid) for pid in program.stdout.readline().split()]
        assert len(processes) == 4
        assert list(tmp_path.iterdir())
        program.send_signal(number)
    end = time.monotonic() + GONE
    while any(map(is_alive, processes)) or list(tmp_path.iterdir()):
        assert time.monotonic() < end, f"still there: {processes} or {list(tmp_path.iterdir())}"
        time.sleep(0.02)


def test_when_the_keeper_is_killed_nothing_stays_either(tmp_path: Path) -> None:
    with hold_workers(60, tmp_path) as program:
        assert program.stdout is not None
        processes = [int(pid) for pid in program.stdout.readline().split()]
        (keeper,) = (process for process in processes if "keeper.py" in command(process))
        os.kill(keeper, signal.SIGKILL)
        end = time.monotonic() + GONE
        while any(map(is_alive, processes)):
            assert time.monotonic() < end, f"still there: {processes}"
            time.sleep(0.02)
        program.kill()


def descendants(pid: int) -> list[int]:
    """Return the ids of the processes that ``pid`` has started, and of those that they have."""
    found = []
    for child in children(pid):
        if "multiprocessing" not in command(child):  # Python's own, which is there before
            found += [child, *descendants(child)]
    return found


def command(pid: int) -> str:
    try:
        return Path("/proc", str(pid), "cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return ""


# Clusters of others


async def test_a_cluster_may_grow_while_a_session_is_open(lone: DaskCluster) -> None:
    notices: list[Notice] = []
    async with at.DaskExecutor(lone.address) as executor:
        assert (await train(executor)).digest == undisturbed()
        async with executor.open(PROGRAM, notices.append) as session:
            assert session.slots == 1
            for _ in range(2):
                lone.add_worker()
            await until(lambda: session.slots == 3)
        assert (await train(executor)).digest == undisturbed()
    assert [type(notice) for notice in notices] == [WorkerJoined] * 3


async def test_a_client_of_the_callers_own_stays_the_callers(steady: DaskCluster) -> None:
    async with Client(steady.address, asynchronous=True, set_as_default=False) as client:
        async with at.DaskExecutor(client=client) as executor:
            assert (await train(executor)).digest == undisturbed()
        assert await client.submit(len, "dask") == 4


async def test_layers_of_ones_own_are_imported_there(steady: DaskCluster, tmp_path: Path) -> None:
    model = nn.Model([Counting(folder=str(tmp_path)), nn.Flatten(), nn.Dense(10)], (28, 28, 1))
    async with (
        at.DaskExecutor(steady.address) as executor,
        executor.open(Program(model.to_json())) as session,
    ):
        await session.broadcast(model.init(0), {}, 0)
        await asyncio.gather(*(session.compute(work, 0) for work in WORK))
    assert (tmp_path / "count").read_text() == ".."


async def test_what_is_queued_when_a_session_is_left_is_not_computed(steady: DaskCluster, tmp_path: Path) -> None:
    layers = Counting(folder=str(tmp_path)), Gate(folder=str(tmp_path)), nn.Flatten(), nn.Dense(10)
    model = nn.Model(layers, (28, 28, 1))

    def computed() -> int:
        return len((tmp_path / "count").read_text())

    async with (
        at.DaskExecutor(steady.address) as executor,
        Client(steady.address, asynchronous=True, set_as_default=False) as client,
    ):
        async with executor.open(Program(model.to_json())) as session:
            await session.broadcast(model.init(0), {}, 0)
            tasks = [asyncio.create_task(session.compute(WORK[0], 0)) for _ in range(100)]
            await asyncio.to_thread(wait_for, tmp_path / "count")
            (tmp_path / "open").touch()  # the others are queued by now, and are so when the session is left
        until_left = computed()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert {ClosedError} <= {type(outcome) for outcome in outcomes} <= {GradientResult, ClosedError}
        async with asyncio.timeout(30):  # what the scheduler was still reading goes to workers, which return it undone
            while any((await client.processing()).values()):  # noqa: ASYNC110 - Dask does not tell
                await asyncio.sleep(0.02)
        assert computed() == until_left < 100


@pytest.mark.parametrize("at_work", [False, True], ids=["idle", "amid work"])
async def test_a_session_says_nothing_to_the_scheduler_after_its_goodbye(
    steady: DaskCluster, monkeypatch: pytest.MonkeyPatch, at_work: bool
) -> None:
    said: list[str] = []
    send = BatchedSend.send

    def heard(self: BatchedSend, *messages: dict[str, Any]) -> None:
        said.extend(message["op"] for message in messages)
        send(self, *messages)

    monkeypatch.setattr(BatchedSend, "send", heard)
    async with at.DaskExecutor(steady.address) as executor:
        async with executor.open(PROGRAM) as session:
            await session.broadcast(PARAMS, {}, 0)
            await session.compute(WORK[0], 0)
            tasks = [asyncio.create_task(session.compute(WORK[1], 0)) for _ in range(20 * at_work)]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
    assert "client-releases-keys" in said
    assert said[-2:] == ["close-client", "close-stream"], "or Dask logs a broken connection, now and then"


async def test_no_scheduler_is_an_error_that_says_so() -> None:
    async with at.DaskExecutor(f"tcp://{HOST}:1", worker_wait=0.5) as executor:
        with pytest.raises(WorkerLostError, match="no Dask scheduler answers"):
            await gradients(executor)


async def test_no_worker_is_an_error_once_one_was_waited_for(tmp_path: Path) -> None:
    with DaskCluster(tmp_path, workers=0) as cluster:
        async with at.DaskExecutor(cluster.address, worker_wait=0.5) as executor:
            with pytest.raises(WorkerLostError, match=r"there was no worker for 0\.5 s"):
                await gradients(executor)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the kernels are named after x86 CPUs")
async def test_a_worker_that_would_give_other_bits_has_no_part(lone: DaskCluster) -> None:
    notices: list[Notice] = []
    async with at.DaskExecutor(lone.address) as executor:
        async with executor.open(PROGRAM, notices.append) as session:
            await session.broadcast(PARAMS, {}, 0)
            lone.add_worker(FOREIGN)
            await until(lambda: any(isinstance(notice, WorkerLost) for notice in notices))
            assert session.slots == 1
            for _ in range(3):
                await session.compute(WORK[0], 0)
        with pytest.raises(FingerprintError, match="Nehalem"):
            await gradients(executor)
    (lost,) = [notice for notice in notices if isinstance(notice, WorkerLost)]
    assert "the same bits cannot be promised" in lost.reason


def certificates(folder: Path) -> dict[str, str]:
    """Make an authority and a certificate by it; return what ``Security`` calls the files."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    openssl("req", *key, "-keyout", "own.key", "-out", "own.csr", "-subj", "/CN=own")
    openssl("x509", "-req", "-in", "own.csr", "-out", "own.pem", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
    return {"ca_file": str(folder / "ca.pem"), "cert": str(folder / "own.pem"), "key": str(folder / "own.key")}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no command openssl to make certificates with")
async def test_tls_is_that_of_distributed(tmp_path: Path) -> None:
    def security(files: dict[str, str]) -> Security:
        return Security(
            require_encryption=True,
            tls_ca_file=files["ca_file"],
            tls_client_cert=files["cert"],
            tls_client_key=files["key"],
        )

    (tmp_path / "foreign").mkdir()
    own, foreign = security(files := certificates(tmp_path)), security(certificates(tmp_path / "foreign"))
    with DaskCluster(tmp_path, workers=2, tls=files) as cluster:
        assert cluster.address.startswith("tls://")
        notices: list[Notice] = []
        async with at.DaskExecutor(cluster.address, security=own) as executor, at.InlineExecutor() as inline:
            assert await gradients(executor) == await gradients(inline)
            assert (await train(executor)).digest == undisturbed()
            async with executor.open(PROGRAM, notices.append):
                pass
        joined = [notice.address for notice in notices if isinstance(notice, WorkerJoined)]
        assert joined
        assert all(address.startswith("tls://") for address in joined), "the workers' connections are encrypted too"
        async with (
            Client(cluster.address, security=own, asynchronous=True, set_as_default=False) as client,
            at.DaskExecutor(client=client) as executor,
        ):
            assert (await train(executor)).digest == undisturbed()
        async with at.DaskExecutor(cluster.address, security=foreign, worker_wait=1.0) as executor:
            with pytest.raises(WorkerLostError, match="no Dask scheduler answers"):
                await gradients(executor)


# Faults


async def test_work_of_a_frozen_worker_is_done_by_one_that_joins_later(lone: DaskCluster) -> None:
    notices: list[Notice] = []
    async with (
        at.DaskExecutor(lone.address, patience=Patience(floor=0.2)) as executor,
        executor.open(PROGRAM, notices.append) as session,
    ):
        await session.broadcast(PARAMS, {}, 0)
        await session.compute(WORK[0], 0)
        lone.workers[0].send_signal(signal.SIGSTOP)
        awaited = asyncio.create_task(session.compute(WORK[1], 0))
        await asyncio.sleep(1.0)  # by now it has looked for another one, in vain
        lone.add_worker()
        async with asyncio.timeout(20):
            await awaited
    joined = [notice.address for notice in notices if isinstance(notice, WorkerJoined)]
    speculated = [notice for notice in notices if isinstance(notice, Speculated)]
    assert [(notice.instead_of, notice.step, notice.microbatch) for notice in speculated] == [(joined[0], 0, 1)]


async def test_a_scheduler_that_dies_is_an_error_and_no_hang(lone: DaskCluster) -> None:
    async with Client(lone.address, asynchronous=True, set_as_default=False) as client:
        await client.wait_for_workers(1)  # which takes longer than work waits below
    async with at.DaskExecutor(lone.address, worker_wait=1.0) as executor, executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        await session.compute(WORK[0], 0)

        async def compute_on() -> None:
            while True:
                await session.compute(WORK[1], 0)

        lone.kill_scheduler()
        with pytest.raises(WorkerLostError):
            await asyncio.wait_for(compute_on(), 20)


@pytest.mark.parametrize("seed", range(2))
async def test_whatever_happens_to_workers_the_bits_are_those_of_a_training_without(tmp_path: Path, seed: int) -> None:
    await hold(schedule(seed), tmp_path)


# Arguments and imports


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"address": "tcp://host:1", "client": "a client"}, "either address or client"),
        ({"address": "tcp://host:1", "workers": 2}, "a running cluster has workers of its own"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"security": "keys"}, "got security without address"),
        ({"worker_wait": -1.0}, "worker_wait must be at least 0 seconds, got -1.0"),
    ],
    ids=["two clusters", "workers of a running cluster", "no workers", "keys of no cluster", "a wait below zero"],
)
def test_arguments_that_contradict_each_other_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        at.DaskExecutor(**arguments)


def run(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)


def test_dask_is_imported_when_it_is_asked_for() -> None:
    code = (
        "import sys, asynctrain as at\n"
        "assert not {'dask', 'distributed'} & sys.modules.keys()\n"
        "at.DaskExecutor\n"
        "assert 'distributed' in sys.modules\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_without_the_extra_it_names_what_to_install() -> None:
    done = run("import sys; sys.modules['distributed'] = None; import asynctrain; asynctrain.DaskExecutor")
    assert 'DaskExecutor needs Dask: pip install "asynctrain[dask]"' in done.stderr
