"""The state of training: everything that can influence a parameter or the history from here on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from asynctrain.arena import Arena, Layout, digest
from asynctrain.train.events import EpochEnd, Evaluation
from asynctrain.types import JSON, Cursor, Program, Sums


@dataclass(frozen=True, slots=True)
class Kept:
    """The weights after ``step``, kept for a controller; read-only arrays that nothing else writes."""

    step: int
    params: Arena
    model_state: Arena


@dataclass(frozen=True, slots=True)
class TrainState:
    """A frozen moment of a run; the next step makes a new one.

    Attributes:
        program: what the workers computed with.
        params: "conv1/weight" -> array.
        optimizer_state: slot -> arrays named as the parameters they belong to ("mu" -> "conv1/weight" -> array); a
            frozen parameter has none.
        model_state: the layers' running statistics ("norm1/mean" -> array), float64.
        step: how many steps were applied.
        cursor: the place just after the last batch that was applied.
        sums: loss and metrics of the epoch so far.
        attempt: how often the run was started, the first time included.
        samples: how many were trained on in all.
        learning_rate_scale: what a controller made of the optimizer's learning rate: 1 unless it is to be smaller.
        controllers: the state of each controller, JSON, by name.
        kept: the best weights so far, by the name of the controller that wants them.
        stopped_by: why a controller ended the run, or nothing.
        stopper: that controller as it was; with another, or none, a resumed run goes on.
        restore: the name of the controller whose kept weights the run ends with, or nothing.
        history: the ends of epochs and the evaluations so far.
    """

    program: Program
    params: Arena
    optimizer_state: Mapping[str, Arena]
    model_state: Arena = field(default_factory=Layout({}, np.dtype(np.float64)).empty)
    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    sums: Sums = field(default_factory=Sums)
    attempt: int = 1
    samples: int = 0
    learning_rate_scale: float = 1.0
    controllers: Mapping[str, JSON] = field(default_factory=dict)
    kept: Mapping[str, Kept] = field(default_factory=dict)
    stopped_by: str = ""
    stopper: str = ""
    restore: str = ""
    history: tuple[EpochEnd | Evaluation, ...] = ()

    def digest(self) -> str:
        """SHA-256 over the names, dtypes, shapes and values of all parameters."""
        return digest(self.params)

    def read_only(self) -> TrainState:
        """Return the same state, not copied, in arrays that refuse to be written."""
        return self._with_arrays(Arena.read_only)

    def copy(self) -> TrainState:
        """Return the same state in read-only arrays of its own."""
        return self._with_arrays(lambda arena: arena.copy().read_only())

    def writable_copy(self) -> TrainState:
        """Return the same state in arrays of its own that a step may write."""
        return self._with_arrays(Arena.copy)

    def writable_like(self) -> TrainState:
        """Return a state whose arrays are of the same layouts, with undefined values."""
        return self._with_arrays(lambda arena: arena.layout.empty())

    def averaged(self) -> TrainState:
        """Return the state with the running means of the parameters, read-only, in place of the parameters.

        For evaluation and use (``trainer.evaluate(loader, state.averaged())``); to train on, keep the state itself.
        Frozen parameters are as they are, and so are the running statistics of normalisation layers.

        Raises:
            ValueError: the optimizer keeps no means; ``optim.average_weights`` does.
        """
        if "average" not in self.optimizer_state:
            raise ValueError("optimizer must be made by optim.average_weights(...) to have averaged parameters")
        average = self.optimizer_state["average"]
        params = Arena.of({name: average.get(name, p) for name, p in self.params.items()})
        return replace(self, params=params.read_only())

    def _with_arrays(self, of: Callable[[Arena], Arena]) -> TrainState:
        optimizer_state = {slot: of(arena) for slot, arena in self.optimizer_state.items()}
        return replace(self, params=of(self.params), model_state=of(self.model_state), optimizer_state=optimizer_state)

    def __repr__(self) -> str:
        return f"<TrainState step {self.step}, epoch {self.cursor.epoch} at {self.cursor.position}, {self.params!r}>"
