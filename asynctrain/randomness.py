"""Random numbers keyed by purpose: the same key gives the same numbers, whoever draws them and whenever.

There is no generator that lives on from one use to the next. Each use names its purpose and its place (an epoch, a
position, a step, ...) and gets a stream of its own, so retries, resumes and other orders of execution change nothing.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What random numbers are drawn for. The values are part of the promise of the same bits: never renumber them."""

    INIT = 1  # place: (index of the parameter,)
    ORDER = 2  # place: (epoch,)
    AUGMENT = 3  # place: (epoch, block of four numbers); within it four numbers a position
    MIX = 4  # place: (epoch, first position of the batch)
    DROPOUT = 5  # place: (step, microbatch, layer)
    SPLIT = 6  # place: ()


def generator(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """Return the stream of ``(seed, purpose, place)``.

    Philox is counter based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): seed and purpose
    are its key, the place the upper three words of its 256-bit counter, so streams of two places cannot overlap.

    Args:
        seed: 0 to 2**64 - 1.
        purpose: what the numbers are for.
        place: up to three numbers, each 0 to 2**64 - 1.
    """
    require_seed(seed)
    counter = np.zeros(4, dtype=np.uint64)
    counter[1 : 1 + len(place)] = place
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64), counter=counter))


def require_seed(seed: int) -> int:
    """Return ``seed``; raises ``ValueError`` if it is out of range."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be between 0 and 2**64 - 1, got {seed}")
    return seed
