"""Arrays on the wire: what is said of them, and their bytes in frames. Never pickle.

What is sent is one or more arenas, one *transfer*. The announcement names each array, its shape and its dtype; behind
it come the arenas' bytes, one arena after the other, cut into frames of 2 MiB with a checksum each. On arrival they are
copied once, into memory that is aligned to 64 bytes, where they are arenas again.

Frames are messages of protobuf as ``worker.proto`` has them, but are written and read here: protobuf's own classes
would copy the bytes three times on either side.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from asynctrain.arena import Arena, Array, Layout, aligned_empty
from asynctrain.rpc import worker_pb2 as pb

FRAME = 2**21  # bytes
SUMS = 1024  # of which a checksum is made
DTYPES = ("<f4", "<f8", "<i8", "|u1")
TENSORS, RANK = 2**16, 8  # at most


# What is said of arrays


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


def are_alike(some: Sequence[Layout], others: Sequence[Layout]) -> bool:
    """Return whether arrays lie in all these layouts alike; equal mappings may be of different orders."""
    return len(some) == len(others) and all(
        one == other and one.offsets == other.offsets for one, other in zip(some, others, strict=True)
    )


# What is sent


@dataclass(frozen=True, slots=True)
class Cargo:
    """Arrays to be sent: their layouts, and views of their bytes, which must stay until the last frame is made."""

    layouts: tuple[Layout, ...]
    parts: tuple[memoryview, ...]

    @classmethod
    def of(cls, *arenas: Arena) -> Cargo:
        """Return what arenas are as cargo."""
        return cls(tuple(arena.layout for arena in arenas), tuple(_bytes_of(arena.vector) for arena in arenas))

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> Cargo:
        """Return what arrays are as cargo, each as an arena of its own."""
        layouts = tuple(Layout({name: array.shape}, array.dtype) for name, array in arrays.items())
        parts: list[memoryview] = []
        for layout, array in zip(layouts, arrays.values(), strict=True):
            parts += [_bytes_of(array), memoryview(bytes(nbytes([layout]) - array.nbytes))]
        return cls(layouts, tuple(parts))

    @property
    def nbytes(self) -> int:
        """How many bytes its frames carry."""
        return nbytes(self.layouts)

    def groups(self) -> list[pb.Group]:
        """Return what is announced of it; raises ``ValueError`` for a dtype that does not travel."""
        return [
            pb.Group(
                dtype=_wire_name(layout.dtype),
                tensors=[pb.Tensor(name=name, shape=shape) for name, shape in layout.shapes.items()],
            )
            for layout in self.layouts
        ]

    def frames(self, transfer: int) -> Iterator[bytes]:
        """Yield its frames, each a message of either side; the bytes are read and copied as it goes."""
        for number, data in enumerate(_cut(self.parts)):
            yield _frame_of(transfer, number, data)


def _wire_name(dtype: np.dtype[Any]) -> str:
    name = dtype.newbyteorder("<").str
    if name not in DTYPES:
        raise ValueError(f"arrays that travel must be of the dtypes {', '.join(DTYPES)}, got {dtype}")
    return name


def _bytes_of(array: Array) -> memoryview:
    if sys.byteorder != "little":
        array = array.astype(array.dtype.newbyteorder("<"))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _cut(parts: Sequence[memoryview]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of all parts, ``FRAME`` at a time; copied only where they are of several parts."""
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
                yield _joined(pending)
                pending, room = [], FRAME
    if pending:
        yield _joined(pending)


def _joined(pieces: Sequence[memoryview]) -> bytes | memoryview:
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


# Frames as messages


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that has come; its data are a view of the message's bytes."""

    transfer: int
    number: int
    data: memoryview
    checksum: int


def _tag(field: Any) -> bytes:
    return bytes([field.number << 3 | 2])  # followed by a length, and so many bytes


_FRAME = _tag(pb.FromWorker.DESCRIPTOR.fields_by_name["frame"])  # and of FromCoordinator
_DATA = _tag(pb.Frame.DESCRIPTOR.fields_by_name["data"])
_VARINT = rb"[\x80-\xff]{0,9}[\x00-\x7f]"
_HEAD = re.compile(  # a frame's length, its numbers, and the length of its data, which are all the rest
    rb"%b(%b)((?:\x08%b)?(?:\x10%b)?(?:\x25.{4})?)%b(%b)" % (_FRAME, _VARINT, _VARINT, _VARINT, _DATA, _VARINT),
    re.DOTALL,
)


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def _frame_of(transfer: int, number: int, data: bytes | memoryview) -> bytes:
    """Return a frame as a message, its data last, so that they can be found, and copied once."""
    numbers = pb.Frame(transfer=transfer, number=number, checksum=checksum(data)).SerializeToString()
    head = numbers + _DATA + _varint(len(data))
    return b"".join([_FRAME, _varint(len(head) + len(data)), head, data])


def checksum(data: bytes | memoryview | Array) -> int:
    """Return the CRC-32 of the sums of ``data``'s words: word i, of 64 bits, counts in the sum i mod 1024.

    The CRC of 2 MiB themselves would take as long as to send them to a process of the same machine.
    """
    words = np.frombuffer(data, "<u8")
    rows = len(words) // SUMS
    sums = np.add.reduce(words[: rows * SUMS].reshape(rows, SUMS), axis=0)
    sums[: len(words) - rows * SUMS] += words[rows * SUMS :]
    return crc32(sums)


def frame_in(message: bytes) -> Frame | None:
    """Return the frame that a message is; None where it is another, or a frame that is written otherwise."""
    match = _HEAD.match(message)
    if match is None:
        return None
    inside, numbers, data = match.groups()
    if inside != _varint(len(message) - match.end(1)) or data != _varint(len(message) - match.end()):
        return None
    said = pb.Frame.FromString(numbers)
    return Frame(said.transfer, said.number, memoryview(message)[match.end() :], said.checksum)


# What comes


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

    def take(self, frame: Frame) -> None:
        """Copy the bytes of the next frame.

        Raises:
            ValueError: it is not the next one, has another length than it must, or has been damaged.
        """
        expected = min(FRAME, len(self.memory) - self._filled)
        if frame.number != self._number or len(frame.data) != expected:
            raise ValueError(
                f"frame {self._number} of {expected} bytes must come next, got {frame.number} of {len(frame.data)}"
            )
        place = self.memory[self._filled : self._filled + expected]
        place[...] = np.frombuffer(frame.data, np.uint8)
        if checksum(place) != frame.checksum:
            raise ValueError(f"frame {frame.number} was damaged on its way: its checksum is another")
        self._filled += expected
        self._number += 1

    def arenas(self) -> list[Arena]:
        """Return what has arrived, views of ``memory``."""
        arenas, start = [], 0
        for layout in self.layouts:
            size = nbytes([layout])
            vector = self.memory[start : start + size].view(layout.dtype.newbyteorder("<"))
            arenas.append(Arena(layout, vector.astype(layout.dtype, copy=False)))
            start += size
        return arenas
