"""Controllers: what watches a run and decides about it, as pure functions of what was seen.

A controller's state is JSON and lives in the ``TrainState``, so it is in every checkpoint and a resumed run decides as
one that was never stopped. It changes a run only by the ``Decision`` that it returns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from asynctrain.train.events import EpochEnd, Event
from asynctrain.types import JSON

Mode = Literal["min", "max"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What is to be done after an event.

    Attributes:
        stop: why the run is to end, or nothing.
        scale_learning_rate: what the learning rate is multiplied with from the next step on.
        keep_best: whether the weights of this moment are the best so far, and kept.
        restore_best: whether the run ends with the weights that were kept.
    """

    stop: str = ""
    scale_learning_rate: float = 1.0
    keep_best: bool = False
    restore_best: bool = False


NOTHING = Decision()


class Controller(Protocol):
    """Decides about a run."""

    @property
    def name(self) -> str:
        """Under which its state is kept; of two of a kind in one run each needs a name of its own."""
        ...

    def begin(self) -> JSON:
        """Return the state before the first event."""
        ...

    def update(self, state: JSON, event: Event) -> tuple[JSON, Decision]:
        """Return the state after ``event``, and what is to be done. Pure, and quick: it runs on the event loop."""
        ...


@dataclass(frozen=True)
class EarlyStopping:
    """Ends the run when ``monitor`` has not become better for ``patience`` epochs in a row.

    Args:
        monitor: ``"validation.loss"``, ``"validation.accuracy"``, ``"validation.<metric>"``, ``"loss"`` or
            ``"accuracy"``, of each epoch's end.
        patience: epochs, at least 1.
        min_delta: what counts as better is better by more than this, at least 0.
        mode: whether less or more is better; by default more of anything but a loss or an error.
        restore_best: whether the run ends with the weights of its best epoch.
        name: of its state.
    """

    monitor: str = "validation.loss"
    patience: int = 5
    min_delta: float = 0.0
    mode: Mode | None = None
    restore_best: bool = True
    name: str = "early_stopping"

    def __post_init__(self) -> None:
        _check_patience(self.patience, self.min_delta)

    def begin(self) -> JSON:
        """Return the state before the first epoch."""
        return {"best": None, "epochs": 0}

    def update(self, state: JSON, event: Event) -> tuple[JSON, Decision]:
        """Look at the ends of epochs."""
        if not isinstance(event, EpochEnd):
            return state, NOTHING
        value = monitored(event, self.monitor)
        if value is None:
            return state, NOTHING
        if is_better(value, state["best"], self.mode or usual_mode(self.monitor), self.min_delta):
            return {"best": value, "epochs": 0}, Decision(keep_best=self.restore_best)
        epochs = state["epochs"] + 1
        if epochs < self.patience:
            return {**state, "epochs": epochs}, NOTHING
        why = f"{self.monitor} has not become better than {state['best']} for {epochs} epochs"
        return {**state, "epochs": epochs}, Decision(stop=why, restore_best=self.restore_best)


@dataclass(frozen=True)
class ReduceOnPlateau:
    """Multiplies the learning rate with ``factor`` when ``monitor`` has not become better for ``patience`` epochs.

    Args:
        monitor: as for ``EarlyStopping``.
        factor: between 0 and 1.
        patience: epochs, at least 1.
        min_delta: what counts as better is better by more than this, at least 0.
        mode: as for ``EarlyStopping``.
        smallest: the learning rate is not scaled below this share of its schedule.
        name: of its state.
    """

    monitor: str = "validation.loss"
    factor: float = 0.1
    patience: int = 3
    min_delta: float = 0.0
    mode: Mode | None = None
    smallest: float = 1e-4
    name: str = "reduce_on_plateau"

    def __post_init__(self) -> None:
        _check_patience(self.patience, self.min_delta)
        if not 0 < self.factor < 1:
            raise ValueError(f"factor must be above 0 and below 1, got {self.factor}")

    def begin(self) -> JSON:
        """Return the state before the first epoch."""
        return {"best": None, "epochs": 0, "scale": 1.0}

    def update(self, state: JSON, event: Event) -> tuple[JSON, Decision]:
        """Look at the ends of epochs."""
        if not isinstance(event, EpochEnd):
            return state, NOTHING
        value = monitored(event, self.monitor)
        if value is None:
            return state, NOTHING
        if is_better(value, state["best"], self.mode or usual_mode(self.monitor), self.min_delta):
            return {**state, "best": value, "epochs": 0}, NOTHING
        epochs = state["epochs"] + 1
        if epochs < self.patience or state["scale"] * self.factor < self.smallest:
            return {**state, "epochs": epochs}, NOTHING
        scaled = {**state, "epochs": 0, "scale": state["scale"] * self.factor}
        return scaled, Decision(scale_learning_rate=self.factor)


@dataclass(frozen=True)
class KeepBest:
    """Keeps the weights of the epoch with the best ``monitor``, and lets the run go on to its end as it is.

    They are in ``state.kept["keep_best"]``, and so in every checkpoint; ``callbacks.SaveBest`` makes a file of them.

    Args:
        monitor: as for ``EarlyStopping``.
        min_delta: what counts as better is better by more than this, at least 0.
        mode: as for ``EarlyStopping``.
        name: of its state.
    """

    monitor: str = "validation.loss"
    min_delta: float = 0.0
    mode: Mode | None = None
    name: str = "keep_best"

    def __post_init__(self) -> None:
        _check_patience(1, self.min_delta)

    def begin(self) -> JSON:
        """Return the state before the first epoch."""
        return {"best": None}

    def update(self, state: JSON, event: Event) -> tuple[JSON, Decision]:
        """Look at the ends of epochs."""
        if not isinstance(event, EpochEnd):
            return state, NOTHING
        value = monitored(event, self.monitor)
        if value is None:
            return state, NOTHING
        if is_better(value, state["best"], self.mode or usual_mode(self.monitor), self.min_delta):
            return {"best": value}, Decision(keep_best=True)
        return state, NOTHING


def monitored(event: EpochEnd, monitor: str) -> float | None:
    """Return the figure called ``monitor`` of an epoch's end; None of an evaluation where there was none yet.

    Raises:
        ValueError: there is none of that name.
    """
    where, _, name = monitor.rpartition(".")
    if where == "validation" and event.validation is None:
        return None
    if where == "" and name in ("loss", "accuracy"):
        return float(getattr(event, name))
    if where == "validation" and event.validation is not None:
        figures = {
            "loss": event.validation.loss,
            "accuracy": event.validation.accuracy,
            **event.validation.metrics,
        }
        if isinstance(figures.get(name), int | float):
            return float(figures[name])
    known = ["loss", "accuracy"]
    if event.validation is not None:
        known += ["validation.loss", "validation.accuracy"]
        known += [f"validation.{key}" for key, value in event.validation.metrics.items() if isinstance(value, float)]
    raise ValueError(f"monitor must be one of {', '.join(known)} for this run, got {monitor!r}")


def usual_mode(monitor: str) -> Mode:
    """Return whether less or more of ``monitor`` is better."""
    return "min" if "loss" in monitor or "error" in monitor else "max"


def is_better(value: float, best: float | None, mode: Mode, min_delta: float = 0.0) -> bool:
    """Return whether ``value`` is better than ``best``; NaN never is, and anything else is better than nothing."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if mode == "min" else value > best + min_delta


def _check_patience(patience: int, min_delta: float) -> None:
    if patience < 1:
        raise ValueError(f"patience must be at least 1, got {patience}")
    if min_delta < 0:
        raise ValueError(f"min_delta must be at least 0, got {min_delta}")
