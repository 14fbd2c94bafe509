"""What parameters begin as. The same seed draws the same values for every dtype: they are drawn in float64, then cast.

A weight's last two axes are (inputs, outputs), those before them the window of a convolution; so ``fan_in`` is the
product of all axes but the last, and ``fan_out`` the product of all but the last but one.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod, sqrt

import numpy as np

from asynctrain.arena import Array, Shape

Initializer = Callable[[Shape, "np.random.Generator"], Array]  # a name: numpy.random is imported when it is used


def he_normal(shape: Shape, rng: np.random.Generator) -> Array:
    """Draw from N(0, 2 / fan_in), which keeps the variance through ReLUs (He et al. 2015, arXiv:1502.01852).

    Args:
        shape: of at least two axes, as above.
        rng: where the numbers come from.

    Returns:
        float64 of that shape.
    """
    return rng.normal(0.0, sqrt(2 / prod(shape[:-1])), shape)


def glorot_uniform(shape: Shape, rng: np.random.Generator) -> Array:
    """Draw from U(-a, a), a = sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, AISTATS 2010); as ``he_normal``."""
    window = prod(shape[:-2])
    limit = sqrt(6 / (window * (shape[-2] + shape[-1])))
    return rng.uniform(-limit, limit, shape)


def zeros(shape: Shape, rng: np.random.Generator) -> Array:
    """Return float64 zeros of that shape; nothing is drawn."""
    return np.zeros(shape)


def ones(shape: Shape, rng: np.random.Generator) -> Array:
    """Return float64 ones of that shape; nothing is drawn."""
    return np.ones(shape)


_BY_NAME: dict[str, Initializer] = {
    "he_normal": he_normal,
    "glorot_uniform": glorot_uniform,
    "zeros": zeros,
    "ones": ones,
}


def get(name: str) -> Initializer:
    """Return the initializer called ``name``.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in _BY_NAME:
        raise ValueError(f"initializer must be one of {', '.join(_BY_NAME)}, got {name!r}")
    return _BY_NAME[name]
