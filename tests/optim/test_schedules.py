"""Schedules: their shape, their ends, their JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from asynctrain.optim import (
    Schedule,
    constant,
    cosine,
    cosine_restarts,
    exponential,
    linear,
    one_cycle,
    schedules,
    stepwise,
)


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


def test_linear_goes_straight_from_its_peak_to_its_end_and_stays_there() -> None:
    schedule = linear(1.0, steps=12, warmup=2, end=0.5)
    assert [schedule(step) for step in (2, 7, 12, 10**6)] == pytest.approx([1.0, 0.75, 0.5, 0.5])


def test_restarts_begin_anew_after_each_period_longer_and_lower_each_time() -> None:
    schedule = cosine_restarts(1.0, period=10, growth=2, decay=0.5, warmup=5, end=0.2)
    starts = [5, 15, 35, 75]
    assert [schedule(step) for step in starts] == pytest.approx([0.2 + 0.8 * 0.5**n for n in range(4)])
    assert [schedule(step) for step in (10, 25)] == pytest.approx([0.6, 0.4])
    assert all(schedule(step - 1) < schedule(step) for step in starts[1:])


@pytest.mark.parametrize("growth", [1, 3])
def test_each_period_is_half_a_cosine_of_its_length(growth: int) -> None:
    schedule = cosine_restarts(1.0, period=4, growth=growth)
    begin = 0
    for cycle in range(4):
        length = 4 * growth**cycle
        half = cosine(1.0, steps=length)
        assert [schedule(begin + step) for step in range(length)] == [half(step) for step in range(length)]
        begin += length


def test_one_cycle_rises_and_falls_on_cosines_between_its_three_heights() -> None:
    schedule = one_cycle(1.0, steps=100)
    assert [schedule(step) for step in (0, 15, 30, 65, 100, 10**6)] == pytest.approx(
        [0.04, 0.52, 1.0, (1 + 1e-4) / 2, 1e-4, 1e-4]
    )
    assert max(range(100), key=schedule) == 30
    assert one_cycle(1.0, steps=100, warmup=0)(0) == 1.0


def test_stepwise_is_multiplied_at_each_boundary() -> None:
    schedule = stepwise(1.0, boundaries=(5, 8), factor=0.1, warmup=2)
    assert [schedule(step) for step in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_exponential_falls_by_its_factor_in_every_so_many_steps_down_to_its_end() -> None:
    schedule = exponential(1.0, factor=0.5, every=10, warmup=5, end=0.1)
    assert [schedule(step) for step in (5, 10, 15, 25, 1000)] == pytest.approx([1.0, math.sqrt(0.5), 0.5, 0.25, 0.1])


EACH = [
    constant(0.1, warmup=5),
    linear(0.1, steps=9, warmup=5, end=0.01),
    cosine(0.1, steps=7, warmup=5, end=0.01),
    cosine_restarts(0.1, period=7, growth=2, decay=0.5, warmup=5, end=0.01),
    one_cycle(0.1, steps=20, warmup=5, start_divisor=5.0),
    stepwise(0.1, boundaries=(8, 10), factor=0.5, warmup=5),
    exponential(0.1, factor=0.9, warmup=5),
]


@pytest.mark.parametrize("schedule", EACH, ids=repr)
def test_every_schedule_rises_over_its_warm_up_to_its_peak(schedule: Schedule) -> None:
    rises = [schedule(step + 1) - schedule(step) for step in range(4)]
    assert min(rises) > 0 < schedule(0)
    assert max(schedule(step) for step in range(50)) == pytest.approx(0.1)
    assert schedule(5) == pytest.approx(0.1)


@pytest.mark.parametrize("rate", [0.1, one_cycle(0.1, steps=10), *EACH], ids=repr)
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
        (lambda: linear(1.0, 10, warmup=11), r"linear: warmup must be below steps \(10\), got 11"),
        (lambda: cosine_restarts(1.0, 0), "cosine_restarts: period must be at least 1, got 0"),
        (lambda: cosine_restarts(1.0, 5, growth=0), "cosine_restarts: growth must be at least 1, got 0"),
        (lambda: one_cycle(1.0, 10, warmup=10), r"one_cycle: warmup must be below steps \(10\), got 10"),
        (lambda: one_cycle(1.0, 10, end_divisor=0.5), "one_cycle: end_divisor must be at least 1, got 0.5"),
        (lambda: stepwise(1.0, (5, 5)), r"stepwise: boundaries must rise and .*, got \(5, 5\)"),
        (lambda: stepwise(1.0, (5, 9), warmup=6), r"not begin before warmup \(6\), got \(5, 9\)"),
        (lambda: exponential(1.0, factor=0.0), "exponential: factor must be above 0 and at most 1, got 0.0"),
        (lambda: exponential(1.0, factor=0.5, every=0), "exponential: every must be at least 1, got 0"),
        (lambda: schedules.from_json({"name": "square"}), "one of constant, linear, .*, exponential, got 'square'"),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
