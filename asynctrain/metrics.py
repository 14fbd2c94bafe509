"""Metrics of evaluations, gathered batch by batch: ``trainer.fit(..., validate=held_out, metrics=[TopK(5)])``.

The definitions are scikit-learn's, with ``labels=range(K)`` for a model of K outputs and ``zero_division=0``: a class
that never occurs counts in a macro average, with zeros. A metric is a frozen description; what it has gathered is a
value of its own, small whatever the number of samples. Figures are JSON values.

A model of single-label data predicts its largest output, the first of several equal ones. Labels are (N,) integers, or
soft ones (N, K), whose largest element is the true class. With ``multi_label`` each output is a question of its own,
answered yes where sigmoid(z) > 1/2, that is z > 0, and truly yes where the label is at least 1/2; labels are (N, K),
(N,) for a model of one output, or (N,) integers, each class against all others.

Every sample counts once: weights of classes and samples change the loss alone, neither these figures nor the accuracy.
Only a sample that tells nothing is left out: one of weight 0, one with an integer label equal to ``ignore_index``, or
one with a soft label of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from asynctrain.arena import Array
from asynctrain.types import Batch

__all__ = ["ConfusionMatrix", "PrecisionRecallF1", "TopK", "WorstSamples"]

Counts: TypeAlias = Array | None  # integers, whose shape the first batch tells
Sample: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class TopK:
    """The share of samples whose true class is among the ``k`` likeliest, 0 to 1: the figure ``top_<k>``.

    Of equal outputs the first is likelier, as in the accuracy, which ``TopK(1)`` is too. NaN where no sample counted.

    Args:
        k: at least 1.
        ignore_index: the integer label of samples that are left out.

    Raises:
        ValueError: k is out of range.
    """

    k: int = 5
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        _check_positive("TopK: k", self.k)

    def begin(self) -> tuple[int, int]:
        """Return that none of no samples were right."""
        return 0, 0

    def add(self, gathered: tuple[int, int], outputs: Array, batch: Batch) -> tuple[int, int]:
        """Count how many samples of ``batch`` are right."""
        judged = _single_label(outputs, batch, self.ignore_index)
        right, samples = gathered
        return right + int(np.count_nonzero(_ranks(judged) < self.k)), samples + len(judged.true)

    def result(self, gathered: tuple[int, int]) -> Mapping[str, float]:
        """Return the share."""
        right, samples = gathered
        return {f"top_{self.k}": right / samples if samples else nan}


@dataclass(frozen=True)
class PrecisionRecallF1:
    """Precision, recall and F1 score, of each class and averaged, 0 to 1, and 0 for 0/0.

    With t samples of a class, p predicted to be so and h of both: precision h / p, recall h / t, F1 2h / (p + t).

    Figures: ``precision``, ``recall``, ``f1`` and ``support`` (t), each a list over the classes; and
    ``macro_precision``, ... (the plain mean over classes), ``weighted_precision``, ... (the mean weighted by support),
    ``micro_precision``, ... (from h, p and t added over the classes; for single labels all three are the accuracy).

    Args:
        multi_label: whether each output is a question of its own.
        ignore_index: the integer label of samples that are left out.
    """

    multi_label: bool = False
    ignore_index: int | None = None

    def begin(self) -> Counts:
        """Return that nothing is counted."""
        return None

    def add(self, gathered: Counts, outputs: Array, batch: Batch) -> Counts:
        """Count h, p and t, (3, K)."""
        if self.multi_label:
            answers = _multi_label(outputs, batch, self.ignore_index)
            predicted, true = answers.predicted, answers.true
            return _plus(gathered, np.array([(predicted & true).sum(0), predicted.sum(0), true.sum(0)]))
        judged = _single_label(outputs, batch, self.ignore_index)
        hits = judged.true[judged.predicted == judged.true]
        numbers = (hits, judged.predicted, judged.true)
        return _plus(gathered, np.array([np.bincount(each, minlength=outputs.shape[1]) for each in numbers]))

    def result(self, gathered: Counts) -> Mapping[str, Any]:
        """Return the scores of the classes, and their averages."""
        hits, predicted, support = np.zeros((3, 0), np.int64) if gathered is None else gathered
        scores = _scores(hits, predicted, support)
        figures: dict[str, Any] = {name: score.tolist() for name, score in scores.items()}
        figures["support"] = support.tolist()
        for name, score in scores.items():
            figures[f"macro_{name}"] = _mean(score, np.ones(len(score)))
            figures[f"weighted_{name}"] = _mean(score, support)
        for name, score in _scores(hits.sum(), predicted.sum(), support.sum()).items():
            figures[f"micro_{name}"] = float(score)
        return figures


@dataclass(frozen=True)
class ConfusionMatrix:
    """How often a sample of class i was predicted to be j: the figure ``confusion``, lists (K, K), a row for each i.

    For multi-label data the figure is ``multi_label_confusion``, lists (K, 2, 2): for each output
    ``[[true no, false yes], [false no, true yes]]``.

    Args:
        multi_label: whether each output is a question of its own.
        ignore_index: the integer label of samples that are left out.
    """

    multi_label: bool = False
    ignore_index: int | None = None

    def begin(self) -> Counts:
        """Return that nothing is counted."""
        return None

    def add(self, gathered: Counts, outputs: Array, batch: Batch) -> Counts:
        """Count the samples of ``batch``."""
        classes = outputs.shape[1]
        if self.multi_label:
            answers = _multi_label(outputs, batch, self.ignore_index)
            cells = 4 * np.arange(classes) + 2 * answers.true + answers.predicted
            return _plus(gathered, np.bincount(cells.ravel(), minlength=4 * classes).reshape(classes, 2, 2))
        judged = _single_label(outputs, batch, self.ignore_index)
        cells = judged.true * classes + judged.predicted
        return _plus(gathered, np.bincount(cells, minlength=classes**2).reshape(classes, classes))

    def result(self, gathered: Counts) -> Mapping[str, Any]:
        """Return the matrix."""
        name = "multi_label_confusion" if self.multi_label else "confusion"
        return {name: [] if gathered is None else gathered.tolist()}


@dataclass(frozen=True)
class WorstSamples:
    """The samples with the largest loss: the figure ``worst``, a list, worst first.

    Each is ``{"source", "label", "predicted", "loss"}``: its name, the true and the predicted class (for multi-label
    data the lists of those that hold), and its cross-entropy, binary for multi-label data, whatever loss is trained
    with. Of equal losses the earlier sample comes first; one that is not finite is told as the largest float.

    Args:
        n: how many are kept, at least 1.
        multi_label: whether each output is a question of its own.
        ignore_index: the integer label of samples that are left out.

    Raises:
        ValueError: n is out of range.
    """

    n: int = 16
    multi_label: bool = False
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        _check_positive("WorstSamples: n", self.n)

    def begin(self) -> Sequence[Sample]:
        """Return no samples."""
        return ()

    def add(self, gathered: Sequence[Sample], outputs: Array, batch: Batch) -> Sequence[Sample]:
        """Keep the worst of those gathered and those of ``batch``."""
        of_batch = self._samples_by_answers if self.multi_label else self._samples_by_class
        worst_first = sorted((*gathered, *of_batch(outputs, batch)), key=lambda sample: -float(sample["loss"]))
        return worst_first[: self.n]

    def result(self, gathered: Sequence[Sample]) -> Mapping[str, Any]:
        """Return the samples."""
        return {"worst": [dict(sample) for sample in gathered]}

    def _samples_by_class(self, outputs: Array, batch: Batch) -> list[Sample]:
        judged = _single_label(outputs, batch, self.ignore_index)
        losses = _finite(_cross_entropy(judged.outputs, judged.targets))
        return [
            _sample(batch, judged.rows[i], int(judged.true[i]), int(judged.predicted[i]), losses[i])
            for i in self._largest(losses)
        ]

    def _samples_by_answers(self, outputs: Array, batch: Batch) -> list[Sample]:
        answers = _multi_label(outputs, batch, self.ignore_index)
        losses = _finite(_binary_cross_entropy(answers.outputs, answers.targets))
        return [
            _sample(batch, answers.rows[i], _holding(answers.true[i]), _holding(answers.predicted[i]), losses[i])
            for i in self._largest(losses)
        ]

    def _largest(self, losses: Array) -> Array:
        return np.argsort(-losses, kind="stable")[: self.n]


class _Judged(NamedTuple):
    """The n samples of a batch that tell something.

    rows: (n,), which of the batch's they are. outputs: (n, K). targets: (n,) integers, or (n, K) soft. true,
    predicted: (n,) classes, or (n, K) answers.
    """

    rows: Array
    outputs: Array
    targets: Array
    true: Array
    predicted: Array


def _single_label(outputs: Array, batch: Batch, ignore_index: int | None) -> _Judged:
    labels = batch.labels
    soft = labels.ndim == 2
    _check_shape(outputs, labels, soft)
    tells = _has_weight(batch)
    if soft:
        tells &= labels.any(axis=1)
    elif ignore_index is not None:
        tells &= labels != ignore_index
    rows = np.flatnonzero(tells)
    outputs, targets = outputs[rows], labels[rows]
    if not soft:
        _check_classes(targets, outputs.shape[1])
    true = targets.argmax(axis=1) if soft else targets
    return _Judged(rows, outputs, targets, true, outputs.argmax(axis=1))


def _multi_label(outputs: Array, batch: Batch, ignore_index: int | None) -> _Judged:
    if batch.labels.ndim == 1 and outputs.shape[1] > 1:
        rows, outputs, classes, _, _ = _single_label(outputs, batch, ignore_index)
        targets = (classes[:, np.newaxis] == np.arange(outputs.shape[1])).astype(outputs.dtype)
    else:
        targets = batch.labels[:, np.newaxis] if batch.labels.ndim == 1 else batch.labels
        _check_shape(outputs, targets, soft=True)
        rows = np.flatnonzero(_has_weight(batch))
        outputs, targets = outputs[rows], targets[rows]
    return _Judged(rows, outputs, targets, targets >= 0.5, outputs > 0)


def _has_weight(batch: Batch) -> Array:
    return np.ones(len(batch.labels), bool) if batch.weights is None else np.greater(batch.weights, 0)


def _ranks(judged: _Judged) -> Array:
    """Return how many classes are likelier than the true one, (n,); an output that is NaN is likelier than any."""
    outputs, true = judged.outputs, judged.true[:, np.newaxis]
    of_true = np.take_along_axis(outputs, true, axis=1)
    classes = np.arange(outputs.shape[1])
    not_likelier = np.where(classes < true, outputs < of_true, outputs <= of_true)
    ranks: Array = np.count_nonzero(~not_likelier, axis=1)
    return ranks


def _cross_entropy(z: Array, targets: Array) -> Array:
    """Return sum_k y_nk (log sum_j exp(z_nj) - z_nk), (n,) float64, in which y is one-hot for integer targets."""
    with np.errstate(over="ignore", invalid="ignore"):
        shifted = z.astype(np.float64) - z.max(axis=1, keepdims=True)
        logs: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        if targets.ndim == 1:
            losses: Array = -np.take_along_axis(logs, targets[:, np.newaxis], axis=1)[:, 0]
        else:
            losses = -(targets * logs).sum(axis=1)
    return losses


def _binary_cross_entropy(z: Array, targets: Array) -> Array:
    """Return mean_k (log(1 + exp(z_nk)) - y_nk z_nk), (n,) float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        z = z.astype(np.float64)
        losses: Array = (np.logaddexp(0.0, z) - targets * z).mean(axis=1)
        return losses


def _finite(losses: Array) -> Array:
    largest = np.finfo(np.float64).max
    finite: Array = np.nan_to_num(losses, nan=largest, posinf=largest)
    return finite


def _sample(batch: Batch, row: int, label: int | list[int], predicted: int | list[int], loss: float) -> Sample:
    return {"source": batch.sources[row], "label": label, "predicted": predicted, "loss": float(loss)}


def _holding(answers: Array) -> list[int]:
    return [int(k) for k in np.flatnonzero(answers)]


def _scores(hits: Any, predicted: Any, support: Any) -> dict[str, Array]:
    """Return precision, recall and F1 of counts of one shape."""
    return {
        "precision": _share(hits, predicted),
        "recall": _share(hits, support),
        "f1": _share(2 * hits, predicted + support),
    }


def _share(part: Any, whole: Any) -> Array:
    """Return part / whole, 0 for 0 / 0; no part is larger than its whole."""
    return np.asarray(part / np.maximum(whole, 1))


def _mean(values: Array, weights: Array) -> float:
    return float((values * weights).sum() / max(weights.sum(), 1))


def _plus(gathered: Counts, counts: Array) -> Array:
    return counts if gathered is None else np.add(gathered, counts)


def _check_positive(argument: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{argument} must be at least 1, got {number}")


def _check_shape(outputs: Array, labels: Array, soft: bool) -> None:
    if labels.shape != (outputs.shape if soft else outputs.shape[:1]):
        raise ValueError(
            f"metrics: labels must have shape (N,) or (N, K) for outputs of shape (N, K), "
            f"got labels of shape {labels.shape} for outputs of shape {outputs.shape}"
        )


def _check_classes(labels: Array, classes: int) -> None:
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise ValueError(
            f"metrics: labels must be between 0 and {classes - 1}, or the metric's ignore_index, got {labels[wrong][0]}"
        )
