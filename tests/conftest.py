"""What every test runs under: both event loops, and nothing may be left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop
from blockbuster import BlockBuster, blockbuster_ctx
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.processes import children

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if "CI" in os.environ else "local")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("asyncio", {"debug": True}), id="asyncio"),
        pytest.param(("asyncio", {"debug": False, "use_uvloop": True}), id="uvloop"),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, bool]]:
    """Run each async test on asyncio's own loop, in debug mode, and on uvloop without, as it is used.

    Debug mode takes a stack for each future, all of pytest's frames included: half of the time of many a test.
    """
    backend: tuple[str, dict[str, bool]] = request.param
    return backend


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Return a folder of 2 x 20 RGB images, 12 x 12, which a linear model tells apart: reddish and greenish noise."""
    rng = np.random.default_rng(0)
    for channel, name in enumerate(["rose", "tulip"]):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 100, (12, 12, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(tmp_path / "flowers" / name / f"{number:02}.png")
    return tmp_path / "flowers"


@pytest.fixture
def no_blocking_calls() -> Iterator[BlockBuster]:
    """Make calls that block the loop (sleep, file and socket access, ...) fail when asynctrain makes them."""
    with blockbuster_ctx("asynctrain") as blockbuster:
        yield blockbuster


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Module | pytest.Class, name: str, obj: object) -> None:
    """Have ``no_task_left`` around each async test."""
    if collector.istestfunction(obj, name):
        function = obj.hypothesis.inner_test if hasattr(obj, "hypothesis") else obj
        if inspect.iscoroutinefunction(function):
            pytest.mark.usefixtures("no_task_left")(obj)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let ``make soak`` ask for what ``make test`` leaves out."""
    parser.addoption("--other-loop", action="store_true", help="run tests marked one_loop on asyncio's own loop")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the tests marked ``one_loop`` on uvloop, which is the faster one, or else on the other loop alone."""
    left_out = "uvloop" if config.getoption("--other-loop") else "asyncio"

    def is_left_out(item: pytest.Item) -> bool:
        loop = item.callspec.params.get("anyio_backend") if hasattr(item, "callspec") else None
        return loop is not None and item.get_closest_marker("one_loop") is not None and name_of(loop) == left_out

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = [item for item in items if not is_left_out(item)]


def name_of(loop: tuple[str, dict[str, bool]]) -> str:
    """Return the name of an ``anyio_backend``."""
    return "uvloop" if loop[1].get("use_uvloop") else "asyncio"


@given(st.none())
def one_example(_: None) -> None:
    """Let Hypothesis make the generator it keeps for the thread."""


def pytest_collection_finish() -> None:
    """Take modules and tests, which stay, out of the garbage collector's sight: which would look at them each time."""
    one_example()  # Hypothesis warns of a generator that the collector sees no owner of
    gc.collect()
    gc.freeze()


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    """Fail an async test that ends before a task it started."""
    before = tasks()
    yield
    if ending := set(filter(is_of_a_library, tasks() - before)):
        await asyncio.wait(ending, timeout=5)  # a cancelled call, or a write to who is gone, ends some turns later
    left = tasks() - before
    assert not left, f"tasks left behind: {left}"


def is_of_a_library(task: asyncio.Task[object]) -> bool:
    """Return whether gRPC or Dask has made ``task`` of a coroutine of its own."""
    work = task.get_coro()
    code = getattr(work, "cr_code", None)
    of_dask = code is not None and f"{os.sep}distributed{os.sep}comm{os.sep}" in code.co_filename
    return of_dask or getattr(work, "__qualname__", "").startswith("_AioCall.")


@pytest.fixture(autouse=True)
def nothing_left(warm_loops: None) -> Iterator[None]:
    """Fail a test that leaves a thread, a child process or an open file behind."""
    before = threading.enumerate(), children(), open_files()
    yield
    if leftovers(*before):
        gc.collect()  # what only awaits the garbage collector holds nothing that a user could miss
    deadline = time.monotonic() + 5
    while "grpc" in sys.modules and leftovers(*before) and time.monotonic() < deadline:
        time.sleep(0.02)  # gRPC closes what it has opened in threads of its own, after its last object has gone
        gc.collect()
    left = leftovers(*before)
    assert not left, f"left behind: {', '.join(left)}"


@pytest.fixture(scope="session")
def warm_loops() -> None:
    """Let the loops, and Python, open what they keep for the life of the process.

    libuv has a pipe of its own, and multiprocessing a process that clears up shared memory should ours be killed.
    """
    resource_tracker.ensure_running()
    for factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory, debug=True) as runner:
            runner.run(asyncio.to_thread(os.getpid))


def leftovers(threads: list[threading.Thread], processes: set[int], files: dict[int, str]) -> list[str]:
    """Name what is there now and is not among the arguments; a thread that Dask keeps for life is left out."""
    ours = [thread for thread in threading.enumerate() if not thread.name.startswith("Dask-Offload")]
    return [
        *(f"thread {thread.name}" for thread in ours if thread not in threads),
        *(f"process {pid}" for pid in children() - processes),
        *(f"file {number} ({target})" for number, target in open_files().items() - files.items()),
    ]


def tasks() -> set[asyncio.Task[Any]]:
    """Return the tasks of this loop, those of anyio's test runner aside."""
    return {
        task
        for task in asyncio.all_tasks()
        if not getattr(task.get_coro(), "__qualname__", "").startswith("TestRunner.")
    }


def open_files() -> dict[int, str]:
    """Return what each file descriptor of this process points to; empty where the system does not tell.

    Fonts are left out, which matplotlib keeps open, a bounded number of them, for the life of the process.
    """
    files = {}
    with contextlib.suppress(FileNotFoundError):
        for entry in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(FileNotFoundError):  # the descriptor that the listing itself was read by
                files[int(entry.name)] = str(entry.readlink())
    return {number: target for number, target in files.items() if not target.endswith(".ttf")}
