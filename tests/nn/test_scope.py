"""Scope and Workspace: memory that is reused, and numbers keyed by the layer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from asynctrain.arena import Array
from asynctrain.nn import Conv2D, Dense, Flatten, MaxPool2D, Model, ReLU, Scope, Workspace
from asynctrain.nn.scope import SLAB

F4, F8 = np.dtype(np.float32), np.dtype(np.float64)


def test_a_buffer_is_aligned_contiguous_and_reused_by_its_key() -> None:
    workspace = Workspace()
    first = workspace.empty("a", (3, 5), F4)
    assert first.ctypes.data % 64 == 0
    assert first.flags.c_contiguous
    assert workspace.empty("a", (3, 5), F4) is first
    assert not np.shares_memory(workspace.empty("b", (3, 5), F4), first)


def test_a_smaller_shape_gets_a_view_and_a_larger_one_new_memory() -> None:
    workspace = Workspace()
    large = workspace.empty("a", (4, 8), F4)
    assert np.shares_memory(workspace.empty("a", (2, 8), F4), large)
    assert np.shares_memory(workspace.empty("a", (2, 8), F8), large)
    larger = workspace.empty("a", (5, 8), F4)
    assert not np.shares_memory(larger, large)
    assert workspace.nbytes == larger.nbytes


def test_large_memory_serves_another_key_as_soon_as_nobody_refers_to_it() -> None:
    workspace = Workspace()
    large = workspace.empty("a", (64, 1024), F4)
    assert large.ctypes.data % 64 == 0
    place, part = large.ctypes.data, large[3:, ::2].T
    del large
    other = workspace.empty("a", (64, 1024), F4)
    assert not np.shares_memory(other, part)
    del part
    assert workspace.empty("b", (32, 1024), F8).ctypes.data == place
    assert workspace.nbytes == 2 * other.nbytes


def test_lent_memory_is_never_in_two_arrays_and_becomes_one_again() -> None:
    workspace, rng = Workspace(), np.random.default_rng(0)
    held: dict[int, Array] = {}
    for number in range(400):
        held[number] = workspace.empty("a", (int(rng.integers(2**14, 2**17)),), F4)
        held[number].fill(number)
        for gone in rng.choice(list(held), len(held) // 8, replace=False):
            del held[gone]
    assert all((array == number).all() for number, array in held.items())
    held.clear()
    most = workspace.nbytes
    whole = workspace.empty("a", (most,), np.dtype(np.uint8))
    assert workspace.nbytes == whole.nbytes == most


def test_memory_that_no_slab_has_room_for_is_asked_of_the_system() -> None:
    workspace = Workspace()
    first, second = (workspace.empty(name, (SLAB // 2 + 4096,), np.dtype(np.uint8)) for name in "ab")
    larger = workspace.empty("c", (SLAB + 1,), np.dtype(np.uint8))
    assert len({array.ctypes.data for array in (first, second, larger)}) == 3
    assert not np.shares_memory(first, second)
    assert workspace.nbytes == 2 * first.nbytes + SLAB + 4096


def test_threads_that_take_large_memory_at_once_never_get_the_same() -> None:
    workspace, gate = Workspace(), Barrier(4)

    def take(number: int) -> bool:
        gate.wait()
        whole = True
        for turn in range(3000):
            mine = workspace.empty("a", (2**13 + 2**9 * (turn % 3),), F8)
            mine[0] = number
            workspace.empty("b", (2**13,), F8)[0] = -1
            whole &= bool(mine[0] == number)
        return whole

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(take, range(4)))


def test_a_steady_pass_takes_no_new_memory() -> None:
    model = Model([Conv2D(3), ReLU(), MaxPool2D(), Flatten(), Dense(2)], (6, 6, 2))
    workspace, arena, params = Workspace(), model.layout().empty(), model.init(0)

    def outputs(batch: int) -> int:
        scope = Scope(workspace, train=True, gradients=arena)
        y, saved = model.forward(params, np.ones((batch, 6, 6, 2), np.float32), scope)
        model.backward(params, saved, np.ones_like(y), scope)
        return int(y.ctypes.data)

    first, held = outputs(8), workspace.nbytes
    assert [outputs(batch) for batch in (8, 5, 1, 8)] == [first] * 4
    assert workspace.nbytes == held


def test_children_are_kept_and_key_buffers_gradients_and_numbers_by_their_path() -> None:
    arena = {"block1/conv1/weight": np.zeros(1)}
    keys: list[int] = []

    def rng(key: int) -> np.random.Generator:
        keys.append(key)
        return np.random.default_rng(key)

    scope = Scope(Workspace(), train=True, rng=rng, gradients=arena)
    conv = scope.child("block1").child("conv1")
    assert conv is scope.child("block1").child("conv1")
    assert conv.path == "block1/conv1"
    assert conv.gradient("weight") is arena["block1/conv1/weight"]
    assert not np.shares_memory(conv.empty("y", (2,), F4), scope.child("block1").empty("y", (2,), F4))
    for each in (conv, conv, scope.child("conv1")):
        each.rng()
    assert keys[0] == keys[1] != keys[2]
    assert all(0 <= key < 2**64 for key in keys)


def test_what_a_scope_was_not_given_is_told() -> None:
    scope = Scope(Workspace(), train=True).child("dropout1")
    with pytest.raises(ValueError, match="rng must be given to a scope in which dropout1 draws random numbers"):
        scope.rng()
    with pytest.raises(ValueError, match="gradients must be given to a scope in which weight gradients are computed"):
        scope.gradient("weight")


def test_reprs_tell_the_state() -> None:
    workspace = Workspace()
    scope = Scope(workspace, train=True)
    scope.child("conv1").empty("y", (2**18,), F4)
    assert repr(workspace) == "<Workspace 1.0 MiB, 0 arrays lent>"
    assert repr(scope.child("conv1")) == "<Scope conv1, training>"
