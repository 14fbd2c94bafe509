"""What one pass over a model may use: memory, random numbers, a place for gradients, and a way to be stopped."""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from math import prod
from threading import Lock
from typing import NamedTuple
from weakref import ref
from zlib import crc32

import numpy as np

from asynctrain.arena import Array, Shape, aligned_empty
from asynctrain.nn.kernels.backend import NUMPY, Kernels
from asynctrain.types import Params

HUGE_PAGE = 2**21  # bytes
LENT = 2**16  # bytes: buffers from here on are lent, smaller ones are kept under their keys
GRAIN = 2**16  # bytes: memory to lend comes in multiples of it
SLACK = 2  # times what was asked for: memory that is larger is left for others

Job = Callable[[], None]


def _nothing() -> None:
    return None


def _at_once(job: Job) -> None:
    job()


class _Block(NamedTuple):
    """A piece of memory to lend."""

    memory: mmap.mmap
    start: int  # its first byte that is used
    home: list[_Block]  # the free blocks of its size


class Workspace:
    """Buffers that are reused, within a pass and from pass to pass, so that a steady step allocates nothing large.

    A large buffer is lent: its memory serves another as soon as nobody refers to the array, or to a view of it, any
    more. So what a layer needs for a moment is the same memory in all layers, and likely to be in cache, and a backward
    pass goes on in what it no longer needs. As references say what is needed, work that is done later, or in another
    thread, keeps its arrays.

    Not for two passes at the same time: give each worker a workspace of its own. Jobs of one pass may use it from
    several threads, as each takes its buffers under keys of its own.
    """

    __slots__ = ("_free", "_growing", "_lent", "_memory", "_sizes", "_views")

    def __init__(self) -> None:
        self._memory: dict[str, Array] = {}
        self._views: dict[str, Array] = {}
        self._free: dict[int, list[_Block]] = {}
        self._sizes: tuple[int, ...] = ()  # of all blocks, in order
        self._lent: dict[int, tuple[_Block, ref[Array]]] = {}
        self._growing = Lock()

    def empty(self, key: str, shape: Shape, dtype: np.dtype[np.generic]) -> Array:
        """Return a C-contiguous array, aligned to 64 bytes, its contents undefined.

        It is good as long as somebody refers to it and nobody asks for the same key again: then a small one may be
        the same memory.
        """
        view = self._views.get(key)
        if view is not None and view.shape == shape and view.dtype == dtype:
            return view
        size = prod(shape) * dtype.itemsize
        if size >= LENT:
            return self._lend(shape, dtype, self._block(size))
        memory = self._memory.get(key)
        if memory is None or memory.nbytes < size:
            memory = self._memory[key] = aligned_empty((size,), np.uint8)
        view = self._views[key] = memory[:size].view(dtype).reshape(shape)
        return view

    def _lend(self, shape: Shape, dtype: np.dtype[np.generic], block: _Block) -> Array:
        """Return an array in the block, which comes home with the last reference to it; its views refer to it too."""
        array: Array = np.ndarray(shape, dtype, block.memory, block.start)
        lent, key = self._lent, id(block)

        def come_home(_: ref[Array]) -> None:
            del lent[key]
            block.home.append(block)

        lent[key] = block, ref(array, come_home)
        return array

    def _block(self, size: int) -> _Block:
        """Return the free block that fits best, the one used last if there are several, or a new one."""
        sizes = self._sizes
        for capacity in sizes[bisect_left(sizes, size) :]:
            if capacity > SLACK * size:
                break
            with suppress(IndexError):
                return self._free[capacity].pop()
        capacity = -(-size // GRAIN) * GRAIN
        with self._growing:
            home = self._free.setdefault(capacity, [])
            self._sizes = tuple(sorted([*self._sizes, capacity]))
        return _Block(*_mapped(capacity), home)

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        return sum(memory.nbytes for memory in self._memory.values()) + sum(self._sizes)

    def __repr__(self) -> str:
        return f"<Workspace {len(self._memory) + len(self._sizes)} buffers, {self.nbytes / 2**20:.1f} MiB>"


def _mapped(size: int) -> tuple[mmap.mmap, int]:
    """Return ``size`` bytes of memory of the system's and where in it they begin, at a huge page if they are many.

    With small pages a pass spends a twentieth of its time on finding them. What is never touched takes no memory.
    """
    if size < HUGE_PAGE // 2:
        return mmap.mmap(-1, size), 0
    memory = mmap.mmap(-1, size + 2 * HUGE_PAGE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE
    if hasattr(memory, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE, start, round(size / HUGE_PAGE) * HUGE_PAGE)
    return memory, start


class Scope:
    """What a layer may use during one pass; the model gives each layer a child, keyed by the layer's path.

    Args:
        workspace: where buffers come from.
        train: whether layers behave as in training (dropout drops).
        rng: gives the generator of a layer, from a number that depends on the layer's path alone.
        check: called before each kernel of each leaf layer, in the thread that runs it; raises to stop the pass.
        emit: takes the job that computes one layer's weight gradient. It may run the job later, in any order and in
            another thread while the pass goes on, but before the workspace serves another pass.
        gradients: where weight gradients are written, one array per parameter.
        state: the layers' running statistics, which a pass that predicts uses.
        statistics: where a pass of training writes what the running statistics are made of.
        kernels: what layers compute with.

    Attributes:
        spare: whether the array that the layer is about to be given, x or dy, may be written over: nobody else needs
            it. Containers say so; after its backward pass one says so of the dx that it has returned.
    """

    __slots__ = (
        "_children",
        "_gradients",
        "_prefix",
        "_rng",
        "_state",
        "_statistics",
        "_workspace",
        "check",
        "emit",
        "kernels",
        "spare",
        "train",
    )

    def __init__(
        self,
        workspace: Workspace,
        *,
        train: bool,
        rng: Callable[[int], np.random.Generator] | None = None,
        check: Callable[[], None] = _nothing,
        emit: Callable[[Job], None] = _at_once,
        gradients: Params | None = None,
        state: Params | None = None,
        statistics: Params | None = None,
        kernels: Kernels = NUMPY,
    ) -> None:
        self.train = train
        self.spare = False
        self.kernels = kernels
        self.check = check
        self.emit = emit
        self._workspace = workspace
        self._rng = rng
        self._gradients = gradients
        self._state = state
        self._statistics = statistics
        self._prefix = ""
        self._children: dict[str, Scope] = {}

    def child(self, name: str) -> Scope:
        """Return the scope of the nested layer ``name``, the same one at each call."""
        child = self._children.get(name)
        if child is None:
            child = self._children[name] = Scope(
                self._workspace,
                train=self.train,
                rng=self._rng,
                check=self.check,
                emit=self.emit,
                gradients=self._gradients,
                state=self._state,
                statistics=self._statistics,
                kernels=self.kernels,
            )
            child._prefix = f"{self._prefix}{name}/"
        return child

    @property
    def path(self) -> str:
        """Where the layer is in the model, such as ``conv1``; empty for the model itself."""
        return self._prefix.removesuffix("/")

    def empty(self, name: str, shape: Shape, dtype: np.dtype[np.generic]) -> Array:
        """Return the layer's buffer ``name``; see ``Workspace.empty``."""
        return self._workspace.empty(self._prefix + name, shape, dtype)

    def over(self, name: str, array: Array) -> Array:
        """Return what a result in the shape of ``array``, the layer's x or dy, is written into.

        That is the array itself, where its ``spare`` says that nobody else needs it, else the buffer ``name``.
        """
        return array if self.spare else self.empty(name, array.shape, array.dtype)

    def rng(self) -> np.random.Generator:
        """Return the layer's stream of random numbers, from its beginning at each call."""
        if self._rng is None:
            raise ValueError(f"rng must be given to a scope in which {self.path or 'a layer'} draws random numbers")
        return self._rng(crc32(self.path.encode()))

    def gradient(self, name: str) -> Array:
        """Return the array that the gradient of the layer's parameter ``name`` is written into."""
        if self._gradients is None:
            raise ValueError("gradients must be given to a scope in which weight gradients are computed")
        return self._gradients[self._prefix + name]

    def state(self, name: str) -> Array:
        """Return the layer's running statistic ``name``, float64, to be read."""
        if self._state is None:
            raise ValueError(f"state must be given to a scope in which {self.path or 'a layer'} predicts")
        return self._state[self._prefix + name]

    def statistic(self, name: str) -> Array:
        """Return the array, float64, that the layer's sum ``name`` over this pass's samples is written into."""
        if self._statistics is None:
            raise ValueError(f"statistics must be given to a scope in which {self.path or 'a layer'} is trained")
        return self._statistics[self._prefix + name]

    def __repr__(self) -> str:
        return f"<Scope {self.path or 'of the model'}, {'training' if self.train else 'predicting'}>"
