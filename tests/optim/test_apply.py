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
    assert all(not arena.vector.any() for arena in state.values())
    optim.update_into(optimizer, params, params, grads, state, 0, params, state)
    assert digest(params) == digest(into)
    assert all(digest(state[slot]) == digest(arena) for slot, arena in into_state.items())


def test_only_the_names_that_are_given_are_treated() -> None:
    optimizer, params = OPTIMIZERS[0], arrays(0)
    state = optim.initial_state(optimizer, params)
    into, into_state = params.layout.empty(), empty(state)
    optim.update_into(optimizer, ["bias", "tall"], params, arrays(1), state, 0, into, into_state)
    assert {name for name, array in into.items() if array.any()} == {"bias", "tall"}
    assert {name for name, array in into_state["trace"].items() if array.any()} == {"bias", "tall"}
