"""Memory that a parent and its worker processes both see: blocks without a name, and where things lie in them.

A block is created by the parent, and its file descriptor is handed to the worker over a socket. As it has no name, the
system takes it back when the last of the two lets go of it or dies, however it dies.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from asynctrain.arena import ALIGNMENT, Arena, Array, Layout, Shape
from asynctrain.executors.worker import StopFlag, Stopped
from asynctrain.nn.model import Model
from asynctrain.types import Params, Program

MEMORY_FILES = Path("/dev/shm")  # noqa: S108 - files there have no name either, see _anonymous_file


class Block:
    """Some bytes of shared memory, zero at first, at an address that is a multiple of the page size.

    It stays mapped while an array refers to it; ``close`` gives back the file descriptor alone.
    """

    def __init__(self, descriptor: int, size: int, *, writable: bool = True) -> None:
        self.size = size
        self.descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._bytes = np.frombuffer(mmap.mmap(descriptor, size, mmap.MAP_SHARED, protection), np.uint8)

    @classmethod
    def create(cls, size: int) -> Block:
        """Return a new block of ``size`` bytes, at least 1; only what is written takes memory."""
        return cls(_anonymous_file(size), size)

    def array(self, offset: int, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """Return the array that begins ``offset`` bytes into the block."""
        return self._bytes[offset : offset + prod(shape) * dtype.itemsize].view(dtype).reshape(shape)

    def arena(self, offset: int, layout: Layout) -> Arena:
        """Return the arena that begins ``offset`` bytes into the block."""
        return Arena(layout, self.array(offset, (layout.size,), layout.dtype))

    def close(self) -> None:
        """Give back the file descriptor, once whoever should see the block has it; may be called again."""
        self._close()

    def __repr__(self) -> str:
        return f"<Block of {self.size / 2**20:.1f} MiB>"


def _anonymous_file(size: int) -> int:
    """Return the descriptor of a file in memory; of one on disk, unlinked, where the system has no such files."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("asynctrain")
        os.truncate(descriptor, size)
        return descriptor
    with tempfile.TemporaryFile(dir=MEMORY_FILES if MEMORY_FILES.is_dir() else None) as file:
        os.truncate(file.fileno(), size)
        if hasattr(os, "posix_fallocate"):  # a full file system is an error here, and would be a crash at the first use
            os.posix_fallocate(file.fileno(), 0, size)
        return os.dup(file.fileno())


def aligned(size: int) -> int:
    """Return the next multiple of 64 bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Piece:
    """An array in a block: where it begins, its shape, and its dtype as numpy writes it (``<f4``)."""

    offset: int
    shape: Shape
    dtype: str

    def of(self, block: Block) -> Array:
        """Return the array."""
        return block.array(self.offset, self.shape, np.dtype(self.dtype))

    def to_json(self) -> list[object]:
        """Return it as JSON values."""
        return [self.offset, list(self.shape), self.dtype]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Piece:
        """Return the piece that ``to_json`` described."""
        offset, shape, dtype = value
        return cls(offset, tuple(shape), dtype)

    @property
    def end(self) -> int:
        """Where the next piece may begin."""
        return aligned(self.offset + prod(self.shape) * np.dtype(self.dtype).itemsize)


class Places:
    """Where things lie in the blocks of one program; worked out alike by the parent and by its workers.

    A *board* holds the parameters of one version and the model's state. A *slot* holds one piece of work: the stop
    flag, the result's gradients and statistics, and behind them what comes with the work, and the predictions.
    """

    def __init__(self, program: Program) -> None:
        model = Model.from_json(program.architecture)
        self.params = model.layout(program.dtype)
        self.state = model.state_layout
        self.gradients = self.params
        self.statistics = model.statistics_layout
        self._outputs = model.output_shape
        self._dtype = np.dtype(program.dtype)

    @cached_property
    def state_offset(self) -> int:
        """Of the model's state in a board."""
        return aligned(_nbytes(self.params))

    @cached_property
    def board_size(self) -> int:
        """The size of a board, in bytes."""
        return max(1, self.state_offset + _nbytes(self.state))

    @cached_property
    def statistics_offset(self) -> int:
        """Of the statistics in a slot."""
        return aligned(ALIGNMENT + _nbytes(self.gradients))

    @cached_property
    def inputs_offset(self) -> int:
        """Of the first array that comes with the work, in a slot."""
        return aligned(self.statistics_offset + _nbytes(self.statistics))

    def inputs(self, arrays: Sequence[Array]) -> list[Piece]:
        """Return where these arrays go in a slot."""
        pieces: list[Piece] = []
        for array in arrays:
            pieces.append(Piece(pieces[-1].end if pieces else self.inputs_offset, array.shape, array.dtype.str))
        return pieces

    def output_layout(self, samples: int) -> Layout:
        """Return how the predictions for so many samples lie, where they travel as an arena."""
        return Layout({"outputs": (samples, *self._outputs)}, self._dtype)

    def outputs(self, after: Piece, samples: int) -> Piece:
        """Return where the predictions for so many samples go, behind the last input."""
        return Piece(after.end, (samples, *self._outputs), self._dtype.str)


class Board:
    """The parameters of one version and the model's state, in a block; ``version`` is set by the parent."""

    def __init__(self, places: Places, block: Block) -> None:
        self.block = block
        self.params = block.arena(0, places.params)
        self.model_state = block.arena(places.state_offset, places.state)


class Slot:
    """The place of one piece of work, in a block."""

    def __init__(self, places: Places, block: Block) -> None:
        self.block = block
        self.stop = SharedStopFlag(block)
        self._places = places

    @cached_property
    def gradients(self) -> Arena:
        """The result's gradient sums."""
        return self.block.arena(ALIGNMENT, self._places.gradients)

    @cached_property
    def statistics(self) -> Arena:
        """What the running statistics are made of."""
        return self.block.arena(self._places.statistics_offset, self._places.statistics)


class SharedStopFlag(StopFlag):
    """A stop flag that is the first byte of a block: set by the parent, found set by the worker in that instant."""

    __slots__ = ("_byte",)

    def __init__(self, block: Block) -> None:
        self._byte = block.array(0, (1,), np.dtype(np.uint8)).data

    def set(self) -> None:
        """Ask the work to stop before its next kernel."""
        self._byte[0] = 1

    def clear(self) -> None:
        """Make it ready for the slot's next work."""
        self._byte[0] = 0

    def check(self) -> None:
        """Raise ``Stopped`` if the flag is set."""
        if self._byte[0]:
            raise Stopped


def write(params: Params, into: Arena, argument: str) -> None:
    """Copy ``params`` into an arena of the program's layout.

    Raises:
        ValueError: names, shapes or dtypes are not the program's.
    """
    if isinstance(params, Arena) and _are_alike(params.layout, into.layout):
        into.assign(params)
        return
    if params.keys() != into.keys():
        odd = ", ".join(sorted(params.keys() ^ into.keys()))
        raise ValueError(f"{argument} must have the names of the program's model; of only one of the two are {odd}")
    for name, array in params.items():
        target = into[name]
        if array.shape != target.shape or array.dtype != target.dtype:
            raise ValueError(
                f"{argument}[{name!r}] must be {target.dtype} of shape {target.shape}, got {array.dtype} {array.shape}"
            )
        target[...] = array


def _are_alike(one: Layout, other: Layout) -> bool:
    return one == other and one.offsets == other.offsets  # equal mappings may be of different orders


def _nbytes(layout: Layout) -> int:
    return layout.size * layout.dtype.itemsize
