"""Arrays on the wire: what is said of them, and their bytes in frames. Never pickle.

What is sent is one or more arenas, one *transfer*. The announcement names each array, its shape and its dtype; behind
it come the arenas' bytes, one arena after the other, cut into frames of 2 MiB with a checksum each. On arrival they are
copied once, into memory that is aligned to 64 bytes, where they are arenas again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from zlib import crc32

import numpy as np

from asynctrain.arena import Arena, Array, Layout, aligned_empty
from asynctrain.rpc import worker_pb2 as pb

FRAME = 2**21  # bytes
DTYPES = ("<f4", "<f8", "<i8", "|u1")
TENSORS, RANK = 2**16, 8  # at most


def groups_of(arenas: Iterable[Arena]) -> list[pb.Group]:
    """Return what is announced of ``arenas``; raises ``ValueError`` for a dtype that does not travel."""
    return [
        pb.Group(dtype=_wire_name(arena.layout.dtype), tensors=[_tensor(*item) for item in arena.layout.shapes.items()])
        for arena in arenas
    ]


def _tensor(name: str, shape: Sequence[int]) -> pb.Tensor:
    return pb.Tensor(name=name, shape=shape)


def _wire_name(dtype: np.dtype[np.generic]) -> str:
    name = dtype.newbyteorder("<").str
    if name not in DTYPES:
        raise ValueError(f"arrays that travel must be of the dtypes {', '.join(DTYPES)}, got {dtype}")
    return name


def layouts_of(groups: Sequence[pb.Group]) -> list[Layout]:
    """Return the layouts that were announced.

    Raises:
        ValueError: there are too many arrays, a name twice, a dtype or a shape that cannot be.
    """
    if sum(len(group.tensors) for group in groups) > TENSORS:
        raise ValueError(f"a transfer must have at most {TENSORS} arrays")
    return [_layout(group) for group in groups]


def _layout(group: pb.Group) -> Layout:
    if group.dtype not in DTYPES:
        raise ValueError(f"arrays must be of the dtypes {', '.join(DTYPES)}, got {group.dtype!r}")
    shapes = {tensor.name: tuple(tensor.shape) for tensor in group.tensors}
    if len(shapes) != len(group.tensors):
        raise ValueError("arrays must have different names, got one twice")
    for name, shape in shapes.items():
        if len(shape) > RANK or any(length >= 2**31 for length in shape):
            raise ValueError(f"{name!r} must have at most {RANK} axes, each shorter than 2**31, got {shape}")
    return Layout(shapes, np.dtype(group.dtype).newbyteorder("="))


def nbytes(layouts: Iterable[Layout]) -> int:
    """Return how many bytes a transfer of these layouts has. Exact, however large: nothing is allocated."""
    return sum(layout.size * layout.dtype.itemsize for layout in layouts)


def are_alike(one: Layout, other: Layout) -> bool:
    """Return whether arrays lie in two layouts alike; equal mappings may be of different orders."""
    return one == other and one.offsets == other.offsets


def vector_of(name: str, array: Array) -> Arena:
    """Return an arena of one array, a copy."""
    return Arena.of({name: array}, array.dtype)


def frames(transfer: int, arenas: Sequence[Arena]) -> Iterator[pb.Frame]:
    """Yield the frames of ``arenas``; copies as it goes, so their values must stay until the end."""
    parts = [_bytes_of(arena) for arena in arenas]
    for number, data in enumerate(_cut(parts)):
        yield pb.Frame(transfer=transfer, number=number, data=data, checksum=crc32(data))


def _bytes_of(arena: Arena) -> memoryview:
    vector = arena.vector
    if sys.byteorder != "little":
        vector = vector.astype(vector.dtype.newbyteorder("<"))
    return vector.view(np.uint8).data


def _cut(parts: Sequence[memoryview]) -> Iterator[bytes]:
    """Yield the bytes of all parts, ``FRAME`` at a time."""
    pending: list[memoryview] = []
    room = FRAME
    for part in parts:
        start = 0
        while start < len(part):
            piece = part[start : start + room]
            pending.append(piece)
            start += len(piece)
            room -= len(piece)
            if not room:
                yield b"".join(pending)
                pending, room = [], FRAME
    if pending:
        yield b"".join(pending)


def _fresh(size: int) -> Array:
    return aligned_empty((size,), np.uint8)


class Arrival:
    """Arrays that are arriving.

    Args:
        layouts: that were announced, and found to be what is permitted: so many bytes are allocated here.
        memory: returns so many bytes, a vector of uint8 that begins at a multiple of 64 bytes.
    """

    def __init__(self, layouts: Sequence[Layout], memory: Callable[[int], Array] = _fresh) -> None:
        self.layouts = layouts
        self.memory = memory(nbytes(layouts))
        self._number = 0
        self._filled = 0

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are there."""
        return self._filled == len(self.memory)

    def take(self, frame: pb.Frame) -> None:
        """Copy the bytes of the next frame.

        Raises:
            ValueError: it is not the next one, has another length than it must, or has been damaged.
        """
        expected = min(FRAME, len(self.memory) - self._filled)
        if frame.number != self._number or len(frame.data) != expected:
            raise ValueError(
                f"frame {self._number} of {expected} bytes must come next, got {frame.number} of {len(frame.data)}"
            )
        if crc32(frame.data) != frame.checksum:
            raise ValueError(f"frame {frame.number} was damaged on its way: its checksum is another")
        self.memory[self._filled : self._filled + expected] = np.frombuffer(frame.data, np.uint8)
        self._filled += expected
        self._number += 1

    def arenas(self) -> list[Arena]:
        """Return what has arrived, views of ``memory``."""
        arenas, start = [], 0
        for layout in self.layouts:
            size = prod((layout.size, layout.dtype.itemsize))
            vector = self.memory[start : start + size].view(layout.dtype.newbyteorder("<"))
            arenas.append(Arena(layout, vector.astype(layout.dtype, copy=False)))
            start += size
        return arenas
