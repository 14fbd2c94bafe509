"""Optimizers against closed forms and against references that know no numpy, in Python floats."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest

from asynctrain import optim
from asynctrain.arena import Array, digest
from asynctrain.optim import Transform
from asynctrain.types import Params

GRADIENTS = [0.5, -1.25, 2.0, 0.0, -0.125, 3.0]

Reference = Callable[[float, list[float]], list[float]]


def run(optimizer: Transform, start: float, gradients: list[float], shape: tuple[int, ...] = (1, 1)) -> list[float]:
    """Return the parameter after each step, for one element and the gradients given."""
    params: Params = {"w": np.full(shape, start)}
    state = optimizer.init(params)
    path = []
    for step, g in enumerate(gradients):
        updates, state = optimizer.update({"w": np.full(shape, g)}, state, params, step)
        params = optim.apply_updates(params, updates)
        path.append(float(params["w"].flat[0]))
    return path


def sgd_reference(lr: float, momentum: float, nesterov: bool, decay: float) -> Reference:
    def reference(p: float, gradients: list[float]) -> list[float]:
        path, m = [], 0.0
        for gradient in gradients:
            g = gradient + decay * p
            m = momentum * m + g
            p -= lr * (g + momentum * m if nesterov else m)
            path.append(p)
        return path

    return reference


def adam_reference(lr: float, b1: float, b2: float, eps: float, decay: float) -> Reference:
    def reference(p: float, gradients: list[float]) -> list[float]:
        path, mu, nu = [], 0.0, 0.0
        for t, g in enumerate(gradients, start=1):
            mu = b1 * mu + (1 - b1) * g
            nu = b2 * nu + (1 - b2) * g**2
            p -= lr * (mu / (1 - b1**t) / (math.sqrt(nu / (1 - b2**t)) + eps) + decay * p)
            path.append(p)
        return path

    return reference


def nadam_reference(lr: float, b1: float, b2: float, eps: float) -> Reference:
    def reference(p: float, gradients: list[float]) -> list[float]:
        path, mu, nu = [], 0.0, 0.0
        for t, g in enumerate(gradients, start=1):
            mu = b1 * mu + (1 - b1) * g
            nu = b2 * nu + (1 - b2) * g**2
            ahead = b1 * mu / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
            p -= lr * ahead / (math.sqrt(nu / (1 - b2**t)) + eps)
            path.append(p)
        return path

    return reference


def rmsprop_reference(lr: float, decay: float, eps: float, centered: bool, momentum: float) -> Reference:
    def reference(p: float, gradients: list[float]) -> list[float]:
        path, square, mean, m = [], 0.0, 0.0, 0.0
        for g in gradients:
            square = decay * square + (1 - decay) * g**2
            mean = decay * mean + (1 - decay) * g
            m = momentum * m + g / (math.sqrt(square - mean**2 if centered else square) + eps)
            p -= lr * m
            path.append(p)
        return path

    return reference


def adagrad_reference(lr: float, initial: float, eps: float) -> Reference:
    def reference(p: float, gradients: list[float]) -> list[float]:
        path, total = [], initial
        for g in gradients:
            total += g**2
            p -= lr * g / (math.sqrt(total) + eps)
            path.append(p)
        return path

    return reference


@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        (optim.sgd(0.1), sgd_reference(0.1, 0, False, 0)),
        (optim.sgd(0.1, weight_decay=0.3), sgd_reference(0.1, 0, False, 0.3)),
        (optim.sgd(0.1, momentum=0.9), sgd_reference(0.1, 0.9, False, 0)),
        (optim.sgd(0.1, momentum=0.9, weight_decay=0.3), sgd_reference(0.1, 0.9, False, 0.3)),
        (optim.sgd(0.1, momentum=0.8, nesterov=True, weight_decay=0.3), sgd_reference(0.1, 0.8, True, 0.3)),
        (optim.adam(0.1), adam_reference(0.1, 0.9, 0.999, 1e-8, 0)),
        (optim.adam(0.1, b1=0.0, b2=0.5, eps=0.1), adam_reference(0.1, 0.0, 0.5, 0.1, 0)),
        (optim.adamw(0.1, b1=0.7, weight_decay=0.3), adam_reference(0.1, 0.7, 0.999, 1e-8, 0.3)),
        (optim.nadam(0.1), nadam_reference(0.1, 0.9, 0.999, 1e-8)),
        (optim.nadam(0.1, b1=0.5, b2=0.9, eps=0.1), nadam_reference(0.1, 0.5, 0.9, 0.1)),
        (optim.rmsprop(0.1), rmsprop_reference(0.1, 0.9, 1e-8, False, 0)),
        (optim.rmsprop(0.1, decay=0.5, eps=0.1, momentum=0.9), rmsprop_reference(0.1, 0.5, 0.1, False, 0.9)),
        (optim.rmsprop(0.1, centered=True), rmsprop_reference(0.1, 0.9, 1e-8, True, 0)),
        (optim.rmsprop(0.1, centered=True, momentum=0.5), rmsprop_reference(0.1, 0.9, 1e-8, True, 0.5)),
        (optim.adagrad(0.1), adagrad_reference(0.1, 0.0, 1e-10)),
        (optim.adagrad(0.1, initial=0.5, eps=0.1), adagrad_reference(0.1, 0.5, 0.1)),
    ],
    ids=repr,
)
def test_an_optimizer_follows_its_paper(optimizer: Transform, reference: Reference) -> None:
    assert run(optimizer, 2.0, GRADIENTS) == pytest.approx(reference(2.0, GRADIENTS), rel=1e-12)


def test_momentum_under_a_constant_gradient_is_a_geometric_sum() -> None:
    steps, lr, m = 40, 0.01, 0.9
    expected = 1.0 - lr * sum((1 - m**t) / (1 - m) for t in range(1, steps + 1))
    assert run(optim.sgd(lr, momentum=m), 1.0, [1.0] * steps)[-1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_adam_under_a_constant_gradient_takes_steps_of_the_learning_rate(size: float) -> None:
    path = run(optim.adam(0.1, eps=1e-12), 0.0, [size] * 5)
    assert path == pytest.approx([-0.1, -0.2, -0.3, -0.4, -0.5], rel=1e-6)


@pytest.mark.parametrize("optimizer", [optim.sgd(0.1, weight_decay=0.5), optim.adamw(0.1, weight_decay=0.5)], ids=repr)
def test_weight_decay_pulls_weights_to_zero_and_spares_biases(optimizer: Transform) -> None:
    assert run(optimizer, 2.0, [0.0], shape=(3, 2)) == pytest.approx([2.0 * (1 - 0.1 * 0.5)])
    assert run(optimizer, 2.0, [0.0], shape=(3,)) == [2.0]


def test_adagrad_under_a_constant_gradient_takes_steps_that_fall_with_the_root_of_the_step() -> None:
    expected = [-sum(0.1 / math.sqrt(t) for t in range(1, last + 1)) for last in range(1, 6)]
    assert run(optim.adagrad(0.1), 0.0, [7.0] * 5) == pytest.approx(expected, rel=1e-9)


def test_centered_rmsprop_under_a_constant_gradient_divides_by_no_negative_variance() -> None:
    path = run(optim.rmsprop(1e-9, decay=0.5, eps=1.0, centered=True), 0.0, [1e-3] * 100)
    assert all(math.isfinite(p) for p in path)


def test_decay_reaches_vectors_where_it_is_told_to() -> None:
    for shape in [(3,), (), (2, 3)]:
        assert run(
            optim.chain(optim.add_decayed_weights(0.5, vectors=True), optim.sgd(0.1)), 2.0, [0.0], shape
        ) == pytest.approx([1.9])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "optimizer",
    [
        optim.sgd(0.1, momentum=0.9),
        optim.adam(0.1, b2=0.9),
        optim.rmsprop(0.1, decay=0.9),
        optim.rmsprop(0.1, decay=0.9, centered=True),
    ],
    ids=lambda optimizer: str(optimizer.name),
)
def test_where_gradients_stay_zero_running_means_become_zero_and_no_subnormal_number(
    optimizer: Transform, dtype: type
) -> None:
    params: Params = {"w": np.ones(3, dtype)}
    state = optimizer.init(params)
    subnormal = 0
    for step in range(10_000):
        gradient: Array = np.array([step < 5, 1.0, 1e-25 if dtype == np.float32 else 1e-250], dtype)
        updates, state = optimizer.update({"w": gradient}, state, params, step)
        means = np.concatenate([slot["w"][:2] for slot in state.values()])
        subnormal += bool(((means != 0) & (np.abs(means) < np.finfo(dtype).tiny)).any())
    assert subnormal == 0
    assert all(slot["w"][0] == 0 for slot in state.values())
    assert all(slot["w"][1] != 0 for slot in state.values())
    assert np.isfinite(updates["w"]).all()
    assert updates["w"][0] == 0


def test_clipping_by_value_bounds_each_element() -> None:
    optimizer = optim.chain(optim.clip_by_value(0.5), optim.sgd(1.0))
    assert run(optimizer, 0.0, [2.0, -2.0, 0.25]) == [-0.5, 0.0, -0.25]


def test_clipping_by_norm_keeps_the_direction_and_bounds_the_length_of_all_gradients_together() -> None:
    clip = optim.clip_by_global_norm(1.0)
    grads = {"a": np.array([[3.0, 0.0]]), "b": np.array([0.0, 4.0])}
    clipped, _ = clip.update(grads, {}, grads, 0)
    np.testing.assert_allclose(clipped["a"], [[0.6, 0.0]], rtol=1e-15)
    np.testing.assert_allclose(clipped["b"], [0.0, 0.8], rtol=1e-15)
    short = {name: g / 8 for name, g in grads.items()}
    untouched, _ = clip.update(short, {}, grads, 0)
    assert all(untouched[name] is short[name] for name in short)


def test_a_norm_is_that_of_the_updates_which_reach_it() -> None:
    optimizer = optim.chain(optim.trace(0.5), optim.clip_by_global_norm(1.0), optim.scale_by_learning_rate(1.0))
    assert run(optimizer, 0.0, [0.5, 0.5, 0.5]) == [-0.5, -1.25, -2.125]
    assert run(optimizer, 0.0, [1.0, 1.0]) == [-1.0, -2.0]  # 1.5, clipped


@pytest.mark.parametrize(
    "optimizer",
    [
        optim.sgd(0.02),
        optim.sgd(0.005, momentum=0.9),
        optim.sgd(0.005, momentum=0.9, nesterov=True),
        optim.adam(optim.cosine(0.3, steps=400)),
        optim.adamw(optim.cosine(0.3, steps=400), weight_decay=0.0),
        optim.nadam(optim.cosine(0.3, steps=400)),
        optim.rmsprop(optim.cosine(0.1, steps=400)),
        optim.rmsprop(optim.cosine(0.03, steps=400), centered=True, momentum=0.5),
        optim.adagrad(1.0),
        optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.02)),
        optim.accumulate(optim.adam(optim.cosine(0.3, steps=200)), 2),
        optim.average_weights(optim.sgd(0.02), 0.9),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_optimizer_finds_the_bottom_of_an_elongated_bowl_and_keeps_the_dtype(
    optimizer: Transform, dtype: type
) -> None:
    steepness: Array = np.array([[1.0, 30.0]], dtype)
    bottom: Array = np.array([[1.0, -2.0]], dtype)
    params: Params = {"w": np.zeros((1, 2), dtype)}
    state = optimizer.init(params)
    for step in range(400):
        updates, state = optimizer.update({"w": steepness * (params["w"] - bottom)}, state, params, step)
        params = optim.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], bottom, atol=5e-3)
    assert params["w"].dtype == dtype
    assert all(array.dtype == dtype for arrays in state.values() for array in arrays.values())


ALL = [
    optim.sgd(0.1),
    optim.nadam(1e-3),
    optim.rmsprop(1e-3, momentum=0.9),
    optim.rmsprop(1e-3, centered=True),
    optim.adagrad(optim.one_cycle(0.1, 50)),
    optim.chain(optim.clip_by_value(0.1), optim.add_decayed_weights(0.1, vectors=True), optim.sgd(0.1)),
    optim.groups({"a": optim.adam(0.1), "[bc]": optim.sgd(0.1, momentum=0.5)}),
    optim.freeze(optim.sgd(optim.stepwise(0.1, boundaries=(3, 5)), momentum=0.9), "b", "c"),
    optim.accumulate(optim.adam(0.1), steps=4),
    optim.accumulate(optim.adam(0.1), steps=3),
    optim.average_weights(optim.accumulate(optim.freeze(optim.adamw(0.1), "c"), 2), 0.99),
    optim.sgd(optim.constant(0.1, warmup=3), momentum=0.9, nesterov=True, weight_decay=1e-4),
    optim.adam(1e-3),
    optim.adamw(optim.cosine(3e-3, steps=100, warmup=10, end=1e-5), weight_decay=0.05),
    optim.chain(
        optim.add_decayed_weights(0.1), optim.trace(0.5), optim.scale_by_adam(), optim.scale_by_learning_rate(1.0)
    ),
]


@pytest.mark.parametrize("optimizer", ALL, ids=repr)
def test_an_update_is_pure_and_works_on_any_subset_of_the_names(optimizer: Transform) -> None:
    rng = np.random.default_rng(0)

    def arrays() -> dict[str, Array]:
        return {"a": rng.standard_normal((3, 4)), "b": rng.standard_normal(4), "c": rng.standard_normal((2, 2))}

    params, grads = arrays(), arrays()
    state = {
        slot: {name: np.abs(rng.standard_normal(array.shape)) for name, array in of_slot.items()}
        for slot, of_slot in optimizer.init(params).items()
    }
    for array in [*params.values(), *grads.values(), *(a for slot in state.values() for a in slot.values())]:
        array.flags.writeable = False
    whole, whole_state = optimizer.update(grads, state, params, 7)
    for names in (["a"], ["b", "c"]):
        part, part_state = optimizer.update({n: grads[n] for n in names}, state, params, 7)
        assert list(part) == names
        for name in names:
            np.testing.assert_array_equal(part[name], whole[name])
            for slot in optimizer.slots:
                assert (name in part_state[slot]) == (name in whole_state[slot]) == (name in state[slot])
                if name in state[slot]:
                    np.testing.assert_array_equal(part_state[slot][name], whole_state[slot][name])


@pytest.mark.parametrize("optimizer", ALL, ids=repr)
def test_an_optimizer_comes_back_from_its_json(optimizer: Transform) -> None:
    described = json.loads(json.dumps(optimizer.to_json()))
    again = optim.from_json(described)
    assert again.to_json() == optimizer.to_json()
    assert repr(again) == repr(optimizer)
    params: Params = {name: np.full(shape, 2.0) for name, shape in {"a": (3, 4), "b": (4,), "c": (2, 2)}.items()}
    grads = {name: 0.1 * p for name, p in params.items()}
    updates, state = optimizer.update(grads, optimizer.init(params), params, 3)
    updates_again, state_again = again.update(grads, again.init(params), params, 3)
    assert digest(updates_again) == digest(updates)
    assert {slot: digest(arrays) for slot, arrays in state_again.items()} == {
        slot: digest(arrays) for slot, arrays in state.items()
    }


def test_the_json_of_an_optimizer_is_the_call_that_makes_it() -> None:
    assert optim.sgd(optim.cosine(0.1, 50), 0.9).to_json() == {
        "name": "sgd",
        "learning_rate": {"name": "cosine", "peak": 0.1, "steps": 50, "warmup": 0, "end": 0.0},
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 0.0,
    }
    assert repr(optim.trace(0.5)) == "trace(momentum=0.5, nesterov=False)"


def test_a_schedule_of_ones_own_works_but_is_no_json() -> None:
    optimizer = optim.sgd(lambda step: 1.0 / (step + 1))
    assert run(optimizer, 0.0, [1.0, 1.0]) == [-1.0, -1.5]
    with pytest.raises(TypeError, match=r"learning_rate must be a number or one of constant, .* to become JSON"):
        optimizer.to_json()


def test_a_transform_of_ones_own_works_in_a_chain_but_is_no_json() -> None:
    halve = Transform(lambda params: {}, lambda updates, state, params, step: ({"w": updates["w"] / 2}, state))
    optimizer = optim.chain(halve, optim.sgd(1.0))
    assert run(optimizer, 0.0, [1.0]) == [-0.5]
    with pytest.raises(TypeError, match=r"optimizer must be made of the functions .* to become JSON"):
        optimizer.to_json()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.sgd(-0.1), "learning_rate must be at least 0, or a function of the step, got -0.1"),
        (lambda: optim.adam(math.nan), "learning_rate must be at least 0, or a function of the step, got nan"),
        (lambda: optim.sgd(0.1, momentum=1.0), "momentum must be at least 0 and below 1, got 1.0"),
        (lambda: optim.sgd(0.1, nesterov=True), "sgd: momentum must be above 0 with nesterov, got 0"),
        (lambda: optim.sgd(0.1, weight_decay=-1), "weight_decay must be at least 0, got -1"),
        (lambda: optim.adam(0.1, b1=1.0), "b1 must be at least 0 and below 1, got 1.0"),
        (lambda: optim.adam(0.1, b2=-0.1), "b2 must be at least 0 and below 1, got -0.1"),
        (lambda: optim.adam(0.1, eps=0.0), "eps must be above 0, got 0.0"),
        (lambda: optim.chain(optim.trace(0.5), optim.trace(0.5)), "different names, got trace, trace"),
        (lambda: optim.nadam(0.1, b2=1.0), "b2 must be at least 0 and below 1, got 1.0"),
        (lambda: optim.rmsprop(0.1, decay=1.0), "decay must be at least 0 and below 1, got 1.0"),
        (lambda: optim.rmsprop(0.1, eps=0.0), "eps must be above 0, got 0.0"),
        (lambda: optim.adagrad(0.1, initial=-1.0), "initial must be at least 0, got -1.0"),
        (lambda: optim.adagrad(0.1, eps=0.0), "eps must be above 0, got 0.0"),
        (lambda: optim.clip_by_value(0.0), "limit must be above 0, got 0.0"),
        (lambda: optim.clip_by_global_norm(math.nan), "max_norm must be above 0, got nan"),
        (
            lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.clip_by_global_norm(2.0)),
            "one transform of a chain may look at all gradients at once, got clip_by_global_norm, clip_by_global_norm",
        ),
        (lambda: optim.from_json({"name": "frozen", "much": 1}), "frozen: arguments must be none, got much"),
        (lambda: optim.from_json({"name": "lion"}), "an optimizer's name must be one of .*, got 'lion'"),
    ],
)
def test_bad_arguments_are_told_in_one_sentence(make: Callable[[], Transform], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
