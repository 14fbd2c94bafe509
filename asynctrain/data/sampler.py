"""The order in which a dataset is read: a pure function of the seed and the epoch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from asynctrain.arena import Array
from asynctrain.randomness import Purpose, generator, require_seed


class Order(Protocol):
    """What a loader needs of a sampler."""

    @property
    def size(self) -> int:
        """How many positions each epoch has."""
        ...

    def order(self, epoch: int) -> Array:
        """Return which sample is at each position of ``epoch``, (size,) int64; always the same for the same epoch."""
        ...


class _Drawn(ABC):
    """An order that is drawn anew for each epoch, the latest one kept.

    Args:
        size: how many positions an epoch has, 1 or more.
        seed: 0 to 2**64 - 1.
    """

    def __init__(self, size: int, seed: int) -> None:
        if size < 1:
            raise ValueError(f"size must be 1 or more, got {size}")
        self.size = size
        self.seed = require_seed(seed)
        self._latest: tuple[int, Array] = (-1, np.empty(0, np.int64))  # an epoch asks again for each of its chunks

    def order(self, epoch: int) -> Array:
        """Return which sample is at each position of ``epoch``: (size,) int64, read-only.

        A million of them take about 10 ms, so do not ask for them on the event loop.
        """
        known, order = self._latest
        if known != epoch:
            order = self._draw(epoch)
            order.flags.writeable = False
            self._latest = (epoch, order)
        return order

    @abstractmethod
    def _draw(self, epoch: int) -> Array:
        """Return a new array with the order of ``epoch``."""


class Sampler(_Drawn):
    """Every sample exactly once in each epoch.

    Args:
        size: how many samples there are, 1 or more.
        seed: 0 to 2**64 - 1.
        shuffle: whether each epoch has a random order of its own; else every epoch is 0, 1, 2, ...
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        super().__init__(size, seed)
        self.shuffle = shuffle

    def _draw(self, epoch: int) -> Array:
        if not self.shuffle:
            return np.arange(self.size, dtype=np.int64)
        return generator(self.seed, Purpose.ORDER, epoch).permutation(self.size)

    def __repr__(self) -> str:
        return f"Sampler(size={self.size}, seed={self.seed}, shuffle={self.shuffle})"


class WeightedSampler(_Drawn):
    """Samples drawn with replacement, each as likely as its weight says.

    Args:
        weights: (n,), one for each sample, 0 or more and finite; at least one is positive.
        seed: 0 to 2**64 - 1.
        samples: how many are drawn for an epoch, 1 or more; by default n.
    """

    def __init__(self, weights: Array | Sequence[float], seed: int, samples: int | None = None) -> None:
        weights = np.asarray(weights, np.float64)
        if weights.ndim != 1:
            raise ValueError(f"weights must have one dimension, got {weights.ndim}")
        sums = np.cumsum(weights)
        if not len(sums) or not (weights >= 0).all() or not 0 < sums[-1] < np.inf:
            raise ValueError("weights must be finite, 0 or more, and at least one of them positive")
        super().__init__(len(weights) if samples is None else samples, seed)
        self._limits = sums / sums[-1]

    def _draw(self, epoch: int) -> Array:
        points = generator(self.seed, Purpose.ORDER, epoch).random(self.size)
        return np.searchsorted(self._limits, points, side="right").astype(np.int64, copy=False)

    def __repr__(self) -> str:
        return f"<WeightedSampler of {len(self._limits):,}: {self.size:,} an epoch, seed {self.seed}>"


class BalancedSampler(_Drawn):
    """All classes equally often, whatever their share of the dataset, in a random order.

    Of an epoch's positions, as many as there are samples, each class that has any gets the same number; where that
    does not come out even, the first classes get one more. A class with fewer samples repeats them, each about equally
    often; one with more shows a part of them, another one each epoch.

    Args:
        labels: (n,) integers, 0 or more.
        seed: 0 to 2**64 - 1.
    """

    def __init__(self, labels: Array | Sequence[int], seed: int) -> None:
        labels = np.asarray(labels)
        if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels must be one or more integers in one dimension, got {labels.dtype} of {labels.shape}"
            )
        super().__init__(len(labels), seed)
        self._members = [np.flatnonzero(labels == label) for label in np.unique(labels)]

    def _draw(self, epoch: int) -> Array:
        rng = generator(self.seed, Purpose.ORDER, epoch)
        share, rest = divmod(self.size, len(self._members))
        chosen = [_repeated(members, share + (k < rest), rng) for k, members in enumerate(self._members)]
        return rng.permutation(np.concatenate(chosen))

    def __repr__(self) -> str:
        return f"<BalancedSampler of {self.size:,} samples in {len(self._members)} classes, seed {self.seed}>"


def _repeated(members: Array, count: int, rng: np.random.Generator) -> Array:
    """Return ``count`` of the members: all of them as often as they fit in whole, the rest without repetition."""
    rounds, rest = divmod(count, len(members))
    return np.concatenate([np.tile(members, rounds), rng.permutation(members)[:rest]])


class MixSampler(_Drawn):
    """Several ranges of samples mixed by ``turns``, each in an order of its own.

    Args:
        sizes: how many samples each range has; together 1 or more. The first range is 0, 1, ..., the second goes on.
        weights: how often each range has its turn, relative to the others; positive.
        seed: 0 to 2**64 - 1.
        shuffle: whether in each epoch each range has a random order of its own; else it is read as it stands.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool = True) -> None:
        super().__init__(sum(sizes), seed)
        self.shuffle = shuffle
        self._places = np.argsort(turns(sizes, weights), kind="stable")  # those of the first range, the second, ...
        self._sizes = tuple(sizes)

    def _draw(self, epoch: int) -> Array:
        order = np.empty(self.size, np.int64)
        order[self._places] = np.concatenate(list(self._ranges(epoch)))
        return order

    def _ranges(self, epoch: int) -> list[Array]:
        starts = np.cumsum([0, *self._sizes[:-1]])
        if not self.shuffle:
            return [start + np.arange(size) for start, size in zip(starts, self._sizes, strict=True)]
        return [
            start + generator(self.seed, Purpose.ORDER, epoch, number).permutation(size)
            for number, (start, size) in enumerate(zip(starts, self._sizes, strict=True))
        ]

    def __repr__(self) -> str:
        return f"<MixSampler of {len(self._sizes)} sources: {self.size:,} samples, seed {self.seed}>"


def turns(sizes: Sequence[int], weights: Sequence[float]) -> Array:
    """Return whose turn it is at each position when several sources are mixed: (sum(sizes),) int64.

    Record j of a source with weight w is due at (j + 1/2) / w, and whatever is due first comes first, of equals the
    source named first (stride scheduling: Waldspurger and Weihl, 1995). So at any time each source has given its share,
    rounded to the nearest record; one that is used up drops out, and the others go on in their proportion.

    Args:
        sizes: how many records each source has, 0 or more.
        weights: one for each source, positive and finite.
    """
    due = np.concatenate([(np.arange(size) + 0.5) / weight for size, weight in zip(sizes, weights, strict=True)])
    whose = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    return whose[np.argsort(due, kind="stable")]


class Turns:
    """The same mix as ``turns``, one position at a time, for sources whose end is not known beforehand.

    Args:
        weights: one for each source, positive and finite.
        given: how many records each source has given already.
    """

    def __init__(self, weights: Sequence[float], given: Sequence[int]) -> None:
        self._due = {number: (n + 0.5) / w for number, (n, w) in enumerate(zip(given, weights, strict=True))}
        self._weights = weights
        self._given = list(given)

    @property
    def next(self) -> int | None:
        """Whose turn it is; None when all are used up."""
        return min(self._due, key=self._due.__getitem__, default=None)

    def took(self, source: int) -> None:
        """Note that ``source`` has given a record."""
        self._given[source] += 1
        self._due[source] = (self._given[source] + 0.5) / self._weights[source]

    def ended(self, source: int) -> None:
        """Note that ``source`` is used up."""
        del self._due[source]
