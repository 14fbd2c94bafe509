"""What one pass over a model may use: memory, random numbers, a place for gradients, and a way to be stopped."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from zlib import crc32

import numpy as np

from asynctrain.arena import Array, Shape, aligned_empty
from asynctrain.nn.kernels.backend import NUMPY, Kernels
from asynctrain.types import Params

HUGE_PAGE = 2**21  # bytes

Job = Callable[[], None]


def _nothing() -> None:
    return None


def _at_once(job: Job) -> None:
    job()


def _memory(size: int) -> Array:
    """Return ``size`` bytes, many of them from the beginning of a huge page on.

    With small pages a pass spends a twentieth of its time on finding them. numpy asks the system for huge ones
    where an array takes two or more; what is beyond ``size`` is never touched, and so takes no memory.
    """
    if size < HUGE_PAGE // 2:
        return aligned_empty((size,), np.uint8)
    raw = np.empty(max(size + HUGE_PAGE, 2 * HUGE_PAGE), np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE
    return raw[start : start + size]


class Workspace:
    """Buffers that are reused from pass to pass, so that a steady step allocates nothing large.

    Not for two passes at the same time: give each worker a workspace of its own. Jobs of one pass may use it from
    several threads, as each takes its buffers under keys of its own.
    """

    __slots__ = ("_memory", "_views")

    def __init__(self) -> None:
        self._memory: dict[str, Array] = {}
        self._views: dict[str, Array] = {}

    def empty(self, key: str, shape: Shape, dtype: np.dtype[np.generic]) -> Array:
        """Return the C-contiguous, 64-byte aligned buffer of ``key``, its contents undefined.

        It grows when a larger shape comes and gives a view of its beginning when a smaller one does, so what was
        returned earlier for the same key is overwritten.
        """
        view = self._views.get(key)
        if view is None or view.shape != shape or view.dtype != dtype:
            view = self._views[key] = self._view(key, shape, dtype)
        return view

    def _view(self, key: str, shape: Shape, dtype: np.dtype[np.generic]) -> Array:
        size = prod(shape) * dtype.itemsize
        memory = self._memory.get(key)
        if memory is None or memory.nbytes < size:
            memory = self._memory[key] = _memory(size)
        return memory[:size].view(dtype).reshape(shape)

    @property
    def nbytes(self) -> int:
        """The bytes held."""
        return sum(memory.nbytes for memory in self._memory.values())

    def __repr__(self) -> str:
        return f"<Workspace {len(self._memory)} buffers, {self.nbytes / 2**20:.1f} MiB>"


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
