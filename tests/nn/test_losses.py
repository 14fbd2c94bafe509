"""Losses against their formulas in Python floats, central differences, and their invariances."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest

from asynctrain.arena import Array
from asynctrain.nn import losses
from asynctrain.nn.losses import (
    Loss,
    LossFunction,
    binary_cross_entropy,
    huber,
    mean_absolute_error,
    mean_squared_error,
    negative_log_likelihood,
    softmax_cross_entropy,
)

RNG = np.random.default_rng(0)
OUTPUTS = RNG.standard_normal((5, 4)) * 3
LABELS = np.array([0, 3, 1, 1, 2])
SOFT = RNG.dirichlet(np.ones(4), 5)
HOLDS = (RNG.random((5, 4)) < 0.5).astype(np.float64)
TARGETS = OUTPUTS + RNG.choice([-3.0, -0.7, 0.4, 2.5], (5, 4))  # apart from the kinks at 0 and at delta
WEIGHTS = np.array([1.0, 0.0, 2.5, 0.5, 1.0])
CLASSES = (1.0, 0.25, 3.0, 0.5)

# References: the loss of one sample and what it weighs, by the definitions, from Python floats

Reference = Callable[[list[float], list[float]], tuple[float, float]]


def one_hot(label: int) -> list[float]:
    return [float(k == label) for k in range(4)]


def cross_entropy_reference(c: Sequence[float], smoothing: float) -> Reference:
    def reference(z: list[float], y: list[float]) -> tuple[float, float]:
        log_sum = math.log(math.fsum(math.exp(value) for value in z))
        smoothed = [(1 - smoothing) * value + smoothing * math.fsum(y) / len(y) for value in y]
        terms = (w * t * (log_sum - value) for w, t, value in zip(c, smoothed, z, strict=True))
        return math.fsum(terms), math.fsum(w * value for w, value in zip(c, y, strict=True))

    return reference


def likelihood_reference(c: Sequence[float]) -> Reference:
    def reference(z: list[float], y: list[float]) -> tuple[float, float]:
        label = y.index(1.0)
        return -c[label] * z[label], c[label]

    return reference


def binary_reference(p: Sequence[float]) -> Reference:
    def reference(z: list[float], y: list[float]) -> tuple[float, float]:
        terms = (
            weight * label * math.log(1 + math.exp(-value)) + (1 - label) * math.log(1 + math.exp(value))
            for weight, label, value in zip(p, y, z, strict=True)
        )
        return math.fsum(terms) / len(z), 1.0

    return reference


def of_differences(function: Callable[[float], float]) -> Reference:
    def reference(z: list[float], y: list[float]) -> tuple[float, float]:
        return math.fsum(function(a - b) for a, b in zip(z, y, strict=True)) / len(z), 1.0

    return reference


def huber_reference(delta: float) -> Reference:
    return of_differences(lambda r: r * r / 2 if abs(r) <= delta else delta * (abs(r) - delta / 2))


ONES = (1.0,) * 4
CASES: dict[str, tuple[LossFunction, Array, Reference]] = {
    "plain": (softmax_cross_entropy(), LABELS, cross_entropy_reference(ONES, 0)),
    "classes": (softmax_cross_entropy(CLASSES), LABELS, cross_entropy_reference(CLASSES, 0)),
    "smooth": (softmax_cross_entropy(label_smoothing=0.1), LABELS, cross_entropy_reference(ONES, 0.1)),
    "smooth classes": (softmax_cross_entropy(CLASSES, 0.2), LABELS, cross_entropy_reference(CLASSES, 0.2)),
    "soft": (softmax_cross_entropy(), SOFT, cross_entropy_reference(ONES, 0)),
    "soft smooth classes": (softmax_cross_entropy(CLASSES, 0.2), SOFT, cross_entropy_reference(CLASSES, 0.2)),
    "likelihood": (negative_log_likelihood(), LABELS, likelihood_reference(ONES)),
    "likelihood classes": (negative_log_likelihood(CLASSES), LABELS, likelihood_reference(CLASSES)),
    "binary": (binary_cross_entropy(), HOLDS, binary_reference(ONES)),
    "binary soft": (binary_cross_entropy(), SOFT, binary_reference(ONES)),
    "binary positives": (binary_cross_entropy(CLASSES), SOFT, binary_reference(CLASSES)),
    "binary classes": (binary_cross_entropy(), LABELS, binary_reference(ONES)),
    "squared": (mean_squared_error(), TARGETS, of_differences(lambda r: r * r)),
    "absolute": (mean_absolute_error(), TARGETS, of_differences(abs)),
    "huber": (huber(), TARGETS, huber_reference(1.0)),
    "huber 0.5": (huber(0.5), TARGETS, huber_reference(0.5)),
}
CASE = pytest.mark.parametrize(("loss", "labels", "reference"), CASES.values(), ids=CASES)


def expected(reference: Reference, outputs: Array, labels: Array, weights: Array) -> tuple[float, float]:
    rows = [one_hot(int(row)) if labels.ndim == 1 else row.tolist() for row in labels]
    each = [reference(z, y) for z, y in zip(outputs.tolist(), rows, strict=True)]
    values = math.fsum(w * value for w, (value, _) in zip(weights, each, strict=True))
    return values, math.fsum(w * weight for w, (_, weight) in zip(weights, each, strict=True))


@CASE
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["unweighted", "weighted"])
def test_a_loss_is_its_definition_and_its_gradient_that_of_the_sum(
    loss: LossFunction, labels: Array, reference: Reference, weights: Array | None
) -> None:
    found = loss(OUTPUTS, labels, weights)
    each = np.ones(5) if weights is None else weights
    assert (found.value, found.weight) == pytest.approx(expected(reference, OUTPUTS, labels, each), rel=1e-12)
    for place in np.ndindex(OUTPUTS.shape):
        moved = np.zeros_like(OUTPUTS)
        moved[place] = 1e-5
        above, below = (expected(reference, OUTPUTS + sign * moved, labels, each)[0] for sign in (1, -1))
        assert found.gradient[place] == pytest.approx((above - below) / 2e-5, abs=1e-8)


@CASE
def test_outputs_and_labels_are_left_alone_and_the_gradient_is_written_where_it_is_told(
    loss: LossFunction, labels: Array, reference: Reference
) -> None:
    outputs, out = OUTPUTS.astype(np.float32), np.full((5, 4), np.nan, np.float32)
    kept = labels.copy()
    found = loss(outputs, labels, WEIGHTS, out)
    assert found.gradient is out
    np.testing.assert_array_equal(outputs, OUTPUTS.astype(np.float32))
    np.testing.assert_array_equal(labels, kept)
    np.testing.assert_allclose(out, loss(OUTPUTS, labels, WEIGHTS).gradient, atol=2e-6)


@CASE
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_gradient_has_the_dtype_of_the_outputs_whatever_that_of_labels_and_weights(
    loss: LossFunction, labels: Array, reference: Reference, dtype: type
) -> None:
    for labels_dtype in [labels.dtype] if labels.ndim == 1 else [np.float32, np.float64]:
        found = loss(OUTPUTS.astype(dtype), labels.astype(labels_dtype), WEIGHTS)
        assert found.gradient.dtype == dtype


@CASE
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cutting_a_batch_changes_nothing_but_rounding(
    loss: LossFunction, labels: Array, reference: Reference, dtype: type
) -> None:
    outputs: Array = OUTPUTS.astype(dtype)
    whole = loss(outputs, labels, WEIGHTS)
    cuts = [slice(a, b) for a, b in pairwise([0, 1, 3, 5])]
    parts = [loss(outputs[cut], labels[cut], WEIGHTS[cut]) for cut in cuts]
    assert math.fsum(part.value for part in parts) == pytest.approx(whole.value, rel=1e-12)
    assert math.fsum(part.weight for part in parts) == pytest.approx(whole.weight, rel=1e-12)
    assert sum(part.correct for part in parts) == whole.correct
    assert sum(part.judged for part in parts) == whole.judged
    np.testing.assert_array_equal(np.concatenate([part.gradient for part in parts]), whole.gradient)


@CASE
def test_a_loss_comes_back_from_its_json(loss: LossFunction, labels: Array, reference: Reference) -> None:
    described = json.loads(json.dumps(loss.to_json()))
    assert described == loss.to_json()
    assert losses.from_json(described) == loss


def test_a_name_alone_is_the_loss_with_its_default_arguments() -> None:
    assert losses.get("softmax_cross_entropy") == losses.from_json("softmax_cross_entropy") == softmax_cross_entropy()
    assert losses.get("huber") == huber(1.0)


# Labels of several kinds


def same(one: Loss, other: Loss) -> None:
    assert one[:2] == pytest.approx(other[:2], rel=1e-12)
    assert one[3:] == other[3:]
    np.testing.assert_allclose(one.gradient, other.gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss", [softmax_cross_entropy(CLASSES, 0.1), softmax_cross_entropy(), binary_cross_entropy()])
def test_whole_labels_are_soft_ones_with_all_on_one_class(loss: LossFunction) -> None:
    same(loss(OUTPUTS, LABELS, WEIGHTS), loss(OUTPUTS, np.eye(4)[LABELS], WEIGHTS))


def test_cross_entropy_is_the_likelihood_of_log_probabilities() -> None:
    log_probabilities = OUTPUTS - np.log(np.exp(OUTPUTS).sum(axis=1, keepdims=True))
    found = softmax_cross_entropy(CLASSES)(OUTPUTS, LABELS)
    assert negative_log_likelihood(CLASSES)(log_probabilities, LABELS).value == pytest.approx(found.value, rel=1e-12)


@pytest.mark.parametrize("loss", [binary_cross_entropy(), mean_squared_error(), mean_absolute_error(), huber()])
def test_a_model_of_one_output_takes_one_number_for_each_sample(loss: LossFunction) -> None:
    outputs, labels = OUTPUTS[:, :1], np.array([0, 1, 1, 0, 1])
    same(loss(outputs, labels), loss(outputs, labels[:, np.newaxis].astype(np.float64)))


def test_binary_cross_entropy_of_two_classes_is_softmax_with_the_first_output_at_0() -> None:
    z, labels = OUTPUTS[:, :1], np.array([0, 1, 1, 0, 1])
    softmax = softmax_cross_entropy()(np.hstack([np.zeros_like(z), z]), labels)
    binary = binary_cross_entropy()(z, labels)
    assert binary.value == pytest.approx(softmax.value, rel=1e-12)
    np.testing.assert_allclose(binary.gradient, softmax.gradient[:, 1:], rtol=1e-12)


# Ignored labels and weights of 0


@pytest.mark.parametrize("make", [softmax_cross_entropy, negative_log_likelihood])
@pytest.mark.parametrize("ignored", [1, -100, 255])
def test_ignored_samples_leave_what_the_others_alone_would_give(
    make: type[softmax_cross_entropy | negative_log_likelihood], ignored: int
) -> None:
    labels = np.where(LABELS == 1, ignored, LABELS)
    found = make(CLASSES, ignore_index=ignored)(OUTPUTS, labels, WEIGHTS)
    others = LABELS != 1
    alone = make(CLASSES)(OUTPUTS[others], LABELS[others], WEIGHTS[others])
    assert found[:2] == alone[:2]
    assert found[3:] == alone[3:]
    np.testing.assert_array_equal(found.gradient[others], alone.gradient)
    np.testing.assert_array_equal(found.gradient[~others], 0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_microbatch_of_ignored_labels_weighs_nothing(smoothing: float) -> None:
    loss = softmax_cross_entropy(label_smoothing=smoothing, ignore_index=-1)
    found = loss(OUTPUTS, np.full(5, -1))
    assert (found.value, found.weight, found.correct, found.judged) == (0, 0, 0, 0)
    np.testing.assert_array_equal(found.gradient, 0)


# Right and wrong


def test_a_sample_is_right_where_its_largest_output_is_at_its_largest_label() -> None:
    logits = np.array([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    assert softmax_cross_entropy()(logits, np.array([1, 1, 1]))[3:] == (2, 3)
    soft = np.array([[0.4, 0.6], [0.9, 0.1], [0.7, 0.3]])
    assert softmax_cross_entropy(label_smoothing=0.5)(logits, soft)[3:] == (2, 3)
    assert softmax_cross_entropy(ignore_index=0)(logits, np.array([1, 0, 1]))[3:] == (2, 2)


def test_a_sample_of_many_labels_is_right_where_all_its_outputs_are_on_the_right_side() -> None:
    z = np.array([[1.0, -2.0], [3.0, 1.0], [-0.1, 1.0]])
    assert binary_cross_entropy()(z, np.array([[1.0, 0.2], [1.0, 0.0], [0.4, 0.5]]))[3:] == (2, 3)


@pytest.mark.parametrize("loss", [mean_squared_error(), mean_absolute_error(), huber()])
def test_regression_knows_no_right_and_wrong(loss: LossFunction) -> None:
    assert loss(OUTPUTS, OUTPUTS)[3:] == (0, 0)


# The ends of the range


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_losses_of_huge_outputs_are_exact(dtype: type) -> None:
    logits: Array = np.array([[3e4, 0.0], [0.0, -3e4]], dtype)
    for labels in (np.array([1, 0]), np.array([[0.0, 1.0], [1.0, 0.0]])):
        found = softmax_cross_entropy()(logits, labels)
        assert found.value == 3e4
        np.testing.assert_array_equal(found.gradient, [[1, -1], [0, 0]])
    binary = binary_cross_entropy()(logits, np.array([[0.0, 0.0], [1.0, 1.0]]))
    assert binary.value == pytest.approx(3e4 + math.log(2), rel=1e-6)
    np.testing.assert_array_equal(binary.gradient, [[0.5, 0.25], [-0.25, -0.5]])


def test_binary_cross_entropy_keeps_its_digits_where_it_is_small() -> None:
    z: Array = np.array([[20.0], [-20.0]], np.float32)
    found = binary_cross_entropy()(z, np.array([1, 0]))
    assert found.value == pytest.approx(2 * math.log1p(math.exp(-20)), rel=1e-6)
    assert found.gradient.ravel() == pytest.approx([-math.exp(-20), math.exp(-20)], rel=1e-6)


@CASE
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_outputs_that_are_not_finite_give_a_value_that_is_not_finite_without_a_warning(
    loss: LossFunction, labels: Array, reference: Reference, bad: float
) -> None:
    outputs = OUTPUTS.copy()
    outputs[0] = bad
    assert not math.isfinite(loss(outputs, labels).value)


# Errors


@pytest.mark.parametrize(("label", "told"), [(4, "4"), (-1, "-1")])
@pytest.mark.parametrize("loss", [softmax_cross_entropy(), negative_log_likelihood(), binary_cross_entropy()])
def test_a_label_out_of_range_is_told_with_the_number_of_classes(loss: LossFunction, label: int, told: str) -> None:
    with pytest.raises(ValueError, match=f"labels must be between 0 and 3 for a model of 4 classes, got {told}"):
        loss(OUTPUTS, np.array([0, label, 1, 1, 2]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: softmax_cross_entropy()(OUTPUTS, LABELS[:3]), r"labels of shape \(3,\) for logits of shape \(5, 4\)"),
        (lambda: softmax_cross_entropy()(OUTPUTS, LABELS + 0.5), "must be integers, .* got float64"),
        (lambda: softmax_cross_entropy()(OUTPUTS, SOFT[:, :3]), r"got labels of shape \(5, 3\) for outputs"),
        (lambda: softmax_cross_entropy()(OUTPUTS, -SOFT), "soft labels must be at least 0, got -0"),
        (lambda: softmax_cross_entropy((1.0, 2.0))(OUTPUTS, LABELS), "class_weights must be 4 numbers, .*, got 2"),
        (lambda: softmax_cross_entropy((1.0, -2.0)), "class_weights must be finite numbers of at least 0"),
        (lambda: softmax_cross_entropy(label_smoothing=1.0), "label_smoothing must be at least 0 and below 1, got 1"),
        (lambda: negative_log_likelihood((math.nan,)), "class_weights must be finite numbers of at least 0"),
        (lambda: binary_cross_entropy()(OUTPUTS, HOLDS + 1), r"labels must be between 0 and 1, got 2\.0"),
        (lambda: binary_cross_entropy()(OUTPUTS, HOLDS * math.nan), "labels must be between 0 and 1, got nan"),
        (lambda: binary_cross_entropy((1.0,))(OUTPUTS, HOLDS), "positive_weights must be 4 numbers, .*, got 1"),
        (lambda: mean_squared_error()(OUTPUTS, LABELS), r"must have the shape \(N, K\) of the outputs, got .*\(5,\)"),
        (lambda: huber(0.0), "huber: delta must be above 0 and finite, got 0"),
        (lambda: losses.get("hinge"), "loss must be one of softmax_cross_entropy, .*, huber, got 'hinge'"),
        (lambda: losses.from_json({"name": "huber", "beta": 2}), "huber: arguments must be delta, got beta"),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
