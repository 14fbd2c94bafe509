"""The process-wide guard that keeps BLAS on one thread while sessions run.

One and two BLAS threads give different bits, and the count is a setting of the whole process. So there is one guard per
process, counted: the first holder sets the count to one, the last gives back what was there before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

from asynctrain.errors import ExecutorError


class Library:
    """One BLAS library of this process."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        # MKL and OpenMP builds keep a count for each thread, the usual OpenBLAS one for the process.
        self.counts_per_thread = controller.internal_api == "mkl" or controller.threading_layer == "openmp"
        # threadpoolctl 3.8 lets only the first thread that ever asked set OpenBLAS's count, and silently drops what
        # other threads ask. The guard counts its holders itself, so it goes past that.
        self._set = getattr(controller, "_real_set_num_threads", controller.set_num_threads)

    @property
    def threads(self) -> int:
        """How many threads the library may use."""
        return int(self._controller.get_num_threads())

    @threads.setter
    def threads(self, count: int) -> None:
        self._set(count)


class _Guard:
    """Counts its holders; knows the BLAS libraries of the process while there is one."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._holders = 0
        self._before: list[tuple[Library, int]] = []

    def acquire(self, libraries: Sequence[Library]) -> None:
        with self._lock:
            if self._holders == 0:
                self._before = [(library, library.threads) for library in libraries]
                for library in libraries:
                    library.threads = 1
            self._holders += 1

    def release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                for library, before in self._before:
                    library.threads = before
                self._before = []

    def check(self) -> None:
        for library, _ in self._before:
            if library.counts_per_thread:
                library.threads = 1
            if (threads := library.threads) != 1:
                raise ExecutorError(
                    "this process",
                    f"BLAS was set to {threads} threads while a session runs on one; other counts give other bits, "
                    "so leave the count alone until the session is closed",
                )


_guard = _Guard()  # process-wide, like the setting that it guards


def find_blas() -> list[Library]:
    """Return the BLAS libraries of this process. Blocks for about a millisecond: the system lists what is loaded."""
    from threadpoolctl import ThreadpoolController

    return [Library(found) for found in ThreadpoolController().select(user_api="blas").lib_controllers]


@contextmanager
def one_blas_thread(libraries: Sequence[Library]) -> Iterator[None]:
    """Keep ``libraries``, as ``find_blas`` found them, on one thread; may be held by several at once, in any order."""
    _guard.acquire(libraries)
    try:
        yield
    finally:
        _guard.release()


def check_one_blas_thread() -> None:
    """Make sure that this thread's BLAS runs on one thread; called at each microbatch, and takes a microsecond.

    Raises ``ExecutorError`` if somebody changed the process's count under the guard.
    """
    _guard.check()
