"""Metrics say what scikit-learn says, however the samples come in batches."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn

import asynctrain as at
from asynctrain.arena import Array
from asynctrain.inference.evaluate import Metric
from asynctrain.metrics import ConfusionMatrix, PrecisionRecallF1, TopK, WorstSamples
from asynctrain.nn import losses
from asynctrain.train.controllers import EarlyStopping, monitored

CLASSES = 5
SCORES = ("precision", "recall", "f1")


def batch(labels: Array, start: int = 0) -> at.Batch:
    sources = tuple(f"image-{start + i}" for i in range(len(labels)))
    return at.Batch(np.zeros((len(labels), 1, 1, 1), np.uint8), labels, sources, at.Cursor(), last=True)


def figures(metric: Metric, outputs: Array, labels: Array, cuts: Sequence[int] = ()) -> dict[str, Any]:
    """Return what ``metric`` tells of samples that come in batches, divided at ``cuts``."""
    gathered = metric.begin()
    for start, stop in pairwise([0, *sorted(cuts), len(labels)]):
        if start < stop:
            gathered = metric.add(gathered, outputs[start:stop], batch(labels[start:stop], start))
    found = dict(metric.result(gathered))
    assert json.loads(json.dumps(found)) == found
    return found


def scores_of_sklearn(true: Array, predicted: Array) -> dict[str, Any]:
    """Return all figures of ``PrecisionRecallF1`` as scikit-learn has them."""

    def scores(average: str | None) -> tuple[Any, ...]:
        found: tuple[Any, ...] = sklearn.precision_recall_fscore_support(
            true, predicted, labels=range(CLASSES), average=average, zero_division=0
        )
        return found

    *by_class, support = scores(None)
    expected = {name: list(score) for name, score in zip(SCORES, by_class, strict=True)}
    expected["support"] = list(support)
    for average in ("macro", "weighted", "micro"):
        expected |= {f"{average}_{name}": score for name, score in zip(SCORES, scores(average), strict=False)}
    return expected


def drawn(seed: int, samples: int, classes_that_occur: int = CLASSES) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(samples, CLASSES)).astype(np.float32), rng.integers(0, classes_that_occur, samples)


seeds, sizes = st.integers(0, 2**32), st.integers(1, 40)
cut_points = st.lists(st.integers(0, 40), max_size=4)


@given(seeds, sizes, st.integers(1, CLASSES), cut_points)
def test_precision_and_recall_are_those_of_scikit_learn(seed: int, samples: int, occur: int, cuts: list[int]) -> None:
    outputs, labels = drawn(seed, samples, occur)
    found = figures(PrecisionRecallF1(), outputs, labels, [cut for cut in cuts if cut < samples])
    expected = scores_of_sklearn(labels, outputs.argmax(axis=1))
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == pytest.approx(expected[name]), name


@given(seeds, sizes, cut_points)
def test_precision_and_recall_of_many_labels_are_those_of_scikit_learn(
    seed: int, samples: int, cuts: list[int]
) -> None:
    outputs, _ = drawn(seed, samples)
    labels = (np.random.default_rng(seed + 1).random((samples, CLASSES)) < 0.3).astype(np.float32)
    found = figures(PrecisionRecallF1(multi_label=True), outputs, labels, [cut for cut in cuts if cut < samples])
    for name, expected in scores_of_sklearn(labels, 1 / (1 + np.exp(-outputs)) > 0.5).items():
        assert found[name] == pytest.approx(expected), name


@given(seeds, sizes, cut_points)
def test_confusion_matrices_are_those_of_scikit_learn(seed: int, samples: int, cuts: list[int]) -> None:
    outputs, labels = drawn(seed, samples)
    cuts = [cut for cut in cuts if cut < samples]
    expected = sklearn.confusion_matrix(labels, outputs.argmax(axis=1), labels=range(CLASSES))
    assert figures(ConfusionMatrix(), outputs, labels, cuts) == {"confusion": expected.tolist()}
    many = (np.random.default_rng(seed + 1).random((samples, CLASSES)) < 0.3).astype(np.float32)
    expected = sklearn.multilabel_confusion_matrix(many, outputs > 0)
    found = figures(ConfusionMatrix(multi_label=True), outputs, many, cuts)
    assert found == {"multi_label_confusion": expected.tolist()}


@given(seeds, sizes, st.integers(1, CLASSES - 1), cut_points, st.booleans())
def test_top_k_is_that_of_scikit_learn_and_of_equal_outputs_the_first_is_likelier(
    seed: int, samples: int, k: int, cuts: list[int], tied: bool
) -> None:
    outputs, labels = drawn(seed, samples)
    if tied:
        outputs = outputs.round()
    mirrored = outputs[:, ::-1]  # of equal outputs scikit-learn takes the last
    expected = sklearn.top_k_accuracy_score(CLASSES - 1 - labels, mirrored, k=k, labels=range(CLASSES))
    found = figures(TopK(k), outputs, labels, [cut for cut in cuts if cut < samples])
    assert found == {f"top_{k}": pytest.approx(expected)}


def test_top_1_is_the_accuracy_of_the_loss_and_top_of_all_is_everything() -> None:
    outputs, labels = drawn(0, 50)
    outputs = outputs.round()  # equal ones among them
    loss = losses.softmax_cross_entropy()(outputs, labels)
    assert figures(TopK(1), outputs, labels) == {"top_1": loss.correct / loss.judged}
    assert figures(TopK(CLASSES), outputs, labels) == {f"top_{CLASSES}": 1.0}


def test_an_output_that_is_no_number_is_never_right() -> None:
    outputs = np.full((3, CLASSES), np.nan, np.float32)
    assert figures(TopK(CLASSES), outputs, np.arange(3)) == {f"top_{CLASSES}": 0.0}


SINGLE: list[Metric] = [TopK(2), PrecisionRecallF1(), ConfusionMatrix(), WorstSamples(4)]


@pytest.mark.parametrize("metric", SINGLE, ids=repr)
def test_soft_labels_count_as_their_largest_element(metric: Metric) -> None:
    outputs, labels = drawn(1, 30)
    one_hot = np.eye(CLASSES, dtype=np.float32)[labels]
    soft = 0.9 * one_hot + 0.02
    hard = figures(metric, outputs, labels)
    assert figures(metric, outputs, one_hot) == hard
    if not isinstance(metric, WorstSamples):  # whose loss sees the difference
        assert figures(metric, outputs, soft.astype(np.float32)) == hard


@pytest.mark.parametrize("metric", [TopK, PrecisionRecallF1, ConfusionMatrix, WorstSamples])
def test_samples_that_tell_nothing_are_left_out(metric: Any) -> None:
    outputs, labels = drawn(2, 30)
    ignored = np.where(np.arange(30) % 3 == 0, -100, labels)
    soft = np.where(ignored[:, np.newaxis] == -100, 0, np.eye(CLASSES)[labels]).astype(np.float32)
    told = ignored != -100
    expected = figures(metric(), outputs[told], labels[told])
    found = [figures(metric(ignore_index=-100), outputs, ignored), figures(metric(), outputs, soft)]
    for one in (*found, expected):
        for sample in one.get("worst", ()):
            del sample["source"]  # numbered otherwise
    assert found == [expected, expected]


def test_integer_labels_of_many_questions_are_each_class_against_all_others() -> None:
    outputs, labels = drawn(3, 30)
    one_hot = np.eye(CLASSES, dtype=np.float32)[labels]
    for metric in (PrecisionRecallF1(multi_label=True), ConfusionMatrix(multi_label=True)):
        assert figures(metric, outputs, labels) == figures(metric, outputs, one_hot)
    ignoring = PrecisionRecallF1(multi_label=True, ignore_index=0)
    assert figures(ignoring, outputs, labels) == figures(ignoring, outputs[labels != 0], one_hot[labels != 0])


def test_one_output_is_one_question() -> None:
    outputs = np.array([[2.0], [-1.0], [0.5], [0.0]], np.float32)
    labels = np.array([1, 1, 0, 0])
    assert figures(ConfusionMatrix(multi_label=True), outputs, labels) == {"multi_label_confusion": [[[1, 1], [1, 1]]]}


@given(seeds, st.integers(1, 30), st.integers(1, 8), cut_points, st.booleans())
def test_the_worst_samples_are_those_of_the_largest_loss_of_all_batches(
    seed: int, samples: int, n: int, cuts: list[int], multi_label: bool
) -> None:
    outputs, labels = drawn(seed, samples)
    loss: losses.LossFunction = losses.softmax_cross_entropy()
    if multi_label:
        labels = (np.random.default_rng(seed + 1).random((samples, CLASSES)) < 0.3).astype(np.float32)
        loss = losses.binary_cross_entropy()
    each = [loss(outputs[i : i + 1].astype(np.float64), labels[i : i + 1]).value for i in range(samples)]
    order = sorted(range(samples), key=lambda i: -each[i])[:n]
    found = figures(WorstSamples(n, multi_label), outputs, labels, [cut for cut in cuts if cut < samples])["worst"]
    assert [sample["source"] for sample in found] == [f"image-{i}" for i in order]
    assert [sample["loss"] for sample in found] == pytest.approx([each[i] for i in order])
    for sample, i in zip(found, order, strict=True):
        expected = (labels[i], outputs[i].argmax())
        if multi_label:
            expected = (np.flatnonzero(labels[i]).tolist(), np.flatnonzero(outputs[i] > 0).tolist())
        assert (sample["label"], sample["predicted"]) == expected


def test_soft_labels_have_the_cross_entropy_of_the_loss() -> None:
    outputs, _ = drawn(4, 6)
    soft = np.random.default_rng(5).dirichlet(np.ones(CLASSES), 6)
    each = [losses.softmax_cross_entropy()(outputs[i : i + 1].astype(float), soft[i : i + 1]).value for i in range(6)]
    found = [sample["loss"] for sample in figures(WorstSamples(6), outputs, soft)["worst"]]
    assert found == pytest.approx(sorted(each, reverse=True))


def test_of_equal_losses_the_earlier_sample_is_worse_and_one_that_is_no_number_is_worst() -> None:
    outputs = np.zeros((5, CLASSES), np.float32)
    outputs[3] = np.nan
    worst = figures(WorstSamples(3), outputs, np.zeros(5, int), cuts=(2,))["worst"]
    assert [sample["source"] for sample in worst] == ["image-3", "image-0", "image-1"]
    assert worst[0]["loss"] == np.finfo(float).max


def test_of_no_samples_shares_are_no_numbers_and_the_rest_is_empty() -> None:
    labels = np.full(4, 7)
    found = [figures(metric(ignore_index=7), np.zeros((4, 2)), labels) for metric in (PrecisionRecallF1, WorstSamples)]
    assert found[0]["macro_f1"] == 0.0
    assert found[0]["support"] == [0, 0]
    assert found[1] == {"worst": []}
    assert math.isnan(TopK(3).result(TopK(3).begin())["top_3"])
    assert PrecisionRecallF1().result(None)["weighted_recall"] == 0.0
    assert ConfusionMatrix().result(None) == {"confusion": []}


def test_wrong_arguments_and_labels_are_named() -> None:
    with pytest.raises(ValueError, match="TopK: k must be at least 1, got 0"):
        TopK(0)
    with pytest.raises(ValueError, match="WorstSamples: n must be at least 1, got 0"):
        WorstSamples(0)
    outputs = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="labels must be between 0 and 2, or the metric's ignore_index, got -1"):
        ConfusionMatrix(ignore_index=9).add(None, outputs, batch(np.array([9, -1])))
    with pytest.raises(ValueError, match=r"labels of shape \(2, 2\) for outputs of shape \(2, 3\)"):
        TopK().add((0, 0), outputs, batch(np.zeros((2, 2))))
    with pytest.raises(ValueError, match=r"labels of shape \(2, 2\) for outputs of shape \(2, 3\)"):
        PrecisionRecallF1(multi_label=True).add(None, outputs, batch(np.zeros((2, 2))))


async def test_a_run_tells_metrics_in_its_evaluations_and_controllers_monitor_them() -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 6, 6, 1), dtype=np.uint8)
    data = at.ArrayDataset(images, np.arange(60) % 3, classes=("ant", "bee", "cat"))
    loader = at.Loader(data, batch_size=20, image_size=(6, 6), channels=1)
    model = at.models.mlp(num_classes=3, image_shape=(6, 6, 1), hidden=(8,))
    metrics: list[Metric] = [TopK(2), PrecisionRecallF1(), ConfusionMatrix(), WorstSamples(5)]
    async with at.ThreadExecutor(2) as executor:
        trainer = at.Trainer(model, optimizer=at.optim.adamw(1e-2), executor=executor)
        history = await trainer.fit(
            loader,
            epochs=2,
            validate=data,
            metrics=metrics,
            controllers=[EarlyStopping("validation.macro_f1", patience=2)],
        )
        again = await trainer.evaluate(loader.evaluating(data), history.state, metrics=metrics)
        classifier = at.Classifier.from_state(model, history.state, classes=data.classes)
        by_classifier = await classifier.evaluate(loader.evaluating(data), executor=executor, metrics=metrics)
    event = next(event for event in history.events if isinstance(event, at.events.EpochEnd) and event.epoch == 2)
    assert event.validation is not None
    confusion = np.array(event.validation.metrics["confusion"])
    assert confusion.sum() == 60
    assert np.trace(confusion) / 60 == pytest.approx(event.validation.accuracy)
    assert len(event.validation.metrics["worst"]) == 5
    for name in ("top_2", "macro_f1", "weighted_recall", "micro_precision"):
        assert monitored(event, f"validation.{name}") == event.validation.metrics[name]
    assert again.metrics == by_classifier.metrics == event.validation.metrics
    assert at.events.from_json(json.loads(json.dumps(at.events.to_json(event)))) == event


def test_a_metric_that_is_no_number_survives_json() -> None:
    evaluation = at.EvaluationResult(1.0, 0.5, 2, {"top_3": math.nan})
    event = at.events.Evaluation(1, 1, evaluation, 0.0)
    told = json.loads(json.dumps(at.events.to_json(event), allow_nan=False))
    restored = at.events.from_json(told)
    assert isinstance(restored, at.events.Evaluation)
    assert math.isnan(restored.result.metrics["top_3"])
