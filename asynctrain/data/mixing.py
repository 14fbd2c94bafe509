"""Several datasets as one: one after the other, or mixed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, inf
from operator import index as as_index
from typing import Any, TypeVar

import numpy as np

from asynctrain.arena import Array
from asynctrain.data.catalog import distinct, sorted_classes
from asynctrain.data.datasets import Dataset, Splitting
from asynctrain.data.fetching import AsyncSource, is_async
from asynctrain.data.sampler import MixSampler
from asynctrain.errors import DataError
from asynctrain.types import Record, Source

T = TypeVar("T")

MOST_IN_FLIGHT = 1024  # records of a mix, however rare the part is that waits for a network


@dataclass(frozen=True, slots=True)
class PartSource:
    """A source that says which part of a whole it belongs to: ``flowers: /data/rose/1.jpg``."""

    source: Source
    part: str

    def read(self) -> Any:
        """Return what the source reads. Blocks; a ``DataError`` names the part."""
        try:
            return self.source.read()
        except DataError as error:
            raise named(error, self.part) from error

    def identity(self) -> bytes | None:
        """Return the identity of the source itself, if it has one. Blocks."""
        identify = getattr(self.source, "identity", None)
        return identify() if identify is not None else None

    def __str__(self) -> str:
        return f"{self.part}: {self.source}"


@dataclass(frozen=True, slots=True)
class AsyncPartSource(PartSource):
    """A ``PartSource`` around one that is read asynchronously."""

    source: AsyncSource

    @property
    def connection(self) -> AbstractAsyncContextManager[object]:
        """The connection of the source itself."""
        return self.source.connection

    async def fetch(self) -> bytes:
        """Return what the source fetches; a ``DataError`` names the part."""
        try:
            return await self.source.fetch()
        except DataError as error:
            raise named(error, self.part) from error


def named(error: DataError, part: str) -> DataError:
    """Return the same error with ``part`` before its path."""
    return type(error)(f"{part}: {error.path}", error.reason)


def part_of(part: str, record: Record, label: int) -> Record:
    """Return ``record`` as one of ``part``, labelled anew."""
    if is_async(record.source):
        return Record(AsyncPartSource(record.source, part), label, record.weight)
    return Record(PartSource(record.source, part), label, record.weight)


def named_parts(parts: Sequence[T] | Mapping[str, T], what: str) -> dict[str, T]:
    """Return the parts by name, ``source 0``, ``source 1``, ... where they have none."""
    if not isinstance(parts, Mapping):
        parts = {f"source {number}": part for number, part in enumerate(parts)}
    if not parts:
        raise ValueError(f"{what} must have at least one source, got none")
    return dict(parts)


def merged_classes(parts: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], list[Array]]:
    """Return all classes of the parts, and for each part the new label for each of its old ones, (classes,) int64.

    Parts that have the same classes keep them in their order; else classes of one name become one, sorted.
    """
    first = distinct(parts[0])
    equal = all(tuple(classes) == first for classes in parts)
    merged = first if equal else sorted_classes({name for classes in parts for name in distinct(classes)})
    places = {name: place for place, name in enumerate(merged)}
    return merged, [np.array([places[name] for name in classes], np.int64) for classes in parts]


def checked_weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return one weight for each of ``count`` sources, by default 1."""
    if weights is None:
        return (1.0,) * count
    if len(weights) != count or not all(0 < weight < inf for weight in weights):
        raise ValueError(f"weights must be {count} positive finite numbers, one for each source, got {weights}")
    return tuple(float(weight) for weight in weights)


class Concat(Splitting):
    """The records of several datasets, one dataset after the other.

    If the datasets do not have the same classes, those of the same name are one class, and all are sorted. A record's
    name begins with that of its dataset, in errors too: ``flowers: /data/rose/1.jpg``.

    Args:
        datasets: one or more; in a mapping they have names, else they are ``source 0``, ``source 1``, ...

    Raises:
        ValueError: there are no datasets, or one has two classes of the same name.
    """

    def __init__(self, datasets: Sequence[Dataset] | Mapping[str, Dataset]) -> None:
        self.datasets = named_parts(datasets, type(self).__name__)
        self.sizes = tuple(len(dataset) for dataset in self.datasets.values())
        self.classes, self._relabel = merged_classes([dataset.classes for dataset in self.datasets.values()])
        self.labels: Array = np.concatenate(
            [new[dataset.labels] for new, dataset in zip(self._relabel, self.datasets.values(), strict=True)]
        )
        self._parts = list(self.datasets.items())
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int, /) -> Record:
        index = range(len(self))[as_index(index)]
        number = bisect_right(self._ends, index)
        name, dataset = self._parts[number]
        record = dataset[index - self._ends[number] + self.sizes[number]]
        return part_of(name, record, int(self._relabel[number][record.label]))

    @property
    def in_flight(self) -> int:
        """How many records to read at once, so that each dataset with an ``in_flight`` is kept as busy as that says.

        At most ``MOST_IN_FLIGHT``; ``AttributeError`` if no dataset has any.
        """
        wanted: list[float] = [
            dataset.in_flight * sum(self._shares()) / share
            for dataset, share in zip(self.datasets.values(), self._shares(), strict=True)
            if hasattr(dataset, "in_flight") and share
        ]
        if not wanted:
            raise AttributeError("no dataset says how many records to read at once")
        return min(ceil(max(wanted)), MOST_IN_FLIGHT)

    def _shares(self) -> Sequence[float]:
        """Return how often each dataset has its turn, relative to the others."""
        return self.sizes

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {', '.join(self.datasets)}: {len(self):,} records>"


class Interleave(Concat):
    """Several datasets mixed evenly: it holds their records as ``Concat`` does, and ``sampler`` gives the order.

    Whose turn it is, is a pure function of weights and sizes (``asynctrain.data.sampler.turns``): at any time each
    dataset has given its share, rounded to the nearest record. When one is used up, the others go on to the end of the
    epoch; so every record comes exactly once an epoch. One cursor over the mix is enough to resume exactly.

    Args:
        datasets: as for ``Concat``.
        weights: one for each dataset, positive; how often it has its turn, relative to the others. By default all
            equal; the datasets' sizes as weights spread each of them over the whole epoch.

    Raises:
        ValueError: as for ``Concat``, or the weights are not one positive number for each dataset.
    """

    def __init__(
        self, datasets: Sequence[Dataset] | Mapping[str, Dataset], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(datasets)
        self.weights = checked_weights(weights, len(self.datasets))

    def _shares(self) -> Sequence[float]:
        return self.weights

    def sampler(self, seed: int, shuffle: bool = True) -> MixSampler:
        """Return the mixed order, in which each dataset is shuffled on its own, or read in its own order."""
        return MixSampler(self.sizes, self.weights, seed, shuffle)
