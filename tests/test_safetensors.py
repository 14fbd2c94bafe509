"""Safetensors files: as the library of that name writes and reads them, without a copy of the arrays."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from asynctrain._safetensors import DTYPES, parts_of

Arrays = dict[str, np.ndarray[Any, Any]]


def arrays_of_all_kinds() -> Arrays:
    random = np.random.default_rng(0)
    shapes = [(3, 5), (), (0, 4), (7,), (2, 3, 4), (1,)]
    arrays = {
        f"array {number}": np.array(random.integers(0, 2, shape), dtype)
        for number, (dtype, shape) in enumerate(zip(DTYPES, shapes, strict=True))
    }
    return arrays | {"not contiguous, ü": np.arange(12.0).reshape(3, 4).T}


def test_a_file_has_the_bytes_that_the_library_writes() -> None:
    arrays = arrays_of_all_kinds()
    assert b"".join(parts_of(arrays, {"about": "ü"})) == save(
        {name: np.asarray(array, order="C") for name, array in arrays.items()}, metadata={"about": "ü"}
    )


def test_the_library_reads_the_arrays_as_they_were() -> None:
    arrays = arrays_of_all_kinds()
    read = load(b"".join(parts_of(arrays, {})))
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_bytes_that_are_other_way_round_are_written_little_endian() -> None:
    array = np.arange(3, dtype=">f4")
    np.testing.assert_array_equal(load(b"".join(parts_of({"a": array}, {})))["a"], array)


def test_the_parts_are_the_arrays_own_memory() -> None:
    array = np.zeros((3, 5), np.float32)
    header, part = parts_of({"a": array}, {"made": "by hand"})
    assert np.shares_memory(np.frombuffer(part, np.uint8), array)
    assert json.loads(bytes(header[8:]))["__metadata__"] == {"made": "by hand"}


def test_a_dtype_that_the_files_do_not_have_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'a' must be of one of the dtypes .*, got complex64"):
        parts_of({"a": np.zeros(1, np.complex64)}, {})
