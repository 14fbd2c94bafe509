"""Optimizers made of optimizers: groups, freezing, accumulation, averages."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from asynctrain import optim
from asynctrain.arena import digest
from asynctrain.optim import State, Transform
from asynctrain.types import Params

RNG = np.random.default_rng(0)
PARAMS: Params = {
    "conv1/weight": RNG.standard_normal((3, 3, 2, 4)),
    "conv1/bias": np.array([-0.0, 0.0, 1.0, -2.0]),
    "norm1/scale": RNG.standard_normal(4),
    "head/weight": RNG.standard_normal((4, 5)),
    "head/bias": RNG.standard_normal(5),
}
GRADS: list[Params] = [{name: RNG.standard_normal(p.shape) for name, p in PARAMS.items()} for _ in range(8)]


def trained(optimizer: Transform, grads: Sequence[Params] = GRADS, params: Params = PARAMS) -> tuple[Params, State]:
    state = optimizer.init(params)
    for step, g in enumerate(grads):
        updates, state = optimizer.update(g, state, params, step)
        params = optim.apply_updates(params, updates)
    return params, state


def assert_same(one: Params, other: Params, names: Sequence[str] = tuple(PARAMS)) -> None:
    for name in names:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# Groups


def test_each_parameter_goes_as_under_the_optimizer_of_the_first_pattern_that_fits() -> None:
    sgd, adam, rms = optim.sgd(0.1, momentum=0.9), optim.adam(0.01), optim.rmsprop(0.01)
    optimizer = optim.groups({"head/*": sgd, "*/bias": adam, "*": rms})
    params, _ = trained(optimizer)
    assert_same(params, trained(sgd)[0], ["head/weight", "head/bias"])
    assert_same(params, trained(adam)[0], ["conv1/bias"])
    assert_same(params, trained(rms)[0], ["conv1/weight", "norm1/scale"])
    assert {slot: list(arrays) for slot, arrays in optimizer.init(PARAMS).items()} == {
        "trace": ["head/weight", "head/bias"],
        "mu": ["conv1/bias"],
        "nu": ["conv1/weight", "conv1/bias", "norm1/scale"],
    }


def test_the_order_of_groups_survives_json_that_sorts_its_keys() -> None:
    optimizer = optim.groups({"head/*": optim.sgd(0.1), "*/bias": optim.sgd(0.2), "*": optim.adam(0.3)})
    again = optim.from_json(json.loads(json.dumps(optimizer.to_json(), sort_keys=True)))
    assert_same(trained(again)[0], trained(optimizer)[0])


def test_a_norm_inside_of_groups_is_that_of_the_group() -> None:
    clipped = optim.chain(optim.clip_by_global_norm(0.1), optim.sgd(0.1))
    params, _ = trained(optim.groups({"head/*": clipped, "*": optim.sgd(0.1)}), GRADS[:1])
    own = {name: GRADS[0][name] for name in ("head/weight", "head/bias")}
    norm = np.sqrt(sum(np.sum(g**2) for g in own.values()))
    for name, g in own.items():
        np.testing.assert_allclose(params[name], PARAMS[name] - 0.1 * g * 0.1 / norm, rtol=1e-12)
    assert_same(params, trained(optim.sgd(0.1), GRADS[:1])[0], ["conv1/weight"])


# Freezing


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.sgd(0.1, momentum=0.9, weight_decay=0.5),
        optim.adamw(0.1, weight_decay=0.5),
        optim.accumulate(optim.sgd(1.0), 3),
    ],
    ids=repr,
)
def test_frozen_parameters_do_not_move_a_bit_and_the_others_go_as_ever(optimizer: Transform) -> None:
    params, _ = trained(optim.freeze(optimizer, "conv1/*"))
    frozen = ["conv1/weight", "conv1/bias"]
    assert digest({name: params[name] for name in frozen}) == digest({name: PARAMS[name] for name in frozen})
    assert_same(params, trained(optimizer)[0], ["norm1/scale", "head/weight", "head/bias"])


def test_frozen_parameters_do_not_count_in_the_norm() -> None:
    clipped = optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(1.0))
    params, _ = trained(optim.freeze(clipped, "conv1/*", "norm1/*"), GRADS[:1])
    moved = sum(np.sum((params[name] - PARAMS[name]) ** 2) for name in PARAMS)
    assert moved == pytest.approx(0.25, rel=1e-12)


def test_all_may_be_frozen() -> None:
    params, state = trained(optim.freeze(optim.adam(0.1), "*"))
    assert digest(params) == digest(PARAMS)
    assert not any(state.values())


# Accumulation


@pytest.mark.parametrize(
    "inner",
    [
        optim.adamw(optim.linear(0.1, steps=4)),
        optim.sgd(0.1, momentum=0.9),
        optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(0.1)),
    ],
    ids=repr,
)
def test_accumulated_steps_are_one_step_with_the_mean_gradient(inner: Transform) -> None:
    means = [{name: (GRADS[i][name] + GRADS[i + 1][name]) / 2 for name in PARAMS} for i in (0, 2, 4)]
    expected, expected_state = trained(inner, means)
    params, state = trained(optim.accumulate(inner, steps=2), GRADS[:6])
    assert_same(params, expected)
    assert not any(total.any() for total in state["accumulated"].values())
    for slot, arrays in expected_state.items():
        assert_same(state[slot], arrays)


def test_nothing_moves_between_two_applications() -> None:
    optimizer = optim.accumulate(optim.adamw(0.1, weight_decay=0.5), steps=3)
    assert digest(trained(optimizer, GRADS[:2])[0]) == digest(PARAMS)
    after_three = digest(trained(optimizer, GRADS[:3])[0])
    assert after_three == digest(trained(optimizer, GRADS[:5])[0]) != digest(PARAMS)


def test_one_accumulated_step_is_the_optimizer_itself() -> None:
    assert_same(trained(optim.accumulate(optim.adam(0.1), steps=1))[0], trained(optim.adam(0.1))[0])


# Averages


def test_averaged_weights_are_the_running_mean_and_do_not_change_training() -> None:
    params, state = trained(optim.average_weights(optim.sgd(0.1, momentum=0.9), decay=0.3))
    average = PARAMS
    for t in range(1, len(GRADS) + 1):
        d = min(0.3, t / (9 + t))
        p = trained(optim.sgd(0.1, momentum=0.9), GRADS[:t])[0]
        average = {name: d * average[name] + (1 - d) * p[name] for name in PARAMS}
    assert_same(params, trained(optim.sgd(0.1, momentum=0.9))[0])
    for name in PARAMS:
        np.testing.assert_allclose(state["average"][name], average[name], rtol=1e-12, atol=1e-14)


def test_the_average_of_a_parameter_that_stays_is_the_parameter_to_the_bit() -> None:
    _, state = trained(optim.average_weights(optim.freeze(optim.sgd(0.1), "conv1/*")))
    names = ["conv1/weight", "conv1/bias"]
    np.testing.assert_array_equal(state["average"][names[0]], PARAMS[names[0]])
    np.testing.assert_array_equal(state["average"][names[1]], PARAMS[names[1]])


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.groups({}), "groups: optimizers must have at least one pattern, got none"),
        (
            lambda: trained(optim.groups({"conv1/*": optim.sgd(0.1)})),
            r"one of the patterns conv1/\* must .*, got norm1/scale",
        ),
        (lambda: trained(optim.freeze(optim.sgd(0.1), "conv2/*")), r"each pattern must fit one of .*, got conv2/\*"),
        (lambda: optim.freeze(optim.sgd(0.1)), r"freeze: patterns must be one or more, .*, got none"),
        (lambda: optim.accumulate(optim.sgd(0.1), 0), "steps must be at least 1, got 0"),
        (lambda: optim.average_weights(optim.sgd(0.1), 1.0), "decay must be at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# Delaying


@pytest.mark.parametrize(
    "optimizer",
    [optim.adamw(optim.cosine(0.1, steps=5, warmup=2)), optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1))],
)
def test_a_delayed_optimizer_moves_nothing_and_then_begins_as_if_that_were_the_first_step(optimizer: Transform) -> None:
    delayed = optim.from_json(optim.delayed(optimizer, 3).to_json())
    still, state = trained(delayed, GRADS[:3])
    assert digest(still) == digest(PARAMS)
    assert all(not array.any() for arrays in state.values() for array in arrays.values())
    params, state = trained(delayed, GRADS)
    expected, expected_state = trained(optimizer, GRADS[3:])
    assert_same(params, expected)
    for slot, arrays in expected_state.items():
        assert_same(state[slot], arrays)


def test_a_delay_of_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        optim.delayed(optim.sgd(0.1), 0)
