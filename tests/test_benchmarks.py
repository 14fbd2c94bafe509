"""The benchmark of kernels: its rows say what was measured, and both ways to train on threads still work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import asynctrain as at
from benchmarks import kernels, steps
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
