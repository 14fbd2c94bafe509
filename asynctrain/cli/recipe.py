"""How to train: what the options of a command say, in the library's terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import asynctrain as at
from asynctrain.optim import Optimizer

OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], float]] = {  # and the learning rate that usually suits it
    "adamw": (at.optim.adamw, 3e-3),
    "adam": (at.optim.adam, 3e-3),
    "sgd": (at.optim.sgd, 5e-2),
}
USUAL_STEPS = 2_000
WARMUP = 0.05  # of all steps


@dataclass(frozen=True, slots=True)
class Recipe:
    """The choices of one training; None leaves a choice to the data.

    epochs: how many times all images are seen. side: of the images, in pixels. learning_rate: the highest one, reached
    after a short warm-up, from where it falls to zero along a cosine. executor: ``inline``, ``threads``, ``threads:2``.
    """

    model: str = "small_cnn"
    epochs: int | None = None
    batch_size: int = 64
    microbatch: int = 32
    side: int | None = None
    learning_rate: float | None = None
    optimizer: str = "adamw"
    seed: int = 0
    executor: str = "threads"

    def epochs_for(self, batches_per_epoch: int) -> int:
        """Return ``epochs``, or else as many as make about 2,000 steps, at least 5 and at most 40."""
        if self.epochs is not None:
            return self.epochs
        return min(max(-(-USUAL_STEPS // batches_per_epoch), 5), 40)

    def make_optimizer(self, steps: int) -> Optimizer:
        """Return the optimizer for a run of ``steps`` steps."""
        make, usual = OPTIMIZERS[self.optimizer]
        peak = usual if self.learning_rate is None else self.learning_rate
        momentum = {"momentum": 0.9} if self.optimizer == "sgd" else {}
        return make(at.optim.cosine(peak, steps, warmup=int(WARMUP * steps)), **momentum)


def make_executor(text: str) -> at.InlineExecutor | at.ThreadExecutor:
    """Return the home that ``inline``, ``threads`` (one for each CPU) or ``threads:2`` stands for."""
    kind, _, workers = text.partition(":")
    if text == "inline":
        return at.InlineExecutor()
    if text == "threads":
        return at.ThreadExecutor()
    if kind == "threads" and workers.isdecimal() and int(workers) >= 1:
        return at.ThreadExecutor(int(workers))
    raise ValueError(f"executor must be inline, threads or threads:N with N at least 1, got {text!r}")
