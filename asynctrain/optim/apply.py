"""One step of an optimizer over whole arenas, in blocks that stay in the cache and without large temporaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from asynctrain.arena import Arena, Array
from asynctrain.optim.transforms import Optimizer, State
from asynctrain.types import Params

BLOCK = 32768  # elements: with gradient, state and temporaries, a block of float32 stays in the second-level cache


def initial_state(optimizer: Optimizer, params: Params) -> dict[str, Arena]:
    """Return the optimizer's state before the first step: an arena for each slot."""
    return {slot: Arena.of(arrays) for slot, arrays in optimizer.init(params).items()}


def update_into(
    optimizer: Optimizer,
    names: Iterable[str],
    params: Params,
    grads: Params,
    state: State,
    step: int,
    into_params: Params,
    into_state: State,
) -> None:
    """Write params + updates into ``into_params``, and the state after ``step`` into ``into_state``.

    The bits are those of ``optimizer.update`` on whole arrays. Calls with different names may run at the same time.
    Outputs may be the inputs themselves, but not overlap them otherwise.

    Args:
        optimizer: made of element-wise transforms.
        names: which parameters to treat.
        params: C-contiguous arrays by name.
        grads: of the loss to be lowered, by the same names.
        state: slot -> name -> array, as ``initial_state`` or an earlier step made it.
        step: counted from 0.
        into_params: where the new parameters go.
        into_state: where the new state goes.
    """
    for name in names:
        slots = [(slot, _blocks(state[slot][name]), _blocks(into_state[slot][name])) for slot in optimizer.slots]
        for p, g, p_after in zip(*(_blocks(arrays[name]) for arrays in (params, grads, into_params)), strict=True):
            block = [(slot, next(before), next(after)) for slot, before, after in slots]
            updates, after = optimizer.update({name: g}, {slot: {name: s} for slot, s, _ in block}, {name: p}, step)
            np.add(p, updates[name], out=p_after)
            for slot, _, s_after in block:
                np.copyto(s_after, after[slot][name])


def _blocks(array: Array) -> Iterator[Array]:
    """Yield views of whole last axes; one axis stays one axis and several become two, as weight decay asks for that."""
    matrix = array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array.reshape(-1)
    rows = BLOCK if array.ndim < 2 else max(1, BLOCK // array.shape[-1])
    for start in range(0, len(matrix), rows):
        yield matrix[start : start + rows]
