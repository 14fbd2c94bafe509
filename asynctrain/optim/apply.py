"""One step of an optimizer over whole arenas, in blocks that stay in the cache and without large temporaries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import fsum

import numpy as np

from asynctrain.arena import Arena, Array
from asynctrain.optim.transforms import Optimizer, State
from asynctrain.types import Params

BLOCK = 32768  # elements: with gradient, state and temporaries, a block of float32 stays in the second-level cache


def initial_state(optimizer: Optimizer, params: Params) -> dict[str, Arena]:
    """Return the optimizer's state before the first step: an arena for each slot, of the names that need it."""
    dtype = next((p.dtype for p in params.values()), None)
    return {slot: Arena.of(arrays, dtype) for slot, arrays in optimizer.init(params).items()}


def update_into(
    optimizer: Optimizer,
    names: Iterable[str],
    params: Params,
    grads: Params,
    state: State,
    step: int,
    into_params: Params,
    into_state: State,
    *,
    scale: float = 1.0,
) -> None:
    """Write params + updates into ``into_params``, and the state after ``step`` into ``into_state``.

    The bits are those of ``optimizer.update`` on whole arrays. Calls with different names may run at the same time.
    Outputs may be the inputs themselves, but not overlap them otherwise.

    Args:
        optimizer: made of element-wise transforms, or ``bound`` to what it must know about all gradients.
        names: which parameters to treat.
        params: C-contiguous arrays by name.
        grads: of the loss to be lowered, by the same names.
        state: slot -> name -> array, as ``initial_state`` or an earlier step made it.
        step: counted from 0.
        into_params: where the new parameters go.
        into_state: where the new state goes.
        scale: what the gradients are multiplied by first.

    Raises:
        ValueError: the optimizer looks at all gradients at once and is not ``bound``.
    """
    if optimizer.reduction:
        raise ValueError(f"optimizer must be bound to its totals before it treats a part, got {optimizer}")
    for name in names:
        slots = _slots(optimizer, state, name)
        arrays = [params[name], grads[name], into_params[name]]
        arrays += [state[slot][name] for slot in slots] + [into_state[slot][name] for slot in slots]
        for p, g, p_after, *of_slots in _blocks(arrays):
            before = {slot: {name: s} for slot, s in zip(slots, of_slots, strict=False)}
            updates, after = optimizer.update({name: _scaled(g, scale)}, before, {name: p}, step)
            np.add(p, updates[name], out=p_after)
            for slot, s_after in zip(slots, of_slots[len(slots) :], strict=True):
                np.copyto(s_after, after[slot][name])


def measured(
    optimizer: Optimizer,
    names: Iterable[str],
    params: Params,
    grads: Params,
    state: State,
    step: int,
    scale: float = 1.0,
) -> list[Sequence[float]]:
    """Return, for each block of the parameters ``names``, the sums by which ``bound`` completes the optimizer.

    The arguments are those of ``update_into``. Calls with different names may run at the same time. An optimizer that
    works element by element needs none, and the list is empty.
    """
    if optimizer.reduction is None:
        return []
    measures = []
    for name in names:
        slots = _slots(optimizer, state, name)
        for p, g, *of_slots in _blocks([params[name], grads[name], *(state[slot][name] for slot in slots)]):
            before = {slot: {name: s} for slot, s in zip(slots, of_slots, strict=True)}
            measures.append(optimizer.reduction.measure({name: _scaled(g, scale)}, before, {name: p}, step))
    return measures


def bound(optimizer: Optimizer, measures: Iterable[Sequence[float]]) -> Optimizer:
    """Return the optimizer as it works, element by element, on the gradients whose ``measured`` blocks are given.

    The sums are exact, rounded once, so the order of the blocks does not matter.
    """
    if optimizer.reduction is None:
        return optimizer
    return optimizer.reduction.given([fsum(terms) for terms in zip(*measures, strict=True)])


def _slots(optimizer: Optimizer, state: State, name: str) -> list[str]:
    """Return the slots in which the parameter has state; a frozen one has none."""
    return [slot for slot in optimizer.slots if name in state.get(slot, ())]


def _scaled(g: Array, scale: float) -> Array:
    return g if scale == 1.0 else g * scale


def _blocks(arrays: Sequence[Array]) -> Iterator[Sequence[Array]]:
    """Yield views of the arrays, all of one shape, block by block.

    A block is whole last axes; one axis stays one axis and several stay at least two, as weight decay asks for that.
    """
    shape, size = arrays[0].shape, arrays[0].size
    if size <= BLOCK:
        yield arrays
        return
    rows = BLOCK if len(shape) == 1 else max(1, BLOCK // shape[-1])
    flat = [array.reshape(-1, *shape[1:][-1:]) for array in arrays]
    for start in range(0, len(flat[0]), rows):
        yield [array[start : start + rows] for array in flat]
