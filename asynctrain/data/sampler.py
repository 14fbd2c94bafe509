"""The order in which a dataset is read: a pure function of the seed and the epoch."""

from __future__ import annotations

import numpy as np

from asynctrain.arena import Array
from asynctrain.randomness import Purpose, generator


class Sampler:
    """The order of the samples in each epoch.

    Args:
        size: how many samples there are, 1 or more.
        seed: 0 to 2**64 - 1.
        shuffle: whether each epoch has a random order of its own; else every epoch is 0, 1, 2, ...
    """

    def __init__(self, size: int, seed: int, shuffle: bool = True) -> None:
        if size < 1:
            raise ValueError(f"size must be 1 or more, got {size}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be between 0 and 2**64 - 1, got {seed}")
        self.size = size
        self.seed = seed
        self.shuffle = shuffle
        self._latest: tuple[int, Array] = (-1, np.empty(0, np.int64))  # an epoch asks again for each of its chunks

    def order(self, epoch: int) -> Array:
        """Return which sample is at each position of ``epoch``: a read-only permutation, (size,) int64.

        A permutation of a million takes about 10 ms, so do not ask for one on the event loop.
        """
        known, order = self._latest
        if known != epoch:
            order = self._draw(epoch)
            order.flags.writeable = False
            self._latest = (epoch, order)
        return order

    def _draw(self, epoch: int) -> Array:
        if not self.shuffle:
            return np.arange(self.size, dtype=np.int64)
        return generator(self.seed, Purpose.ORDER, epoch).permutation(self.size)

    def __repr__(self) -> str:
        return f"Sampler(size={self.size}, seed={self.seed}, shuffle={self.shuffle})"
