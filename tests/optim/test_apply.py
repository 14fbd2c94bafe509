"""The in-place engine: the bits of the pure functions, written where they are wanted."""

from __future__ import annotations

import numpy as np
import pytest

from asynctrain import optim
from asynctrain.arena import Arena, Shape, digest
from asynctrain.optim import Transform
from asynctrain.optim.apply import BLOCK

SHAPES: dict[str, Shape] = {
    "wide": (3, BLOCK + 5),  # one row is more than a block
    "tall": (BLOCK // 4, 7),
    "window": (3, 3, 40, 130),
    "bias": (2 * BLOCK + 3,),
    "scalar": (),
    "single": (1, 1),
}
OPTIMIZERS = [
    optim.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    optim.adamw(optim.cosine(0.1, steps=9), weight_decay=0.1),
    optim.sgd(0.1),
    optim.rmsprop(0.1, centered=True, momentum=0.9),
    optim.nadam(0.1),
    optim.adagrad(0.1),
    optim.accumulate(optim.average_weights(optim.adam(0.1)), steps=2),
    optim.freeze(optim.adamw(0.1), "tall", "bias", "scalar"),
]
CLIPPED = [
    optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1)),
    optim.chain(optim.trace(0.9), optim.clip_by_global_norm(0.5), optim.scale_by_learning_rate(0.1)),
    optim.chain(optim.clip_by_global_norm(1e6), optim.sgd(0.1)),
    optim.accumulate(optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.1)), 2),
    optim.average_weights(optim.freeze(optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(0.1)), "w*")),
    optim.groups(
        {
            "w*": optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(0.1)),
            "bias": optim.sgd(0.1),
            "*": optim.chain(optim.clip_by_global_norm(0.1), optim.adam(0.1)),
        }
    ),
]


def arrays(seed: int, dtype: str = "float32") -> Arena:
    rng = np.random.default_rng(seed)
    return Arena.of({name: rng.standard_normal(shape) for name, shape in SHAPES.items()}, dtype)


def empty(like: dict[str, Arena]) -> dict[str, Arena]:
    return {slot: arena.layout.empty() for slot, arena in like.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_blocks_give_the_bits_of_the_pure_update(optimizer: Transform, dtype: str) -> None:
    params = expected = arrays(0, dtype)
    state = optim.initial_state(optimizer, params)
    expected_state = optimizer.init(params)
    for step in range(3):
        grads = arrays(step + 1, dtype)
        updates, expected_state = optimizer.update(grads, expected_state, expected, step)
        expected = Arena.of(optim.apply_updates(expected, updates))
        into, into_state = params.layout.empty(), empty(state)
        optim.update_into(optimizer, params, params, grads, state, step, into, into_state)
        params, state = into, into_state
    assert digest(params) == digest(expected)
    assert {slot: digest(arena) for slot, arena in state.items()} == {
        slot: digest(of_slot) for slot, of_slot in expected_state.items()
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_inputs_are_left_alone_and_may_also_be_the_outputs(optimizer: Transform) -> None:
    params, grads = arrays(0), arrays(1)
    state = optim.initial_state(optimizer, params)
    before = digest(params), digest(grads)
    into, into_state = params.layout.empty(), empty(state)
    optim.update_into(optimizer, params, params.read_only(), grads.read_only(), state, 0, into, into_state)
    assert (digest(params), digest(grads)) == before
    fresh = optimizer.init(params)
    assert all(digest(arena) == digest(fresh[slot]) for slot, arena in state.items())
    optim.update_into(optimizer, params, params, grads, state, 0, params, state)
    assert digest(params) == digest(into)
    assert all(digest(state[slot]) == digest(arena) for slot, arena in into_state.items())


def test_only_the_names_that_are_given_are_treated() -> None:
    optimizer, params = OPTIMIZERS[0], arrays(0)
    state = optim.initial_state(optimizer, params)
    into, into_state = params.layout.empty(), empty(state)
    for arena in (into, into_state["trace"]):
        arena.vector.fill(np.nan)
    optim.update_into(optimizer, ["bias", "tall"], params, arrays(1), state, 0, into, into_state)
    for arena in (into, into_state["trace"]):
        assert {name for name, array in arena.items() if not np.isnan(array).any()} == {"bias", "tall"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_gradients_are_multiplied_by_the_scale_first(optimizer: Transform) -> None:
    params, grads = arrays(0), arrays(1)
    scaled = Arena.of({name: g * 0.25 for name, g in grads.items()})
    state = optim.initial_state(optimizer, params)
    results = []
    for given, scale in ((grads, 0.25), (scaled, 1.0)):
        into, into_state = params.layout.empty(), empty(state)
        optim.update_into(optimizer, params, params, given, state, 0, into, into_state, scale=scale)
        results.append((digest(into), {slot: digest(arena) for slot, arena in into_state.items()}))
    assert results[0] == results[1]


@pytest.mark.parametrize("optimizer", CLIPPED, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_norm_over_blocks_is_that_over_whole_arrays(optimizer: Transform, dtype: str) -> None:
    params = expected = arrays(0, dtype)
    state = optim.initial_state(optimizer, params)
    expected_state = optimizer.init(params)
    for step in range(4):
        grads = arrays(step + 1, dtype)
        updates, expected_state = optimizer.update(grads, expected_state, expected, step)
        expected = Arena.of(optim.apply_updates(expected, updates))
        measures = optim.measured(optimizer, params, params, grads, state, step)
        into, into_state = params.layout.empty(), empty(state)
        optim.update_into(optim.bound(optimizer, measures), params, params, grads, state, step, into, into_state)
        params, state = into, into_state
    tolerance = 1e-12 if dtype == "float64" else 1e-4
    np.testing.assert_allclose(params.vector, expected.vector, rtol=tolerance, atol=tolerance)
    for slot, arena in state.items():
        np.testing.assert_allclose(arena.vector, Arena.of(expected_state[slot]).vector, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer", CLIPPED, ids=repr)
def test_a_norm_has_the_same_bits_in_whichever_parts_and_order_it_is_measured(optimizer: Transform) -> None:
    params, grads = arrays(0), arrays(1)
    state = optim.initial_state(optimizer, params)
    results = set()
    for parts in ([list(params)], [[name] for name in params], [[name] for name in reversed(list(params))]):
        measures = [term for part in parts for term in optim.measured(optimizer, part, params, grads, state, 1, 0.3)]
        bound = optim.bound(optimizer, measures)
        into, into_state = params.layout.empty(), empty(state)
        for part in parts:
            optim.update_into(bound, part, params, grads, state, 1, into, into_state, scale=0.3)
        results.add(digest(into))
    assert len(results) == 1


def test_an_optimizer_that_looks_at_all_gradients_does_not_treat_a_part_before_it_has() -> None:
    optimizer, params = CLIPPED[0], arrays(0)
    state = optim.initial_state(optimizer, params)
    with pytest.raises(ValueError, match=r"optimizer must be bound to its totals .*, got chain\("):
        optim.update_into(optimizer, params, params, params, state, 0, params, state)


def test_an_element_wise_optimizer_measures_nothing_and_is_its_own_bound() -> None:
    optimizer, params = OPTIMIZERS[0], arrays(0)
    assert optim.measured(optimizer, params, params, params, optim.initial_state(optimizer, params), 0) == []
    assert optim.bound(optimizer, []) is optimizer


def test_frozen_parameters_take_no_memory_for_state() -> None:
    params = arrays(0)
    state = optim.initial_state(optim.freeze(optim.adam(0.1), "wi*", "tall", "bias"), params)
    assert {slot: list(arena) for slot, arena in state.items()} == {
        "mu": ["scalar", "single"],
        "nu": ["scalar", "single"],
    }
