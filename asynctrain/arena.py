"""Named arrays that lie side by side in one aligned vector.

Parameters, gradients and optimizer state are flat mappings ``"conv1/weight" -> ndarray``. Kept in an arena, the whole
mapping can be added, copied, hashed or sent as one vector, while each name stays an ordinary array.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register


def aligned_empty(shape: Shape, dtype: npt.DTypeLike) -> Array:
    """Return an uninitialised C-contiguous array whose first byte is at a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Layout:
    """The names and shapes of an arena, all of one dtype; each array begins at a multiple of 64 bytes."""

    shapes: Mapping[str, Shape]
    dtype: np.dtype[Any]

    @cached_property
    def offsets(self) -> dict[str, int]:
        """The first element of each array within the vector, in elements."""
        step = ALIGNMENT // self.dtype.itemsize
        offsets, end = {}, 0
        for name, shape in self.shapes.items():
            offsets[name] = end
            end += -(-prod(shape) // step) * step
        return offsets

    @cached_property
    def size(self) -> int:
        """The length of the vector in elements, padding included."""
        step = ALIGNMENT // self.dtype.itemsize
        return sum(-(-prod(shape) // step) * step for shape in self.shapes.values())

    def empty(self) -> Arena:
        """Return an arena of this layout with undefined values, the padding between arrays zero.

        What is large is not touched: a megabyte would take most of a millisecond, and that of whoever writes it next.
        """
        vector = aligned_empty((self.size,), self.dtype)
        for gap in self._gaps:
            vector[gap] = 0
        return Arena(self, vector)

    @cached_property
    def _gaps(self) -> list[slice]:
        """Where the padding is."""
        ends = [start + prod(self.shapes[name]) for name, start in self.offsets.items()]
        following = [*self.offsets.values(), self.size][1:]
        return [slice(end, start) for end, start in zip(ends, following, strict=True) if end < start]


class Arena(Mapping[str, Array]):
    """A mapping of names to arrays that are views of one vector.

    Args:
        layout: names, shapes and dtype.
        vector: shape ``(layout.size,)``, the layout's dtype, C-contiguous and aligned to 64 bytes.
    """

    __slots__ = ("_views", "layout", "vector")

    def __init__(self, layout: Layout, vector: Array) -> None:
        self.layout = layout
        self.vector = vector
        self._views = {
            name: vector[start : start + prod(shape)].reshape(shape)
            for (name, shape), start in zip(layout.shapes.items(), layout.offsets.values(), strict=True)
        }

    @classmethod
    def of(cls, arrays: Mapping[str, Array], dtype: npt.DTypeLike | None = None) -> Arena:
        """Return an arena that holds copies of ``arrays``, cast to ``dtype`` (by default the first array's)."""
        if dtype is None:
            dtype = next((array.dtype for array in arrays.values()), np.dtype(np.float32))
        arena = Layout({name: array.shape for name, array in arrays.items()}, np.dtype(dtype)).empty()
        for name, array in arrays.items():
            arena[name][...] = array
        return arena

    def copy(self) -> Arena:
        """Return an arena of its own with the same values."""
        return self.layout.empty().assign(self)

    def assign(self, other: Arena) -> Arena:
        """Overwrite the values with those of ``other`` (same layout) and return self."""
        np.copyto(self.vector, other.vector)
        return self

    def read_only(self) -> Arena:
        """Return the same values, not copied, as arrays that refuse to be written."""
        vector = self.vector.view()
        vector.flags.writeable = False
        return Arena(self.layout, vector)

    def __getitem__(self, name: str) -> Array:
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        count = sum(prod(shape) for shape in self.layout.shapes.values())
        return f"<Arena {len(self)} arrays, {count:,} x {self.layout.dtype}>"


def digest(arrays: Mapping[str, Array]) -> str:
    """Return the SHA-256, as hexadecimal digits, over names, dtypes, shapes and values, in the order of the names."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        sha.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        sha.update(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data)
    return sha.hexdigest()
