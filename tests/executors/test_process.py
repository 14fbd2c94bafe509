"""What is particular to worker processes: they die, freeze and are replaced, and memory is shared with them."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from blockbuster import BlockBuster
from nbclient import NotebookClient

import asynctrain as at
from asynctrain import nn
from asynctrain.arena import Arena, Layout, digest
from asynctrain.errors import ClosedError, ExecutorError, RemoteError, WorkerLostError
from asynctrain.executors import process, shared_memory, worker_process
from asynctrain.executors.process import ProcessExecutor
from asynctrain.executors.shared_memory import MEMORY_FILES, Block
from asynctrain.types import ForwardWork, GradientWork, Notice, Params, Program, WorkerJoined
from tests.executors import process_faults
from tests.executors.process_layers import PATIENCE, Counting, End, Failing, Gate, Loud
from tests.processes import is_alive

pytestmark = pytest.mark.one_loop

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 4, 4, 1), dtype=np.uint8)
LABELS = RNG.integers(0, 3, 6)
WORK = GradientWork(0, 0, 1, IMAGES, LABELS)


def model(*layers: nn.Layer) -> nn.Model:
    return nn.Model([nn.Flatten(), nn.Dense(5), *layers, nn.Dense(3)], input_shape=(4, 4, 1))


PLAIN = model(nn.ReLU())


def of(net: nn.Model) -> Program:
    return Program(net.to_json(), seed=1)


class Told:
    """The notices of a session, and when each of them came."""

    def __init__(self) -> None:
        self.notices: list[Notice] = []
        self.times: list[float] = []
        self._news = asyncio.Event()

    def __call__(self, notice: Notice) -> None:
        self.notices.append(notice)
        self.times.append(time.monotonic())
        self._news.set()

    async def of(self, kind: type[Notice], number: int = 1) -> tuple[Any, float]:
        """Wait for the ``number``-th notice of this kind; return it and its time."""
        async with asyncio.timeout(PATIENCE):
            while True:
                found = [i for i, notice in enumerate(self.notices) if isinstance(notice, kind)]
                if len(found) >= number:
                    return self.notices[found[number - 1]], self.times[found[number - 1]]
                self._news.clear()
                await self._news.wait()


async def until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for happens in other processes
            await asyncio.sleep(0.002)


def pid_of(notice: Notice) -> int:
    return int(notice.address.split()[1])


def entered(folder: Path) -> list[Path]:
    return list(folder.glob("entered-*"))


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def bits(executor: at.Executor, net: nn.Model = PLAIN, work: GradientWork = WORK) -> bytes:
    async with executor.open(of(net)) as session:
        await session.broadcast(net.init(0), {}, 0)
        result = await session.compute(work, 0)
        try:
            return result.gradients.vector.tobytes()
        finally:
            result.release()


# Workers that go


async def test_a_killed_worker_is_noticed_at_once_its_work_done_elsewhere_and_its_place_taken(tmp_path: Path) -> None:
    ending = model(End(str(tmp_path)))
    told = Told()
    async with at.InlineExecutor() as reference:
        expected = await bits(reference, ending)
    async with ProcessExecutor(2) as executor, executor.open(of(ending), told) as session:
        await session.broadcast(ending.init(0), {}, 0)
        (tmp_path / "die-0").touch()
        start = time.monotonic()
        result = await session.compute(WORK, 0)
        assert time.monotonic() - start < 0.5
        assert result.gradients.vector.tobytes() == expected
        lost, when = await told.of(at.types.WorkerLost)
        assert "its process was ended by signal 9" in lost.reason
        joined, then = await told.of(WorkerJoined, 3)
        assert then - when < 2.0
        assert pid_of(joined) != pid_of(lost)
        assert not exists(pid_of(lost)), "and it has been buried"
        assert session.slots == 2


async def test_a_worker_that_is_killed_while_idle_is_noticed_within_a_tenth_of_a_second() -> None:
    told = Told()
    async with ProcessExecutor(1) as executor, executor.open(of(PLAIN), told) as session:
        await session.broadcast(PLAIN.init(0), {}, 0)
        joined, _ = await told.of(WorkerJoined)
        start = time.monotonic()
        os.kill(pid_of(joined), signal.SIGKILL)
        _, noticed = await told.of(at.types.WorkerLost)
        assert noticed - start < 0.1
        await session.compute(WORK, 0)  # by the next, which was given the parameters


async def test_a_frozen_worker_is_noticed_within_the_heartbeat_and_a_second_and_wakes_up_to_nothing(
    tmp_path: Path,
) -> None:
    freezing = model(End(str(tmp_path), signal.SIGSTOP))
    told = Told()
    async with at.InlineExecutor() as reference:
        expected = await bits(reference, freezing)
    async with ProcessExecutor(2, heartbeat=1.0) as executor, executor.open(of(freezing), told) as session:
        await session.broadcast(freezing.init(0), {}, 0)
        (tmp_path / "die-0").touch()
        start = time.monotonic()
        result = await session.compute(WORK, 0)  # the worker stops in the middle of writing its gradients
        lost, noticed = await told.of(at.types.WorkerLost)
        assert "has not answered for 1 s" in lost.reason
        assert noticed - start < 2.0
        assert result.gradients.vector.tobytes() == expected
        await until(lambda: not exists(pid_of(lost)))


async def test_other_sessions_on_a_lost_worker_go_on_too(tmp_path: Path) -> None:
    ending = model(End(str(tmp_path)))
    async with (
        ProcessExecutor(1) as executor,
        executor.open(of(ending)) as first,
        executor.open(of(PLAIN)) as second,
    ):
        await first.broadcast(ending.init(0), {}, 0)
        await second.broadcast(PLAIN.init(0), {}, 0)
        (tmp_path / "die-0").touch()
        results = await asyncio.gather(*(session.compute(WORK, 0) for session in (first, second, first, second)))
    bits = [result.gradients.vector.tobytes() for result in results]
    assert bits[0] == bits[2]
    assert bits[1] == bits[3]


async def test_a_session_that_no_worker_lives_for_fails_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    async with ProcessExecutor(1, worker_wait=0.2) as executor, executor.open(of(PLAIN), told) as session:
        await session.broadcast(PLAIN.init(0), {}, 0)
        monkeypatch.setattr(worker_process, "COMMAND", "asynctrain.there_is_no_such_module")
        joined, _ = await told.of(WorkerJoined)
        os.kill(pid_of(joined), signal.SIGKILL)
        await told.of(at.types.WorkerLost)
        with pytest.raises(WorkerLostError, match=r"there was no worker for 0\.2 s; the last .* signal 9"):
            await session.compute(WORK, 0)


async def test_processes_that_do_not_start_are_an_error_when_the_session_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_process, "COMMAND", "asynctrain.there_is_no_such_module")
    async with ProcessExecutor(2) as executor:
        with pytest.raises(ExecutorError, match="its process ended with status 1"):
            async with executor.open(of(PLAIN)):
                pass


# Ends


async def test_workers_are_gone_when_the_executor_is_closed_the_frozen_ones_too() -> None:
    told = Told()
    async with ProcessExecutor(2) as executor, executor.open(of(PLAIN), told):
        pids = [pid_of((await told.of(WorkerJoined, number))[0]) for number in (1, 2)]
        os.kill(pids[0], signal.SIGSTOP)
        start = time.monotonic()
        await executor.aclose(grace=0.2)
        assert time.monotonic() - start < 1.0
        assert not any(map(exists, pids))


async def test_workers_end_at_once_in_the_middle_of_a_kernel(tmp_path: Path) -> None:
    slow = model(Gate(str(tmp_path)))
    executor = ProcessExecutor(1)
    async with executor.open(of(slow)) as session:
        await session.broadcast(slow.init(0), {}, 0)
        task = asyncio.create_task(session.compute(WORK, 0))
        await until(lambda: entered(tmp_path))
        start = time.monotonic()
        await executor.aclose()
        assert time.monotonic() - start < 0.5, "nobody had to kill it"
        with pytest.raises(ClosedError):
            await task


@pytest.mark.parametrize("frozen", [False, True])
def test_workers_go_with_a_parent_that_is_killed(tmp_path: Path, frozen: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())
        assert becomes(lambda: entered(tmp_path), PATIENCE)  # one of them computes
        if frozen:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
        parent.kill()
        assert becomes(lambda: not any(map(is_alive, pids)), 2.0)  # to bury them is for the system's first process


def becomes(condition: Callable[[], object], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return bool(condition())


SCRIPT = """
import asyncio, json, sys

import numpy as np

import asynctrain as at
from asynctrain import nn
from asynctrain.executors.process import ProcessExecutor
from asynctrain.types import GradientWork, Program
from tests.executors.process_layers import Gate

net = nn.Model([nn.Flatten(), nn.Dense(5), Gate(sys.argv[1]), nn.Dense(3)], input_shape=(4, 4, 1))
told = []


async def main():
    async with ProcessExecutor(2) as executor:
        async with executor.open(Program(net.to_json()), told.append) as session:
            print(json.dumps([int(notice.address.split()[1]) for notice in told]), flush=True)
            await session.broadcast(net.init(0), {}, 0)
            await session.compute(GradientWork(0, 0, 1, np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int64)), 0)
    print("done")


asyncio.run(main())  # without a guard: a worker that ran this file would start workers
"""


@pytest.fixture(autouse=True)
def modules_of_the_tests_for_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def test_a_script_without_a_main_guard_trains(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "open").touch()
    done = subprocess.run([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[1:] == ["done"]


NOTEBOOK = """
import asynctrain as at, numpy as np
from asynctrain.executors.process import ProcessExecutor
net = at.models.mlp(num_classes=3, image_shape=(4, 4, 1))
data = at.ArrayDataset(np.zeros((8, 4, 4, 1), np.uint8), np.arange(8) % 3)
async with ProcessExecutor(2) as executor:
    trainer = at.Trainer(net, optimizer=at.optim.sgd(0.1), executor=executor)
    history = await trainer.fit(at.Loader(data, batch_size=8, image_size=(4, 4), channels=1), epochs=1)
print("steps", history.state.step)
"""


def test_a_notebook_trains() -> None:
    cell = nbformat.v4.new_code_cell(NOTEBOOK)  # type: ignore[no-untyped-call]
    notebook = nbformat.v4.new_notebook(cells=[cell])  # type: ignore[no-untyped-call]
    asyncio.run(NotebookClient(notebook, timeout=60).async_execute())
    assert "steps 1" in notebook.cells[0].outputs[0].text


async def test_ctrl_c_is_left_to_the_parent() -> None:
    told = Told()
    async with ProcessExecutor(1) as executor, executor.open(of(PLAIN), told) as session:
        await session.broadcast(PLAIN.init(0), {}, 0)
        joined, _ = await told.of(WorkerJoined)
        os.kill(pid_of(joined), signal.SIGINT)
        await session.compute(WORK, 0)
    assert [type(notice) for notice in told.notices] == [WorkerJoined]


# Cancelling


async def test_cancelling_stops_before_the_next_layer_and_leaves_the_session_usable(tmp_path: Path) -> None:
    stopping = model(Gate(str(tmp_path)), Counting(str(tmp_path)))
    async with ProcessExecutor(1) as executor, executor.open(of(stopping)) as session:
        await session.broadcast(stopping.init(0), {}, 0)
        task = asyncio.create_task(session.compute(WORK, 0))
        await until(lambda: entered(tmp_path))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        (tmp_path / "open").touch()
        await session.compute(WORK, 0)
    assert (tmp_path / "count").read_text() == ".", "the layer after the one that ran belongs to the second computation"


async def test_leaving_a_session_waits_for_the_kernel_under_way(tmp_path: Path) -> None:
    slow = model(Gate(str(tmp_path)))
    events: list[str] = []

    def let_go() -> None:
        events.append("let go")
        (tmp_path / "open").touch()

    async with ProcessExecutor(1) as executor:
        async with executor.open(of(slow)) as session:
            await session.broadcast(slow.init(0), {}, 0)
            task = asyncio.create_task(session.compute(WORK, 0))
            await until(lambda: entered(tmp_path))
            asyncio.get_running_loop().call_later(0.05, let_go)
        events.append("session left")
    assert events == ["let go", "session left"]
    with pytest.raises(ClosedError):
        await task


@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL])
async def test_what_a_worker_has_no_room_for_is_sent_later_or_dropped_with_it(then: signal.Signals) -> None:
    told = Told()
    async with ProcessExecutor(1, heartbeat=PATIENCE) as executor, executor.open(of(PLAIN), told) as session:
        await session.broadcast(PLAIN.init(0), {}, 0)
        expected = (await session.compute(WORK, 0)).gradients.vector.tobytes()
        pid = pid_of(told.notices[0])
        os.kill(pid, signal.SIGSTOP)
        for _ in range(400):  # a socket has room for about half of their messages
            task = asyncio.create_task(session.compute(WORK, 0))
            for _ in range(3):  # until it is sent
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
        os.kill(pid, then)
        assert (await session.compute(WORK, 0)).gradients.vector.tobytes() == expected
    lost = [notice for notice in told.notices if not isinstance(notice, WorkerJoined)]
    assert len(lost) == (then == signal.SIGKILL)


# Memory


async def test_gradients_are_read_where_the_worker_wrote_them_and_stay_until_they_are_released() -> None:
    async with ProcessExecutor(1) as executor:
        async with executor.open(of(PLAIN)) as session:
            await session.broadcast(PLAIN.init(0), {}, 0)
            first = await session.compute(WORK, 0)
            assert first.gradients.vector.ctypes.data % 64 == 0
            kept = first.gradients.vector.tobytes()
            second = await session.compute(replace(WORK, labels=(LABELS + 1) % 3), 0)
            assert not np.shares_memory(first.gradients.vector, second.gradients.vector)
            assert first.gradients.vector.tobytes() == kept != second.gradients.vector.tobytes()
            address = second.gradients.vector.ctypes.data
            second.release()
            third = await session.compute(WORK, 0)
            assert third.gradients.vector.ctypes.data == address, "the slot that was released serves again"
        assert first.gradients.vector.tobytes() == kept, "what a caller holds outlives the session"


async def test_many_results_may_be_held_at_once() -> None:
    async with ProcessExecutor(2) as executor, executor.open(of(PLAIN)) as session:
        await session.broadcast(PLAIN.init(0), {}, 0)
        works = [replace(WORK, microbatch=i, of=20, labels=(LABELS + i) % 3) for i in range(20)]
        results = await asyncio.gather(*(session.compute(work, 0) for work in works))
        held = [result.gradients.vector.tobytes() for result in results]
    assert len(set(held)) == 3
    assert all(held[i] == held[i % 3] for i in range(20))


async def test_the_parameters_of_a_version_are_written_once_and_the_next_in_another_place(tmp_path: Path) -> None:
    gated = model(Gate(str(tmp_path)))
    (tmp_path / "open").touch()
    async with at.InlineExecutor() as reference:
        expected = await bits(reference, gated)
    async with ProcessExecutor(1) as executor, executor.open(of(gated)) as session:
        params = gated.init(0)
        await session.broadcast(params, {}, 0)
        (tmp_path / "open").unlink()
        for path in entered(tmp_path):
            path.unlink()
        task = asyncio.create_task(session.compute(WORK, 0))
        await until(lambda: entered(tmp_path))
        for version in (1, 2, 3):
            params.vector[:] += 1.0
            await session.broadcast(params, {}, version)
        (tmp_path / "open").touch()
        assert (await task).gradients.vector.tobytes() == expected, "what it reads is not written"


async def test_large_parameters_and_pixels_travel_whole_and_are_copied_in_a_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copiers = []

    def noted(params: Params, into: Arena, argument: str) -> None:
        copiers.append(threading.current_thread())
        shared_memory.write(params, into, argument)

    monkeypatch.setattr(process, "write", noted)
    wide = nn.Model([nn.Flatten(), nn.Dense(40)], input_shape=(128, 96, 1))
    images = RNG.integers(0, 256, (100, 128, 96, 1), dtype=np.uint8)  # both of more than a megabyte
    work = GradientWork(0, 0, 1, images, RNG.integers(0, 40, 100))
    async with at.InlineExecutor() as reference, ProcessExecutor(1) as executor:
        assert await bits(executor, wide, work) == await bits(reference, wide, work)
    assert copiers
    assert threading.main_thread() not in copiers


async def test_cancelled_while_pixels_are_copied_nothing_is_computed_and_the_session_stays_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = nn.Model([Counting(str(tmp_path)), nn.Flatten(), nn.Dense(3)], input_shape=(128, 96, 1))
    images = RNG.integers(0, 256, (100, 128, 96, 1), dtype=np.uint8)  # more than a megabyte
    work = GradientWork(0, 0, 1, images, RNG.integers(0, 3, 100))
    copying, may_copy = threading.Event(), threading.Event()
    plain_write = process._Inputs.write

    def slow_write(inputs: process._Inputs, block: Block) -> None:
        copying.set()
        assert may_copy.wait(PATIENCE)
        plain_write(inputs, block)

    monkeypatch.setattr(process._Inputs, "write", slow_write)
    async with at.InlineExecutor() as reference:
        expected = await bits(reference, wide, work)
    (tmp_path / "count").unlink()
    async with ProcessExecutor(1) as executor, executor.open(of(wide)) as session:
        await session.broadcast(wide.init(0), {}, 0)
        task = asyncio.create_task(session.compute(work, 0))
        await until(copying.is_set)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        may_copy.set()
        assert (await session.compute(work, 0)).gradients.vector.tobytes() == expected
    assert (tmp_path / "count").read_text() == "."


async def test_parameters_may_be_any_mapping_and_those_of_another_model_are_refused() -> None:
    params = PLAIN.init(0)
    backwards = Layout(dict(reversed(list(params.layout.shapes.items()))), params.layout.dtype).empty()
    for name, array in params.items():
        backwards[name][...] = array
    async with ProcessExecutor(1) as executor, executor.open(of(PLAIN)) as session:
        results = []
        for version, given in enumerate((params, dict(params), backwards)):
            await session.broadcast(given, {}, version)
            results.append((await session.compute(WORK, version)).gradients.vector.tobytes())
        assert results[0] == results[1] == results[2]
        with pytest.raises(ValueError, match="params must have the names of the program's model"):
            await session.broadcast({"dense1/weight": params["dense1/weight"]}, {}, 3)
        with pytest.raises(ValueError, match=r"params\['dense1/bias'\] must be float32 of shape \(5,\), got float64"):
            await session.broadcast({**params, "dense1/bias": np.zeros(5)}, {}, 3)


async def test_the_padding_between_gradients_is_zero() -> None:
    async with ProcessExecutor(1) as executor, executor.open(of(PLAIN)) as session:
        await session.broadcast(PLAIN.init(0), {}, 0)
        gradients = (await session.compute(WORK, 0)).gradients
    assert np.count_nonzero(gradients.vector) <= sum(array.size for array in gradients.values()) < gradients.vector.size


def names() -> set[Path]:
    return set(MEMORY_FILES.iterdir()) if MEMORY_FILES.is_dir() else set()


async def test_a_system_without_anonymous_memory_has_files_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    named = names()
    async with at.InlineExecutor() as reference, ProcessExecutor(1) as executor:
        assert await bits(executor) == await bits(reference)
    assert names() == named


def test_a_block_outlives_its_descriptor_and_is_zero_at_first() -> None:
    block = Block.create(100)
    block.close()
    block.close()
    array = block.array(64, (9,), np.dtype(np.float32))
    assert not array.any()
    assert array.ctypes.data % 64 == 0


# Errors, and what layers do


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("value", ValueError, "^no such luck"),
        ("odd", RemoteError, r"process \d+: OddError: no such luck"),
        ("stop", RemoteError, r"process \d+: StopIteration: no such luck"),
    ],
)
async def test_an_error_of_the_work_comes_with_the_traceback_over_there(
    kind: str, error: type[Exception], message: str
) -> None:
    failing = model(Failing(kind))
    async with ProcessExecutor(1) as executor, executor.open(of(failing)) as session:
        await session.broadcast(failing.init(0), {}, 0)
        with pytest.raises(error, match=message) as caught:
            await session.compute(WORK, 0)
    assert "process_layers.py" in "".join(caught.value.__notes__)


async def test_what_a_layer_prints_goes_to_standard_error(capfd: pytest.CaptureFixture[str]) -> None:
    loud = model(Loud())
    async with ProcessExecutor(1) as executor:
        await bits(executor, loud)
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "a layer was here" in printed.err


async def test_a_layer_of_the_main_script_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Loud, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    async with ProcessExecutor(1) as executor:
        with pytest.raises(ValueError, match="must be in a module that worker processes can import"):
            async with executor.open(of(model(Loud()))):
                pass


async def test_a_program_that_workers_cannot_open_is_an_error_and_the_executor_stays_usable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ProcessExecutor(2) as executor:
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(Loud, "__module__", "there_is_no_such_module")
            with pytest.raises(ModuleNotFoundError, match="there_is_no_such_module"):
                async with executor.open(of(model(Loud()))):
                    pass
        assert await bits(executor)


async def test_closed_sessions_leave_no_memory_mapped_anywhere() -> None:
    told = Told()

    def mapped() -> list[int]:
        processes = [os.getpid(), pid_of(told.notices[0])]
        return [Path(f"/proc/{pid}/maps").read_text().count("memfd:asynctrain") for pid in processes]

    async with ProcessExecutor(1) as executor:
        async with executor.open(of(PLAIN), told):
            pass
        for _ in range(3):
            await bits(executor)
        gc.collect()
        await until(lambda: mapped() == [0, 0])


async def test_predictions_use_the_running_statistics_of_their_version() -> None:
    normed = nn.Model([nn.Conv2D(3, 3), nn.BatchNorm(), nn.Flatten(), nn.Dense(3)], input_shape=(4, 4, 1))
    state = normed.init_state()
    state.vector += 0.5

    async def outputs(executor: at.Executor) -> bytes:
        async with executor.open(of(normed)) as session:
            await session.broadcast(normed.init(0), state, 0)
            result = await session.compute(ForwardWork(IMAGES, LABELS), 0)
            assert result.sums.samples == 6
            return result.outputs.tobytes()

    async with at.InlineExecutor() as reference, ProcessExecutor(1) as executor:
        assert await outputs(executor) == await outputs(reference)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"heartbeat": 0.0}, "heartbeat must be above 0 seconds"),
        ({"worker_wait": -1.0}, "worker_wait must be at least 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProcessExecutor(**arguments)


# Whole trainings


async def trained(executor: at.Executor, net: nn.Model, steps: int = 6) -> str:
    data = at.ArrayDataset(
        np.random.default_rng(5).integers(0, 256, (8 * steps, 4, 4, 1), dtype=np.uint8), np.arange(8 * steps) % 3
    )
    loader = at.Loader(data, batch_size=8, image_size=(4, 4), channels=1, seed=2)
    trainer = at.Trainer(net, optimizer=at.optim.adamw(0.01), executor=executor, microbatch=3, seed=3)
    history = await trainer.fit(loader, epochs=1)
    return digest(history.state.params)


@pytest.mark.parametrize("seed", [3, 4])
async def test_a_training_in_which_workers_are_killed_and_frozen_ends_with_the_bits_of_one_without(
    tmp_path: Path, seed: int
) -> None:
    plan = process_faults.schedule(seed)
    training = process_faults.Training(tmp_path, plan)
    async with at.InlineExecutor() as executor:
        expected = await training.run(executor)
    async with process_faults.executor_for(plan) as executor:
        assert await training.run(executor) == expected


async def test_training_never_blocks_the_loop(no_blocking_calls: BlockBuster) -> None:
    async with ProcessExecutor(2) as executor:
        await trained(executor, PLAIN)
