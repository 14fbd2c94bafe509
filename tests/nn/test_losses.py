"""Losses against their formulas in float64 and central differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from asynctrain.arena import Array
from asynctrain.nn import losses
from asynctrain.nn.losses import softmax_cross_entropy

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((5, 4)) * 3
LABELS = np.array([0, 3, 1, 1, 2])


def reference(logits: Array, labels: Array, weights: Array) -> float:
    """Return the loss by its definition, one sample after the other."""
    terms = (
        w * (math.log(math.fsum(math.exp(z) for z in row)) - row[label])
        for row, label, w in zip(logits.tolist(), labels.tolist(), weights.tolist(), strict=True)
    )
    return math.fsum(terms)


@pytest.mark.parametrize("weights", [None, np.array([1.0, 0.0, 2.5, 0.5, 1.0])], ids=["unweighted", "weighted"])
def test_cross_entropy_is_the_sum_over_samples_and_its_gradient_that_of_the_sum(weights: Array | None) -> None:
    loss = softmax_cross_entropy(LOGITS, LABELS, weights)
    each = np.ones(5) if weights is None else weights
    assert loss.value == pytest.approx(reference(LOGITS, LABELS, each), rel=1e-12)
    assert loss.weight == each.sum()
    for place in np.ndindex(LOGITS.shape):
        moved = np.zeros_like(LOGITS)
        moved[place] = 1e-5
        above, below = (reference(LOGITS + sign * moved, LABELS, each) for sign in (1, -1))
        assert loss.gradient[place] == pytest.approx((above - below) / 2e-5, abs=1e-8)


def test_cross_entropy_leaves_the_logits_alone_and_writes_the_gradient_where_it_is_told() -> None:
    logits, out = LOGITS.astype(np.float32), np.empty((5, 4), np.float32)
    before = logits.copy()
    loss = softmax_cross_entropy(logits, LABELS, out=out)
    assert loss.gradient is out
    np.testing.assert_array_equal(logits, before)
    np.testing.assert_allclose(out, softmax_cross_entropy(LOGITS, LABELS).gradient, atol=1e-6)


def test_cross_entropy_counts_the_samples_whose_largest_logit_is_at_their_label() -> None:
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert softmax_cross_entropy(logits, np.array([1, 1, 1])).correct == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_of_huge_logits_is_exact(dtype: type) -> None:
    logits: Array = np.array([[3e4, 0.0], [0.0, -3e4]], dtype)
    loss = softmax_cross_entropy(logits, np.array([1, 0]))
    assert loss.value == 3e4
    np.testing.assert_array_equal(loss.gradient, [[1, -1], [0, 0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_give_a_value_that_is_not_finite_without_a_warning(bad: float) -> None:
    loss = softmax_cross_entropy(np.array([[bad, bad], [0.0, 0.0]]), np.array([0, 0]))
    assert not math.isfinite(loss.value)


@pytest.mark.parametrize(("label", "told"), [(4, "4"), (-1, "-1")])
def test_a_label_out_of_range_is_told_with_the_number_of_classes(label: int, told: str) -> None:
    with pytest.raises(ValueError, match=f"labels must be between 0 and 3 for a model of 4 classes, got {told}"):
        softmax_cross_entropy(LOGITS, np.array([0, label, 1, 1, 2]))


def test_labels_that_are_not_one_per_sample_are_told() -> None:
    with pytest.raises(ValueError, match=r"got labels of shape \(3,\) for logits of shape \(5, 4\)"):
        softmax_cross_entropy(LOGITS, LABELS[:3])


def test_a_loss_is_found_by_its_name() -> None:
    assert losses.get("softmax_cross_entropy") is softmax_cross_entropy
    with pytest.raises(ValueError, match="loss must be one of softmax_cross_entropy, got 'hinge'"):
        losses.get("hinge")
