from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynctrain.data import Sampler

seeds = st.integers(0, 2**64 - 1)


@given(size=st.integers(1, 300), seed=seeds, epoch=st.integers(0, 2**40))
def test_every_epoch_has_each_sample_exactly_once(size: int, seed: int, epoch: int) -> None:
    order = Sampler(size, seed).order(epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(size))


@given(seed=seeds, epochs=st.lists(st.integers(0, 5), min_size=1))
def test_the_order_does_not_depend_on_what_was_asked_before(seed: int, epochs: list[int]) -> None:
    used = Sampler(50, seed)
    for epoch in epochs:
        assert np.array_equal(used.order(epoch), Sampler(50, seed).order(epoch))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(Sampler(50, seed).order(epoch).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_without_shuffling_the_order_is_the_datasets() -> None:
    assert Sampler(5, 0, shuffle=False).order(3).tolist() == [0, 1, 2, 3, 4]


def test_an_order_cannot_be_changed_by_who_gets_it() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Sampler(5, 0).order(0)[0] = 1


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="size must be 1 or more, got 0"):
        Sampler(0, 0)
    with pytest.raises(ValueError, match=r"seed must be between 0 and .*, got -1"):
        Sampler(1, -1)
