"""Which kernels a program computes with: numpy's, or numba's where those are faster.

The choice is made in one place, once for a program. The two agree to rounding, not to the bit.
"""

from __future__ import annotations

from asynctrain.nn.kernels.backend import NUMPY, Kernels

NAMES = ("numpy", "numba")


def get(name: str) -> Kernels:
    """Return the kernels called ``name``; the first time, importing numba takes up to a second.

    Raises:
        ValueError: there are none of that name.
        ImportError: they are numba's, and numba is not installed.
    """
    require_kernels(name)
    if name == "numpy":
        return NUMPY
    try:
        from asynctrain.nn.kernels.compiled import NUMBA
    except ImportError as error:
        raise ImportError("kernels 'numba' need numba: install asynctrain[numba], or choose 'numpy'") from error
    return NUMBA


def require_kernels(name: str) -> None:
    """Raise ValueError unless there are kernels called ``name``."""
    if name not in NAMES:
        raise ValueError(f"kernels must be one of {', '.join(NAMES)}, got {name!r}")
