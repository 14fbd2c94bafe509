"""Safetensors files, written from the arrays as they lie.

The library of that name copies every array three times before it writes, and holds the interpreter meanwhile: 10 ms and
more for a small network and its optimizer, in which an event loop beside answers nobody. It still reads the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from asynctrain.arena import Array

DTYPES = {"<i8": "I64", "<f8": "F64", "<f4": "F32", "<i4": "I32", "|u1": "U8", "|b1": "BOOL"}


def parts_of(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """Return a file's parts, in their order: the header, then the bytes of each array, which stay the array's own.

    Args:
        arrays: of any shapes, and of the dtypes int64, float64, float32, int32, uint8 and bool. They are written in
            this order, large items first, so that each array begins at a multiple of its item's size.
        metadata: for the header.

    Raises:
        ValueError: there is an array of another dtype.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    parts: list[bytes | memoryview] = []
    end = 0
    for name in sorted(arrays, key=lambda name: (_place_of(name, arrays[name]), name)):
        array = np.asarray(arrays[name], _little(arrays[name]), order="C")
        start, end = end, end + array.nbytes
        header[name] = {"dtype": DTYPES[array.dtype.str], "shape": array.shape, "data_offsets": [start, end]}
        parts.append(array.reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *parts]


def _little(array: Array) -> np.dtype[Any]:
    return array.dtype.newbyteorder("<")


def _place_of(name: str, array: Array) -> int:
    kinds = list(DTYPES)
    if _little(array).str not in kinds:
        raise ValueError(f"{name!r} must be of one of the dtypes {', '.join(kinds)}, got {array.dtype}")
    return kinds.index(_little(array).str)
