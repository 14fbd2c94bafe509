"""The state of training: everything that can influence a parameter or the history from here on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from asynctrain.arena import Arena, Layout, digest
from asynctrain.types import Cursor, Program, Sums


@dataclass(frozen=True, slots=True)
class TrainState:
    """A frozen moment of a run; the next step makes a new one.

    Attributes:
        program: what the workers computed with.
        params: "conv1/weight" -> array.
        optimizer_state: slot -> arrays named as the parameters ("mu" -> "conv1/weight" -> array).
        model_state: the layers' running statistics ("norm1/mean" -> array), float64.
        step: how many steps were applied.
        cursor: the place just after the last batch that was applied.
        sums: loss and metrics of the epoch so far.
    """

    program: Program
    params: Arena
    optimizer_state: Mapping[str, Arena]
    model_state: Arena = field(default_factory=Layout({}, np.dtype(np.float64)).empty)
    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    sums: Sums = field(default_factory=Sums)

    def digest(self) -> str:
        """SHA-256 over the names, dtypes, shapes and values of all parameters."""
        return digest(self.params)

    def copy(self) -> TrainState:
        """Return the same state in read-only arrays of its own."""
        return self._with_arrays(lambda arena: arena.copy().read_only())

    def writable_copy(self) -> TrainState:
        """Return the same state in arrays of its own that a step may write."""
        return self._with_arrays(Arena.copy)

    def _with_arrays(self, of: Callable[[Arena], Arena]) -> TrainState:
        optimizer_state = {slot: of(arena) for slot, arena in self.optimizer_state.items()}
        return replace(self, params=of(self.params), model_state=of(self.model_state), optimizer_state=optimizer_state)

    def __repr__(self) -> str:
        return f"<TrainState step {self.step}, epoch {self.cursor.epoch} at {self.cursor.position}, {self.params!r}>"
