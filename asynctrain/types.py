"""The values that flow through asynctrain: frozen, slotted, and of plain parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np

from asynctrain.arena import Arena, Array, Layout, Shape

R = TypeVar("R")

Params = Mapping[str, Array]
JSON = Mapping[str, Any]

LARGEST, SMALLEST = 64, 32  # samples in a microbatch, where nothing else is asked for


class Source(Protocol):
    """Where the pixels of one record come from; ``str(source)`` names it in messages."""

    def read(self) -> Any:
        """Return what ``data.decode`` takes: encoded bytes, an array of uint8, or a Pillow image.

        Blocks; raises ``ReadError``.
        """
        ...


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled image of a dataset, not yet read. weight: how much it counts in the loss, at least 0."""

    source: Source
    label: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in the stream of batches; opening a loader there goes on as if it had never stopped.

    ``position`` is the next unread one in the order of ``epoch``; ``samples`` and ``batches`` count what this epoch has
    delivered up to there; ``skipped`` lists the positions of this epoch that were left out.
    """

    epoch: int = 0
    position: int = 0
    samples: int = 0
    batches: int = 0
    skipped: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Skipped:
    """A sample that was left out: its epoch, its position there, its name, and why."""

    epoch: int
    position: int
    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples that are trained in one step.

    images: (N, H, W, C) uint8. labels: (N,) int64, or soft ones (N, K) float32. sources: the name of each sample.
    cursor: the place just after this batch. last: whether it is known to end its epoch (not so where all samples after
    it turn out to be skipped). skipped: the samples left out since the batch before. weights: (N,) float32, how much
    each counts in the loss; None where all count 1.
    """

    images: Array
    labels: Array
    sources: tuple[str, ...]
    cursor: Cursor
    last: bool
    skipped: tuple[Skipped, ...] = ()
    weights: Array | None = None

    @property
    def samples(self) -> int:
        """N."""
        return len(self.images)

    @property
    def epoch(self) -> int:
        """The epoch it belongs to; after the last batch the cursor is in the next one already."""
        return self.cursor.epoch - 1 if self.last else self.cursor.epoch


class BatchIterator(Protocol):
    """An opened stream of batches."""

    @property
    def skipped(self) -> Sequence[Skipped]:
        """The samples left out so far, those before the batch delivered last and, at the end, those after it."""
        ...

    def __aiter__(self) -> AsyncIterator[Batch]: ...

    async def __anext__(self) -> Batch: ...


class SharedThreads(Protocol):
    """Threads of this process that may be handed work from several sides."""

    @property
    def workers(self) -> int:
        """How many there are."""
        ...

    def submit(self, function: Callable[[], R], /) -> Future[R]:
        """Have ``function`` called; raises ``ClosedError`` where their owner is closed."""
        ...


class BatchStream(Protocol):
    """What a training run needs of a loader (``asynctrain.Loader`` is one)."""

    @property
    def image_shape(self) -> Shape:
        """(H, W, C) of the images it delivers."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the labels 0, 1, ..."""
        ...

    @property
    def batches_per_epoch(self) -> int | None:
        """How many batches an epoch has; None where only its end will tell."""
        ...

    @property
    def samples_per_epoch(self) -> int | None:
        """How many samples an epoch delivers; None where only its end will tell."""
        ...

    @property
    def description(self) -> JSON:
        """What decides about its batches, as JSON: a run resumes only with data that is described alike."""
        ...

    def open(
        self, cursor: Cursor = ..., *, epochs: int | None = ..., threads: SharedThreads | None = ...
    ) -> AbstractAsyncContextManager[BatchIterator]:
        """Deliver the batches from ``cursor`` up to the end of epoch ``epochs - 1`` (by default of the cursor's).

        ``threads`` are those that the batches are computed on, if any are: they may be used for making them, too.
        """
        ...

    def evaluating(self, dataset: Any) -> BatchStream:
        """Return a loader over ``dataset`` with the same image settings, in order and unaugmented."""
        ...


@dataclass(frozen=True, slots=True)
class Normalization:
    """How uint8 pixels become the numbers a model sees: ``(pixel / 255 - mean) / std``."""

    mean: float = 0.5
    std: float = 0.25


@dataclass(frozen=True, slots=True)
class Program:
    """What a gradient worker must know, as plain data; equal digests mean equal arithmetic.

    Attributes:
        architecture: the model as JSON (``Model.to_json``).
        loss: the name of a loss in ``asynctrain.nn.losses``, or its JSON where it has arguments.
        normalization: applied to the pixels by the worker.
        dtype: of parameters and arithmetic, ``float32`` or ``float64``.
        seed: of the dropout masks.
        kernels: what computes: ``numpy``, or ``numba`` (extra ``numba``), which is faster and differs in the last bits.
    """

    architecture: JSON
    loss: str | JSON = "softmax_cross_entropy"
    normalization: Normalization = field(default_factory=Normalization)
    dtype: str = "float32"
    seed: int = 0
    kernels: str = "numpy"

    def to_json(self) -> JSON:
        """Return the program as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: JSON) -> Program:
        """Return the program that ``to_json`` described."""
        return cls(**{**value, "normalization": Normalization(**value["normalization"])})

    @property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class GradientWork:
    """One microbatch whose gradient is wanted.

    images: (n, H, W, C) uint8, C-contiguous. labels: (n,) int64. weights: (n,) float32, how much each sample counts in
    the loss, by default 1. ``microbatch`` counts from 0 to ``of - 1`` within ``step``; together they key the random
    numbers of dropout.
    """

    step: int
    microbatch: int
    of: int
    images: Array
    labels: Array
    weights: Array | None = None


def cut(samples: int, microbatch: int | None) -> list[slice]:
    """Cut a batch into ceil(samples / microbatch) parts whose sizes differ by at most one.

    By default into the fewest parts of at most 64 samples, and into two where one would be larger than 32: large parts
    have fewer gradients to add and fewer calls to make, and one part would leave the second worker idle.
    """
    parts = _default_parts(samples) if microbatch is None else -(-samples // microbatch)
    return [slice(start, stop) for start, stop in pairwise(samples * i // parts for i in range(parts + 1))]


def _default_parts(samples: int) -> int:
    return max(-(-samples // LARGEST), min(2, -(-samples // SMALLEST)))


@dataclass(frozen=True, slots=True)
class ForwardWork:
    """Images to be predicted, and evaluated where ``labels`` are given; shapes and dtypes as in ``GradientWork``."""

    images: Array
    labels: Array | None = None
    weights: Array | None = None


@dataclass(frozen=True, slots=True)
class Sums:
    """What is added up over samples: the loss, the sample weights, how many there were, and metrics.

    ``correct`` counts the samples predicted right, ``judged`` those of which that can be said.
    """

    loss: float = 0.0
    weight: float = 0.0
    samples: int = 0
    counts: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Sums) -> Sums:
        counts = {
            key: self.counts.get(key, 0.0) + other.counts.get(key, 0.0) for key in {**self.counts, **other.counts}
        }
        return Sums(self.loss + other.loss, self.weight + other.weight, self.samples + other.samples, counts)

    @property
    def mean_loss(self) -> float:
        """The loss divided by the sum of weights; NaN where nothing was weighed."""
        return self.loss / self.weight if self.weight else float("nan")

    @property
    def accuracy(self) -> float:
        """The share of the judged samples predicted right, 0 to 1; NaN where there were none."""
        judged = self.counts.get("judged", 0.0)
        return self.counts.get("correct", 0.0) / judged if judged else float("nan")


def _nothing() -> None:
    return None


@dataclass(frozen=True, slots=True)
class GradientResult:
    """Gradients of the summed loss over one microbatch, per parameter, and the sums themselves.

    ``statistics`` are what the layers' running statistics are made of, sums over the samples in float64. ``release()``
    hands the arrays back to the session that made them; they must not be read afterwards.
    """

    gradients: Arena
    sums: Sums
    statistics: Arena = field(default_factory=Layout({}, np.dtype(np.float64)).empty)
    release: Callable[[], None] = _nothing


@dataclass(frozen=True, slots=True)
class WorkerJoined:
    """The worker at ``address``, which does ``slots`` pieces of work at once, takes part from now on."""

    address: str
    slots: int


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker at ``address`` is gone; its work is computed elsewhere, with the same bits."""

    address: str
    reason: str


@dataclass(frozen=True, slots=True)
class Speculated:
    """The worker at ``address`` computes too what ``instead_of`` has not returned in time; the first result counts.

    step: whose parameters it is computed with. microbatch: which one of that step, None where it is a prediction.
    """

    address: str
    instead_of: str
    step: int
    microbatch: int | None


Notice = WorkerJoined | WorkerLost | Speculated
"""What a home tells of its workers, besides results."""


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """The model's outputs, (n, classes), an array of the caller's own, and the sums where there were labels."""

    outputs: Array
    sums: Sums = field(default_factory=Sums)
