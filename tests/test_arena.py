"""Named arrays in one vector."""

from __future__ import annotations

import numpy as np
import pytest

from asynctrain.arena import ALIGNMENT, Arena, Layout


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_are_aligned_and_what_lies_between_them_is_zero(dtype: type) -> None:
    shapes = {"none": (0, 3), "one": (), "some": (5, 7), "full": (ALIGNMENT,), "last": (3,)}
    layout = Layout(shapes, np.dtype(dtype))
    for _ in range(3):  # memory that was used before, too
        arena = layout.empty()
        for name, shape in shapes.items():
            assert arena[name].shape == shape
            assert arena[name].ctypes.data % ALIGNMENT == 0
            arena[name][...] = 1
        assert arena.vector.sum() == sum(array.size for array in arena.values())
        arena.vector.fill(np.nan)


def test_an_arena_may_hold_nothing() -> None:
    assert Layout({}, np.dtype(np.float32)).empty().vector.shape == (0,)


def test_a_copy_is_independent_and_has_the_padding_too() -> None:
    arena = Arena.of({"a": np.ones(3, np.float32), "b": np.full(2, 2, np.float32)})
    copy = arena.copy()
    arena.vector.fill(9)
    assert copy["a"].tolist() == [1, 1, 1]
    assert copy["b"].tolist() == [2, 2]
    assert copy.vector.sum() == 7
