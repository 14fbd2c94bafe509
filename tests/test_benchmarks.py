"""The benchmark of kernels: its rows say what was measured, and both ways to train on threads still work."""

from __future__ import annotations

import sys
import time
from asyncio.subprocess import PIPE, create_subprocess_exec
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import asynctrain as at
from benchmarks import executors, grpc, homes, hosts, kernels, service, serving, steps, trainers, training
from benchmarks.steps import Job

OURS = Job("asynctrain", "mlp")
EAGER, COMPILED = replace(OURS, side="PyTorch"), replace(OURS, side="PyTorch compiled")
CASE = kernels.Case("a step", OURS, [EAGER, COMPILED], {"PyTorch": 1.5})


def took(*seconds: float, digest: str = "same") -> list[dict[str, Any]]:
    return [{"seconds": {"128": value}, "digest": digest} for value in seconds]


def test_the_target_is_held_against_the_fastest_variant_of_a_peer() -> None:
    rows = list(kernels.rows_of(CASE, {OURS: took(1, 1, 9), EAGER: took(4, 4, 1), COMPILED: took(1, 2, 2)}))
    assert [(row.peer_name, row.ratio, row.met) for row in rows] == [
        ("PyTorch compiled, 2 threads", 2.0, True),
        ("PyTorch, 2 threads", 4.0, None),
    ]


def test_a_target_without_its_peer_is_neither_met_nor_missed() -> None:
    (row,) = kernels.rows_of(CASE, {OURS: took(1)})
    assert (row.target, row.ratio, row.met) == ("1.5x", None, None)


def test_one_run_with_other_bits_is_told() -> None:
    one_worker = replace(OURS, threads=1)
    (same,) = kernels.bit_rows({OURS: took(1, 1), one_worker: took(1, 1)})
    (other,) = kernels.bit_rows({OURS: took(1, 1), one_worker: [*took(1), *took(1, digest="other")]})
    assert (same.met, other.met) == (True, False)


def test_a_training_is_told_as_the_quickstart_has_it_and_as_it_is_fastest_in_either_home() -> None:
    def runs(*seconds: float) -> list[dict[str, float]]:
        return [{"seconds": value, "memory": 1e8} for value in seconds]

    targets = {training.CACHED: {trainers.TUNED: 1.5}}
    case = training.Case("MNIST", trainers.Job(trainers.OURS, "", "lenet", 28, 1, 64, 3, 1e-3), 3, 2, targets)
    default, numba, processes = (
        f"{training.CACHED}, {setting}" for setting in ("threads, numpy", "threads, numba", "processes, numba")
    )
    assert {default, numba, processes} < set(case.ours())
    ours = {default: runs(8, 9, 10), numba: runs(6, 5, 7), processes: runs(3, 3, 3)}
    results = ours | {"PyTorch, tuned, 0": runs(9, 9, 9)}
    rows = {(row.case, row.metric): (row.ratio, row.met) for row in training.rows_of(case, results, results)}
    assert rows[f"MNIST, {default}", "seconds"] == (1.0, False)
    assert rows[f"MNIST, {numba}", "seconds"] == (1.5, True)
    assert rows[f"MNIST, {processes}", "seconds"] == (3.0, True)


def test_accuracies_are_means_over_seeds_and_their_difference_has_an_error() -> None:
    row, note = training.accuracy_row("MNIST", [98.0, 99.0], [98.5, 99.5])
    assert (row.ours, row.peer, row.met) == (98.5, 99.0, False)
    assert note.endswith("-0.50 points, its standard error 0.71")


@pytest.fixture
def small(tmp_path: Path) -> Job:
    kernels.write(at.models.mlp(num_classes=10, image_shape=(5, 4, 1), hidden=(7,)), tmp_path, "small")
    return Job("asynctrain", "small", str(tmp_path), steps=3, warm_up=1, batches=(10,), microbatch=3)


def test_the_bare_threads_do_the_trainers_work_to_the_bit(small: Job) -> None:
    trained, bare = steps.train_asynctrain(small), steps.train_bare_threads(replace(small, side="bare threads"))
    untrained = steps.trainer_of(small, at.InlineExecutor()).initial_state().digest()
    assert trained["digest"] == bare["digest"] != untrained


def test_predictions_are_timed_for_each_batch_size(small: Job) -> None:
    job = replace(small, task="predict", batches=(1, 7))
    for predict in (steps.predict_on_threads, steps.predict_inline):
        assert all(predict(job)["seconds"][size] > 0 for size in ("1", "7"))


def test_the_cost_of_serving_is_that_of_a_training_against_itself_round_by_round() -> None:
    def one(serving_images: int, alone_images: int, late: float) -> dict[str, Any]:
        slices = {"with": serving_images, "without": alone_images}
        told = {kind: {"images": count, "seconds": 2.0, "late": [late]} for kind, count in slices.items()}
        return {**told, "predictions": 40, "seconds": [0.01], "right": late < 1}

    fast, slow, wrong = one(900, 1000, 0.011), one(80, 100, 0.011), one(90, 100, 2.0)
    good, bad = serving.CASES
    rows = serving.rows_of({good: [fast, fast, slow], bad: [slow, slow, wrong], serving.BUSY: [[0.002], [0.002]]})
    told = {(row.case, row.metric): row for row in rows}
    assert [told[case, "images/s"].ratio for case in (good, bad)] == pytest.approx([0.9, 0.8])
    for metric in ("images/s", "p99 late, ms", "right answers"):
        assert [told[case, metric].met for case in (good, bad)] == [True, False]


def test_rounds_on_processes_are_held_against_a_bare_loop_and_two_workers_against_one() -> None:
    results: dict[str, list[Any]] = {executors.IDLE: [[0.001] * 10]}
    for size in executors.SIZES:
        results |= {f"round, Dask, {size} MB": [0.02], f"round, bare Dask, {size} MB": [0.03 / size]}
        results |= {f"round, processes, {size} MB": [0.003, 0.003], f"round, bare loop, {size} MB": [0.002, 0.001]}
        results[f"bytes, {size} MB"] = [{"moved": 100, "allowed": 99 + size}]
    for size in executors.ALLOWED:
        results[f"heartbeat, {size} MB"] = [[0.001] * 8 + [0.021] * 2]
    results |= {"microbatches, processes, 1": [10.0], "microbatches, processes, 2": [18.0]}
    met = {row.case: (row.ratio, row.met) for row in executors.rows_of(results)}
    assert met["round, processes, 1 MB"][0] == pytest.approx(0.5)
    assert met["round, processes, 1 MB"][1] is False
    dask = (
        [met[f"round, Dask, {size} MB"][1] for size in executors.SIZES] if executors.HAS_DASK else [None, False, False]
    )
    assert dask == [None, False, False]
    assert met["two workers, processes, 100 ms each"] == (1.8, True)
    assert [met[f"bytes, {size} MB"][1] for size in executors.SIZES] == [True, True, True]
    assert [met[f"heartbeat, {size} MB"][1] for size in (10, 100)] == [False, True]


async def test_the_bare_loop_and_the_executors_give_the_gradients_that_each_round_checks() -> None:
    for rounds in (homes.bare_rounds(0.01), homes.executor_rounds(at.ProcessExecutor(2), 0.01)):
        async with rounds as round_:
            assert len(await homes.timed(round_, 1, 2)) == 2


@pytest.mark.parametrize("rounds", [hosts.bare_rounds, hosts.grpc_rounds, partial(hosts.grpc_rounds, encrypted=True)])
async def test_bare_sockets_and_grpc_give_the_gradients_that_each_round_checks(rounds: grpc.Rounds) -> None:
    async with rounds(0.1) as round_:
        assert len(await homes.timed(round_, 1, 2)) == 2


def test_grpc_is_held_against_bare_sockets_and_the_service_against_what_is_asked() -> None:
    results: dict[str, list[Any]] = {executors.IDLE: [[0.001] * 10]}
    results |= {f"round, bare loop, {size} MB": [0.002] for size in grpc.SIZES}
    results |= {"round, gRPC, 1 MB": [0.011], "round, gRPC, 10 MB": [0.004], "round, gRPC, 100 MB": [0.006]}
    results |= {"round, mutual TLS, 10 MB": [0.006], "round, mutual TLS, 100 MB": [0.012]}
    results |= {"microbatches, 1": [20.0], "microbatches, 2": [34.0], "intake": [150.0, 250.0, 190.0]}
    results["heartbeat"] = [{"late": [0.001, 0.049], "taken": 100}, {"late": [0.002], "taken": 300}]
    met = {row.case: row.met for row in grpc.rows_of(results)}
    assert met == {
        "round, gRPC, 1 MB": False,
        "round, gRPC, 10 MB": True,
        "round, gRPC, 100 MB": False,
        "round, mutual TLS, 10 MB": True,
        "round, mutual TLS, 100 MB": False,
        "two workers, 50 ms each": True,
        "TrainModel, raw images": False,
        "the service's loop": True,
    }
    assert "about 200 MB" in grpc.notes_of(results)[2]


def served(late: float, rate: float, stopped: float) -> service.Round:
    return service.Round([0.001] * 99 + [late], [0.001], rate, [stopped], [stopped], exit=stopped, lost=0)


def test_a_service_is_better_where_it_answers_sooner_ends_sooner_and_trains_more() -> None:
    fast, slow = served(0.01, 300, 0.1), served(0.04, 150, 0.2)
    two, one = (side.name for side in service.PEERS)
    results = {side.name: [fast, fast] for side in service.OURS}
    rows = service.rows_of(results | {two: [slow, slow], one: [served(0.005, 600, 0.05)] * 2})
    for side in service.OURS:
        told = {(row.peer_name, row.case, row.metric): (row.ratio, row.met) for row in rows if side.name in row.case}
        for peer, ratio, met in ((two, 4, True), (one, 0.5, False)):
            found = told[peer, f"{side.name}: latency while it trains", "max, ms"]
            assert found[0] == pytest.approx(ratio)
            assert found[1] is met
        assert told[two, f"{side.name}: training under load", "images/s"] == (2, None)
        assert told[one, f"{side.name}: training under load", "images/s"] == (0.5, None)
        for case, metric in (("cancel", "ms to the stop"), ("SIGTERM", "ms to the exit")):
            assert [told[peer, f"{side.name}: {case}", metric][1] for peer in (two, one)] == [True, False]


def test_the_rate_counts_from_when_a_step_was_seen_first_to_when_another_was() -> None:
    assert service.rate_of({7: 1.0, 8: 1.5, 11: 3.0}) == 4 * service.ORDER["batch_size"] / 2.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the CPU time of other processes")
async def test_a_process_is_quiet_from_the_moment_when_it_no_longer_computes() -> None:
    code = "import time\nend = time.perf_counter() + 0.3\nwhile time.perf_counter() < end: pass\n"
    code += "print(time.perf_counter(), flush=True)\ntime.sleep(30)"
    start = time.perf_counter()
    process = await create_subprocess_exec(sys.executable, "-c", code, stdout=PIPE)
    try:
        seconds = await service.until_quiet(process.pid, start)
        assert process.stdout is not None
        ended = float(await process.stdout.readline()) - start
        assert seconds == pytest.approx(ended, abs=0.1)
    finally:
        process.kill()
        await process.wait()
