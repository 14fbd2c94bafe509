"""Small pictures of image files, to be shown in plots and reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from asynctrain.arena import Array
from asynctrain.data.images import ImageSettings, decode
from asynctrain.errors import DecodeError

TILE = 96  # pixels


def tile(source: str) -> Array | None:
    """Return the image file ``source`` as (96, 96, 3) uint8, all of it on white, or None where it is none. Blocks."""
    try:
        return decode(Path(source).read_bytes(), ImageSettings((TILE, TILE), resize="fit", fill=255), source)
    except (OSError, ValueError, DecodeError):
        return None


def class_name(label: int | Sequence[int], classes: Sequence[str]) -> str:
    """Return the name of ``label``, or the label itself where it has none; of several labels the names of all."""
    if isinstance(label, Sequence):
        return ", ".join(class_name(each, classes) for each in label) or "none"
    return classes[label] if 0 <= label < len(classes) else str(label)


def only_mistakes(worst: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return of the samples with the largest loss those that were not predicted right."""
    return [sample for sample in worst if sample["predicted"] != sample["label"]]
