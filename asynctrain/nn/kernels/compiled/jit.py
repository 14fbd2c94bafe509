"""How kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])

_contract = {"contract"}  # a b + c may be rounded once; additions keep their order


def compiled(function: F) -> F:
    """Compile a kernel at its first call; other processes find it in the cache beside the module, or in the user's.

    Where there is no folder that can be written, each process compiles its own. The cache looks at the time of the
    kernel's own file alone: a kernel may call others only of the same file, and of ``lanes``. Whoever changes that one
    deletes the ``__pycache__`` beside it; an installation writes all files anew.
    """
    try:
        kernel = njit(nogil=True, cache=True, error_model="numpy", fastmath=_contract)(function)
    except RuntimeError:  # numba has no place for the cache
        kernel = njit(nogil=True, error_model="numpy", fastmath=_contract)(function)
    return cast("F", kernel)


def inlined(function: F) -> F:
    """Compile a function as a part of each kernel that calls it, where its arguments may be constants."""
    return cast("F", njit(inline="always")(function))
