"""Schedules: their shape, their ends, their JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from asynctrain.optim import Schedule, constant, cosine, schedules


def test_constant_is_the_same_at_each_step() -> None:
    assert [constant(0.5)(step) for step in (0, 1, 10**9)] == [0.5] * 3


def test_warm_up_rises_in_equal_parts_and_reaches_the_value_at_its_last_step() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 1.0]
    assert [constant(1.0, warmup=4)(step) for step in range(5)] == pytest.approx(expected)
    assert [cosine(1.0, steps=10, warmup=4)(step) for step in range(5)] == pytest.approx(expected)


def test_cosine_falls_from_its_peak_through_the_middle_to_its_end_and_stays_there() -> None:
    schedule = cosine(1.0, steps=120, warmup=20, end=0.2)
    assert schedule(20) == 1.0
    assert schedule(45) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert schedule(70) == pytest.approx(0.6)
    assert schedule(120) == schedule(10**6) == pytest.approx(0.2)
    falling = [schedule(step) for step in range(20, 121)]
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize("rate", [0.1, constant(0.1, warmup=5), cosine(0.1, steps=7, end=0.01)], ids=repr)
def test_a_learning_rate_comes_back_from_its_json(rate: float | Schedule) -> None:
    assert schedules.from_json(json.loads(json.dumps(schedules.to_json(rate)))) == rate


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant(-1.0), "constant: value must not be negative, got -1.0"),
        (lambda: cosine(-1.0, 10), "cosine: peak must not be negative, got -1.0"),
        (lambda: cosine(1.0, 10, end=-1.0), "cosine: end must not be negative, got -1.0"),
        (lambda: cosine(1.0, 10, warmup=10), r"cosine: warmup must be below steps \(10\), got 10"),
        (lambda: cosine(1.0, 0), r"cosine: warmup must be below steps \(0\), got 0"),
        (lambda: schedules.from_json({"name": "square"}), "one of constant, cosine, got 'square'"),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
