"""What one pass over a model may use: memory, random numbers, a place for gradients, and a way to be stopped."""

from __future__ import annotations

import mmap
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import prod
from threading import Lock
from weakref import ref
from zlib import crc32

import numpy as np

from asynctrain.arena import Array, Shape, aligned_empty
from asynctrain.nn.kernels.backend import NUMPY, Kernels
from asynctrain.types import Params

HUGE_PAGE = 2**21  # bytes
SLAB = 2**27  # bytes that are asked of the system at a time, at least; what is never touched takes no memory
LENT = 2**16  # bytes: buffers from here on are lent, smaller ones are kept under their keys
GRAIN = 2**12  # bytes: what is lent comes in multiples of it

Job = Callable[[], None]


def _nothing() -> None:
    return None


def _at_once(job: Job) -> None:
    job()


class _Slab:
    """Memory of the system's, from the beginning of a huge page on, and which stretches of it are free.

    With small pages a pass spends a twentieth of its time on finding them.
    """

    def __init__(self, size: int) -> None:
        self.memory = _anonymous(size + HUGE_PAGE)
        self.start = -np.frombuffer(self.memory, np.uint8).ctypes.data % HUGE_PAGE
        with suppress(AttributeError, OSError):  # a system that knows no huge pages
            self.memory.madvise(mmap.MADV_HUGEPAGE, self.start, size)
        self.touched = 0  # bytes, from the start on
        self._free = [(0, size)]  # first byte and end, in order, never side by side

    def take(self, size: int) -> int | None:
        """Return the first place where there is room, or None."""
        for index, (first, end) in enumerate(self._free):
            if end - first >= size:
                self._free[index : index + 1] = [(first + size, end)] if end - first > size else []
                self.touched = max(self.touched, first + size)
                return first
        return None

    def give_back(self, first: int, size: int) -> None:
        """Make a stretch that was taken free, one with those beside it."""
        end, index = first + size, bisect_left(self._free, (first,))
        following = index
        if index < len(self._free) and self._free[index][0] == end:
            end, following = self._free[index][1], index + 1
        if index > 0 and self._free[index - 1][1] == first:
            index, first = index - 1, self._free[index - 1][0]
        self._free[index:following] = [(first, end)]


def _anonymous(size: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):  # what is shared gets no huge pages
        return mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


class Workspace:
    """Buffers that are reused, within a pass and from pass to pass, so that a steady step allocates nothing large.

    A large buffer is lent: its memory serves another as soon as nobody refers to the array, or to a view of it, any
    more. So what a layer needs for a moment is the same memory in all layers, and likely to be in cache, and a backward
    pass goes on in what it no longer needs. As references say what is needed, work that is done later, or in another
    thread, keeps its arrays.

    Not for two passes at the same time: give each worker a workspace of its own. Jobs of one pass may use it from
    several threads, as each takes its buffers under keys of its own.
    """

    __slots__ = ("_lent", "_memory", "_returned", "_slabs", "_taking", "_views")

    def __init__(self) -> None:
        self._memory: dict[str, Array] = {}
        self._views: dict[str, Array] = {}
        self._slabs: list[_Slab] = []
        self._lent: dict[tuple[_Slab, int], ref[Array]] = {}
        self._returned: deque[tuple[_Slab, int, int]] = deque()  # since memory was taken last
        self._taking = Lock()

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
            return self._lend(shape, dtype, -(-size // GRAIN) * GRAIN)
        memory = self._memory.get(key)
        if memory is None or memory.nbytes < size:
            memory = self._memory[key] = aligned_empty((size,), np.uint8)
        view = self._views[key] = memory[:size].view(dtype).reshape(shape)
        return view

    def _lend(self, shape: Shape, dtype: np.dtype[np.generic], size: int) -> Array:
        """Return an array whose memory comes back with the last reference to it; its views refer to it too."""
        with self._taking:
            slab, first = self._take(size)
        array: Array = np.ndarray(shape, dtype, slab.memory, slab.start + first)
        lent, returned = self._lent, self._returned

        def come_back(_: ref[Array]) -> None:  # called anywhere, by any thread: it takes no lock
            del lent[slab, first]
            returned.append((slab, first, size))

        lent[slab, first] = ref(array, come_back)
        return array

    def _take(self, size: int) -> tuple[_Slab, int]:
        """Return where there is room for so many bytes."""
        while self._returned:
            slab, first, length = self._returned.popleft()
            slab.give_back(first, length)
        for slab in self._slabs:
            first_fit = slab.take(size)
            if first_fit is not None:
                return slab, first_fit
        self._slabs.append(_Slab(max(size, SLAB)))
        return self._take(size)

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        return sum(memory.nbytes for memory in self._memory.values()) + sum(slab.touched for slab in self._slabs)

    def __repr__(self) -> str:
        return f"<Workspace {self.nbytes / 2**20:.1f} MiB, {len(self._lent)} arrays lent>"


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
