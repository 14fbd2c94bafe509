from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asynctrain.data.sampler import BalancedSampler, MixSampler, Order, Sampler, Turns, WeightedSampler, turns

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


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=40).filter(lambda weights: sum(weights) > 0),
    seed=seeds,
    samples=st.integers(1, 200),
)
def test_weighted_drawing_never_takes_what_weighs_nothing(weights: list[float], seed: int, samples: int) -> None:
    order = WeightedSampler(weights, seed, samples).order(3)
    assert len(order) == samples
    assert order.dtype == np.int64
    assert all(weights[index] > 0 for index in order.tolist())


def test_weighted_drawing_follows_the_weights() -> None:
    counts = np.bincount(WeightedSampler([1, 0, 3, 6], 0, samples=20_000).order(0), minlength=4)
    assert np.allclose(counts / 20_000, [0.1, 0, 0.3, 0.6], atol=0.015)  # over four standard deviations


@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=200), seed=seeds, epoch=st.integers(0, 9))
def test_balanced_sampling_gives_each_class_its_equal_share_and_repeats_evenly(
    labels: list[int], seed: int, epoch: int
) -> None:
    order = BalancedSampler(labels, seed).order(epoch).tolist()
    assert len(order) == len(labels)
    shares = Counter(labels[index] for index in order)
    assert max(shares[label] for label in set(labels)) - min(shares[label] for label in set(labels)) <= 1
    times = Counter(order)
    for label in set(labels):
        of_class = [times[index] for index in range(len(labels)) if labels[index] == label]
        assert max(of_class) - min(of_class) <= 1


@pytest.mark.parametrize(
    "make", [lambda seed: WeightedSampler([1.0] * 50, seed), lambda seed: BalancedSampler([0, 1] * 25, seed)]
)
def test_drawn_orders_are_functions_of_seed_and_epoch(make: Callable[[int], Order]) -> None:
    assert np.array_equal(make(1).order(2), make(1).order(2))
    assert len({tuple(make(seed).order(epoch).tolist()) for seed in range(3) for epoch in range(3)}) == 9


sizes_and_weights = st.lists(st.tuples(st.integers(0, 30), st.floats(0.01, 100)), min_size=1, max_size=5)


@given(sizes_and_weights)
def test_turns_give_every_source_its_share_rounded_to_the_nearest_while_it_lasts(
    sources: list[tuple[int, float]],
) -> None:
    sizes, weights = zip(*sources, strict=True)
    whose = turns(sizes, weights).tolist()
    assert Counter(whose) == Counter({k: size for k, size in enumerate(sizes) if size})
    given_so_far = [0] * len(sizes)
    for k in whose:
        given_so_far[k] += 1
        reached = (given_so_far[k] - 0.5) / weights[k]  # how far the mix has come, in records per unit of weight
        for other, size in enumerate(sizes):
            if given_so_far[other] < size:
                assert abs(given_so_far[other] - reached * weights[other]) <= 0.5 + 1e-9


def test_equal_weights_take_turns_and_the_others_go_on_when_one_is_used_up() -> None:
    assert turns([4, 2, 3], [1, 1, 1]).tolist() == [0, 1, 2, 0, 1, 2, 0, 2, 0]
    assert turns([2, 6], [1, 3]).tolist() == [1, 0, 1, 1, 1, 0, 1, 1]


@given(sizes_and_weights, st.integers(0, 150))
def test_turns_one_by_one_go_on_anywhere_as_turns_at_once(sources: list[tuple[int, float]], start: int) -> None:
    sizes, weights = zip(*sources, strict=True)
    whose = turns(sizes, weights).tolist()
    given_before = [whose[:start].count(k) for k in range(len(sizes))]
    mix, left = Turns(weights, given_before), [size - n for size, n in zip(sizes, given_before, strict=True)]
    rest = []
    while (turn := mix.next) is not None:
        if left[turn]:
            left[turn] -= 1
            mix.took(turn)
            rest.append(turn)
        else:
            mix.ended(turn)
    assert rest == whose[start:]


@given(sizes_and_weights.filter(lambda sources: any(size for size, _ in sources)), seeds, st.booleans())
def test_a_mix_has_each_sample_once_and_at_each_turn_one_of_its_range(
    sources: list[tuple[int, float]], seed: int, shuffle: bool
) -> None:
    sizes, weights = zip(*sources, strict=True)
    order = MixSampler(sizes, weights, seed, shuffle).order(1)
    assert sorted(order.tolist()) == list(range(sum(sizes)))
    ends = np.cumsum(sizes)
    assert np.searchsorted(ends, order, side="right").tolist() == turns(sizes, weights).tolist()
    if not shuffle:
        assert all(
            np.diff(order[(order < end) & (order >= end - size)]).tolist() == [1] * (size - 1)
            for end, size in zip(ends.tolist(), sizes, strict=True)
            if size
        )


def test_ranges_of_one_size_are_shuffled_each_in_its_own_way() -> None:
    order = MixSampler([30, 30], [1, 1], seed=0).order(0)
    assert order[0::2].tolist() != (order[1::2] - 30).tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedSampler([], 0), "weights must be finite, 0 or more, and at least one of them positive"),
        (lambda: WeightedSampler([0.0], 0), "weights must be finite"),
        (lambda: WeightedSampler([1.0, -0.5], 0), "weights must be finite"),
        (lambda: WeightedSampler([1.0, np.nan], 0), "weights must be finite"),
        (lambda: WeightedSampler([1.0, np.inf], 0), "weights must be finite"),
        (lambda: WeightedSampler(np.ones((2, 2)), 0), "weights must have one dimension, got 2"),
        (lambda: WeightedSampler([1.0], 0, samples=0), "size must be 1 or more, got 0"),
        (lambda: BalancedSampler([], 0), "labels must be one or more integers in one dimension, got"),
        (lambda: BalancedSampler(np.ones(3), 0), "labels must be one or more integers in one dimension, got float64"),
        (lambda: BalancedSampler([0], 2**64), "seed must be between 0 and"),
    ],
)
def test_wrong_arguments_of_drawn_orders_are_told(make: Callable[[], Order], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
