"""How to train: what the options of a command say, in the library's terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import asynctrain as at
from asynctrain.data.datasets import Dataset
from asynctrain.inference import Metric
from asynctrain.optim import Optimizer
from asynctrain.train.controllers import Controller, EarlyStopping
from asynctrain.train.saving import Saving

OPTIMIZERS: dict[str, tuple[Callable[..., Optimizer], float]] = {  # and the learning rate that usually suits it
    "adamw": (at.optim.adamw, 3e-3),
    "adam": (at.optim.adam, 3e-3),
    "sgd": (at.optim.sgd, 5e-2),
}
USUAL_STEPS = 2_000
WARMUP = 0.05  # of all steps
CACHED = 2**29  # bytes of decoded images that are kept for later epochs
ERRORS = ("raise", "skip")
MISTAKES = 24  # that a report shows
LARGEST_MATRIX = 50  # classes whose confusion is kept for each epoch


@dataclass(frozen=True, slots=True)
class Recipe:
    """The choices of one training, named as the options of ``asynctrain train``; None leaves a choice to the data.

    Attributes:
        folder: of the images.
        model: a name of ``asynctrain.models``.
        epochs: how many times all images are seen.
        batch_size: images in a step.
        microbatch: the most images that one worker takes at once; None for half a batch, 32 to 64.
        image_size: height and width in pixels.
        lr: the highest learning rate, reached after a short warm-up, from where it falls to zero along a cosine.
        optimizer: a name in ``OPTIMIZERS``.
        holdout: the share of each class to test with, where ``folder`` has no test folder.
        patience: epochs without a lower test loss before the training ends early; None for never.
        checkpoint_every: steps between two checkpoints; None leaves the time to the library.
        seconds: how long it may take; None for as long as it takes.
        seed: of everything that is drawn.
        executor: as ``make_executor`` takes it.
        kernels: ``numpy`` or ``numba``.
        augment: whether each image is seen a little different every time.
        errors: ``raise`` or ``skip``, what to do about a file that is no image.
    """

    folder: Path
    model: str = "small_cnn"
    epochs: int | None = None
    batch_size: int = 64
    microbatch: int | None = None
    image_size: int | None = None
    lr: float | None = None
    optimizer: str = "adamw"
    holdout: float = 0.2
    patience: int | None = None
    checkpoint_every: int | None = None
    seconds: float | None = None
    seed: int = 0
    executor: str = "threads"
    kernels: str = "numpy"
    augment: bool = False
    errors: str = "raise"

    def epochs_for(self, batches_per_epoch: int) -> int:
        """Return ``epochs``, or else as many as make about 2,000 steps, at least 5 and at most 40."""
        if self.epochs is not None:
            return self.epochs
        return min(max(-(-USUAL_STEPS // batches_per_epoch), 5), 40)

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return OPTIMIZERS[self.optimizer][1] if self.lr is None else self.lr

    def make_loader(self, dataset: Dataset, image_shape: tuple[int, int, int]) -> at.Loader:
        """Return the batches of ``dataset`` to train on; its images are decoded once, as far as memory is given."""
        height, width, channels = image_shape
        return at.Loader(
            dataset,
            batch_size=self.batch_size,
            image_size=(height, width),
            channels=channels,
            augment=at.augment.standard() if self.augment else None,
            errors="skip" if self.errors == "skip" else "raise",
            cache=at.data.MemoryCache(CACHED),
            seed=self.seed,
        )

    def make_metrics(self, classes: int) -> list[Metric]:
        """Return what each test measures besides loss and accuracy, for a report to show."""
        worst = at.metrics.WorstSamples(MISTAKES)
        return [worst, at.metrics.ConfusionMatrix()] if classes <= LARGEST_MATRIX else [worst]

    def make_optimizer(self, steps: int) -> Optimizer:
        """Return the optimizer for a run of ``steps`` steps."""
        make, _ = OPTIMIZERS[self.optimizer]
        momentum = {"momentum": 0.9} if self.optimizer == "sgd" else {}
        return make(at.optim.cosine(self.peak, steps, warmup=int(WARMUP * steps)), **momentum)

    def make_controllers(self) -> list[Controller]:
        """Return what decides about the run."""
        return [] if self.patience is None else [EarlyStopping(patience=self.patience)]

    def make_saving(self) -> Saving:
        """Return when the run saves its state."""
        return Saving() if self.checkpoint_every is None else Saving(steps=self.checkpoint_every)

    def to_toml(self) -> dict[str, Any]:
        """Return the section ``[train]`` of a configuration, by which ``--config`` trains the same again."""
        return asdict(self) | {"folder": str(self.folder.resolve())}
