"""Make ``asynctrain/data/digits.npz``, the images that ``asynctrain demo`` trains on.

It needs scikit-learn, which nothing else in this repository does::

    .venv/bin/python -m pip install scikit-learn
    .venv/bin/python scripts/bundle_digits.py

The file holds ``images`` (1797, 8, 8) uint8 from 0 to 16 as in the source, ``labels`` (1797,) uint8, and ``test``
(1797,) bool: the images that are never trained on, a fifth of each class. That mask was drawn once, before the first
training, and stays as it is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

TARGET = Path(__file__).parent.parent / "asynctrain" / "data" / "digits.npz"
TEST_FRACTION = 0.2


def stratified_mask(labels: npt.NDArray[np.uint8], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return a mask of the shape of ``labels`` that is true for ``fraction`` of each class, chosen at random."""
    mask = np.zeros(len(labels), dtype=bool)
    order = np.random.default_rng(seed).permutation(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        mask[members[: round(fraction * len(members))]] = True
    return mask


def digits() -> dict[str, npt.NDArray[np.uint8] | npt.NDArray[np.bool_]]:
    """Return what the file holds, by name."""
    source = load_digits()
    labels = source.target.astype(np.uint8)
    return {
        "images": source.images.astype(np.uint8),
        "labels": labels,
        "test": stratified_mask(labels, TEST_FRACTION, seed=0),
    }


def main() -> None:
    """Write the file; the same bytes each time, for numpy dates the members of its archives 1980."""
    np.savez_compressed(TARGET, allow_pickle=False, **digits())
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
