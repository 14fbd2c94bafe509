"""Transfer learning: parameters and running statistics, by name, from another model."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np

from asynctrain.inference.classifier import Trained
from asynctrain.types import Params


def transfer(weights: Trained, patterns: Sequence[str], params: Params, model_state: Params) -> None:
    """Write what ``weights`` holds over those ``params`` and ``model_state`` whose names fit one of the patterns.

    Values are cast to the dtype of the arrays they are written to.

    Raises:
        ValueError: a pattern fits nothing, or what it fits is not there in ``weights``, or of another shape.
    """
    theirs, ours = {**weights.params, **weights.model_state}, {**params, **model_state}
    for pattern in patterns:
        fitting = [name for name in ours if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(f"only must be patterns that fit one of the names {', '.join(ours)}, got {pattern!r}")
        for name in fitting:
            if name not in theirs:
                raise ValueError(f"only: weights must have {name}, which {pattern!r} fits, and have none of that name")
            if theirs[name].shape != ours[name].shape:
                raise ValueError(
                    f"only: weights must have {name}, which {pattern!r} fits, in the shape {ours[name].shape}, "
                    f"got {theirs[name].shape}"
                )
    for name, array in ours.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            np.copyto(array, theirs[name], casting="same_kind")
