"""Losses: value and gradient together, as sums over the samples. The step divides once, by the sum of the weights.

A loss is a frozen description that is called: ``softmax_cross_entropy(label_smoothing=0.1)(logits, labels)``. Its JSON
is what a Program holds. Outputs and gradients are float32 or float64; sums over samples are float64.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import inf
from typing import Any, NamedTuple, Protocol

import numpy as np

from asynctrain.arena import Array
from asynctrain.types import JSON

_quiet = np.errstate(over="ignore", invalid="ignore")  # what is not finite is seen in the value


class Loss(NamedTuple):
    """What a loss function tells about one microbatch.

    value: the sum over samples, weighted. weight: the sum of the sample weights (both accumulated in float64).
    gradient: of ``value`` with respect to the model's outputs, in their shape and dtype. correct: how many samples
    were predicted right. judged: of how many, those that weigh nothing left out; 0 for a loss that knows no right.
    """

    value: float
    weight: float
    gradient: Array
    correct: int
    judged: int


class LossFunction(Protocol):
    """What every loss can do."""

    def __call__(self, outputs: Array, labels: Array, weights: Array | None = None, out: Array | None = None) -> Loss:
        """Return the loss of ``outputs`` and its gradient.

        Args:
            outputs: (N, K) of the model, N and K at least 1, float32 or float64.
            labels: one row for each sample; which kinds there are, the loss says.
            weights: (N,) w, of each sample, at least 0; by default 1.
            out: (N, K) of the outputs' dtype, where the gradient is written.

        Raises:
            ValueError: shapes or labels do not fit.
        """
        ...

    def to_json(self) -> JSON:
        """Return its name and arguments; ``from_json`` reads them."""
        ...


class _Described:
    """A loss whose fields are its description."""

    def to_json(self) -> JSON:
        """Return its name and arguments; ``from_json`` reads them."""
        arguments: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}
        return {"name": type(self).__name__, **lists}


@dataclass(frozen=True)
class softmax_cross_entropy(_Described):  # noqa: N801  # used as a function, like the schedules of optim
    """Softmax and cross-entropy: sum_n w_n sum_k c_k y_nk (log sum_j exp(z_nj) - z_nk), each row's maximum subtracted.

    y are the labels as probabilities, c the class weights. The gradient is w_n (T_n softmax(z)_nk - c_k y_nk) with
    T_n = sum_k c_k y_nk. A sample weighs w_n T_n, taken before smoothing: with class weights the mean is the weighted
    one, for whole labels as in PyTorch and ONNX. Logits that are not finite give a value that is not finite.

    Labels are (N,) integers, 0 to K - 1, or (N, K) soft ones, at least 0 and normally of sum 1 (a row of zeros weighs
    nothing). A sample is right where its largest logit is at its largest label.

    Args:
        class_weights: c, K numbers of at least 0; by default all 1.
        label_smoothing: e, 0 up to 1: y becomes (1 - e) y + e sum(y) / K (Szegedy et al. 2016, arXiv:1512.00567).
        ignore_index: the integer label of samples that weigh nothing; it may lie out of range. None: there is none.

    Raises:
        ValueError: an argument is out of range.
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        _set_numbers(self, "class_weights")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"softmax_cross_entropy: label_smoothing must be at least 0 and below 1, got {self.label_smoothing}"
            )

    @_quiet
    def __call__(self, outputs: Array, labels: Array, weights: Array | None = None, out: Array | None = None) -> Loss:
        """Return the loss; the arguments are those of ``LossFunction``."""
        _check_numbers("softmax_cross_entropy: class_weights", self.class_weights, outputs)
        if labels.ndim == 2:
            if labels.size and not labels.min() >= 0:
                raise ValueError(f"softmax_cross_entropy: soft labels must be at least 0, got {labels.min()}")
            right = outputs.argmax(axis=1) == _same_shape(outputs, labels).argmax(axis=1)
            return self._of_soft(outputs, labels, weights, right, out)
        labels, weights = _without_ignored(outputs, labels, self.ignore_index, weights)
        right = outputs.argmax(axis=1) == labels
        if self.label_smoothing:
            return self._of_soft(outputs, _one_hot(labels, outputs), weights, right, out)
        losses, gradient = _cross_entropy(outputs, labels, out)
        return _weighed(losses, gradient, _of_class(self.class_weights, labels, weights), right)

    def _of_soft(self, z: Array, y: Array, weights: Array | None, right: Array, out: Array | None) -> Loss:
        c = np.asarray(1.0 if self.class_weights is None else self.class_weights, z.dtype)
        own_weights = (c * y).sum(axis=1, dtype=np.float64)
        if self.label_smoothing:
            share = self.label_smoothing / z.shape[1]
            y = (1 - self.label_smoothing) * y + share * y.sum(axis=1, keepdims=True)
        losses, gradient = _soft_cross_entropy(z, np.multiply(c, y, dtype=z.dtype), out)
        return _weighed(losses, gradient, weights, right, own_weights)


def _cross_entropy(z: Array, labels: Array, out: Array | None) -> tuple[Array, Array]:
    """Return log sum_k exp(z_nk) - z_n,label(n) and softmax(z)_nk - [k = label(n)]."""
    rows = np.arange(len(labels))
    shifted = np.subtract(z, z.max(axis=1, keepdims=True), out=out)
    at_label = shifted[rows, labels]
    gradient = np.exp(shifted, out=shifted)
    total = gradient.sum(axis=1, keepdims=True)
    gradient /= total
    gradient[rows, labels] -= 1
    return np.log(total[:, 0]) - at_label, gradient


def _soft_cross_entropy(z: Array, targets: Array, out: Array | None) -> tuple[Array, Array]:
    """Return T_n log sum_k exp(z_nk) - sum_k t_nk z_nk and T_n softmax(z)_nk - t_nk, where T_n = sum_k t_nk."""
    shifted = np.subtract(z, z.max(axis=1, keepdims=True), out=out)
    sums = targets.sum(axis=1, keepdims=True)
    at_targets = (targets * shifted).sum(axis=1)
    gradient = np.exp(shifted, out=shifted)
    total = gradient.sum(axis=1, keepdims=True)
    gradient *= sums / total
    gradient -= targets
    return sums[:, 0] * np.log(total[:, 0]) - at_targets, gradient


@dataclass(frozen=True)
class negative_log_likelihood(_Described):  # noqa: N801  # as above
    """Cross-entropy of a model that ends in log-probabilities z: -sum_n w_n c_label(n) z_n,label(n).

    Only the output at the label has a gradient. Labels are (N,) integers; weights, ``class_weights`` and
    ``ignore_index`` are those of ``softmax_cross_entropy``, the better choice for a model that may end in logits.

    Raises:
        ValueError: an argument is out of range.
    """

    class_weights: tuple[float, ...] | None = None
    ignore_index: int | None = None

    def __post_init__(self) -> None:
        _set_numbers(self, "class_weights")

    @_quiet
    def __call__(self, outputs: Array, labels: Array, weights: Array | None = None, out: Array | None = None) -> Loss:
        """Return the loss; the arguments are those of ``LossFunction``."""
        _check_numbers("negative_log_likelihood: class_weights", self.class_weights, outputs)
        labels, weights = _without_ignored(outputs, labels, self.ignore_index, weights)
        rows = np.arange(len(labels))
        gradient = np.empty_like(outputs) if out is None else out
        gradient.fill(0)
        gradient[rows, labels] = -1
        right = outputs.argmax(axis=1) == labels
        return _weighed(-outputs[rows, labels], gradient, _of_class(self.class_weights, labels, weights), right)


@dataclass(frozen=True)
class binary_cross_entropy(_Described):  # noqa: N801  # as above
    """Sigmoid and binary cross-entropy of each output: sum_n w_n mean_k (p_k y_nk s(-z_nk) + (1 - y_nk) s(z_nk)).

    s(z) = log(1 + exp(z)), computed without overflow or cancellation. The gradient is
    w_n ((1 - y_nk) sigma(z_nk) - p_k y_nk sigma(-z_nk)) / K with sigma(z) = 1 / (1 + exp(-z)).

    Labels are (N, K), each from 0 to 1 (several may hold at once); (N,) for a model of one output; or (N,) integers
    for a model of K classes, each class against all others. A sample is right where every output is on its label's
    side: z > 0 exactly where y >= 1/2.

    Args:
        positive_weights: p, K numbers of at least 0, which make up for rare positives; by default all 1.

    Raises:
        ValueError: an argument is out of range.
    """

    positive_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _set_numbers(self, "positive_weights")

    @_quiet
    def __call__(self, outputs: Array, labels: Array, weights: Array | None = None, out: Array | None = None) -> Loss:
        """Return the loss; the arguments are those of ``LossFunction``."""
        _check_numbers("binary_cross_entropy: positive_weights", self.positive_weights, outputs)
        y = self._probabilities(outputs, labels)
        p = np.asarray(1.0 if self.positive_weights is None else self.positive_weights, outputs.dtype)
        right = ((outputs > 0) == (y >= 0.5)).all(axis=1)
        negative, positive = 1 - y, p * y
        small = np.exp(-np.abs(outputs))
        losses = (negative + positive) * np.log1p(small)
        losses += negative * np.maximum(outputs, 0)
        losses -= positive * np.minimum(outputs, 0)
        larger = 1 / (1 + small)
        small *= larger
        above = outputs >= 0
        gradient = np.multiply(negative, np.where(above, larger, small), out=out)
        gradient -= positive * np.where(above, small, larger)
        gradient /= outputs.shape[1]
        return _weighed(losses.mean(axis=1), gradient, weights, right)

    def _probabilities(self, outputs: Array, labels: Array) -> Array:
        classes = outputs.shape[1]
        if labels.ndim == 1 and classes > 1:
            _check_labels(outputs, labels)
            return _one_hot(labels, outputs)
        y = _same_shape(outputs, labels).astype(outputs.dtype)
        wrong = ~((y >= 0) & (y <= 1))
        if wrong.any():
            raise ValueError(f"binary_cross_entropy: labels must be between 0 and 1, got {y[wrong][0]}")
        return y


class _Regression(_Described):
    """The sum over samples of w_n times the mean over outputs of a function of r = z - y; nothing is right or wrong.

    Labels are (N, K), or (N,) for a model of one output.
    """

    @_quiet
    def __call__(self, outputs: Array, labels: Array, weights: Array | None = None, out: Array | None = None) -> Loss:
        """Return the loss; the arguments are those of ``LossFunction``."""
        labels = _same_shape(outputs, labels).astype(outputs.dtype, copy=False)
        r = np.subtract(outputs, labels, out=out)
        losses = self._value(r).mean(axis=1)
        gradient = self._derivative(r)
        gradient /= outputs.shape[1]
        return _weighed(losses, gradient, weights)

    def _value(self, r: Array) -> Array:
        """Return the function of each element, as a new array."""
        raise NotImplementedError

    def _derivative(self, r: Array) -> Array:
        """Return its derivative, in ``r`` itself."""
        raise NotImplementedError


@dataclass(frozen=True)
class mean_squared_error(_Regression):  # noqa: N801  # as above
    """sum_n w_n mean_k r_nk^2 with r = z - y; the gradient is w_n 2 r_nk / K.

    Labels are (N, K), or (N,) for a model of one output. Nothing is right or wrong: ``judged`` is 0.
    """

    def _value(self, r: Array) -> Array:
        return r * r

    def _derivative(self, r: Array) -> Array:
        return np.multiply(r, 2, out=r)


@dataclass(frozen=True)
class mean_absolute_error(_Regression):  # noqa: N801  # as above
    """sum_n w_n mean_k |r_nk| with r = z - y; the gradient is w_n sign(r_nk) / K, 0 where r is 0.

    Labels are (N, K), or (N,) for a model of one output. Nothing is right or wrong: ``judged`` is 0.
    """

    def _value(self, r: Array) -> Array:
        return np.abs(r)

    def _derivative(self, r: Array) -> Array:
        return np.sign(r, out=r)


@dataclass(frozen=True)
class huber(_Regression):  # noqa: N801  # as above
    """sum_n w_n mean_k h(r_nk) with r = z - y, h(r) = r^2 / 2 up to |r| = delta and delta (|r| - delta / 2) beyond.

    Huber 1964, doi:10.1214/aoms/1177703732. The gradient is w_n clip(r_nk, -delta, delta) / K.

    Labels are (N, K), or (N,) for a model of one output. Nothing is right or wrong: ``judged`` is 0.

    Args:
        delta: above 0.

    Raises:
        ValueError: delta is out of range.
    """

    delta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.delta < inf:
            raise ValueError(f"huber: delta must be above 0 and finite, got {self.delta}")

    def _value(self, r: Array) -> Array:
        near = np.minimum(np.abs(r), self.delta)
        return near * (np.abs(r) - near / 2)

    def _derivative(self, r: Array) -> Array:
        return np.clip(r, -self.delta, self.delta, out=r)


def _weighed(
    losses: Array,
    gradient: Array,
    weights: Array | None,
    right: Array | None = None,
    own_weights: Array | None = None,
) -> Loss:
    """Return the sums over samples, and the gradient (in place) of the weighted sum.

    losses: (N,), and their (N, K) gradient. weights: (N,), which multiply both. right: (N,) bool. own_weights: (N,)
    float64, what each sample weighs before it is multiplied.
    """
    if weights is not None:
        gradient *= weights.astype(gradient.dtype, copy=False)[:, np.newaxis]
        losses = np.multiply(losses, weights, dtype=np.float64)
    if own_weights is not None:
        weights = own_weights if weights is None else own_weights * weights
    value = float(losses.sum(dtype=np.float64))
    weight = float(len(losses)) if weights is None else float(weights.sum(dtype=np.float64))
    if right is None:
        return Loss(value, weight, gradient, 0, 0)
    if weights is None:
        return Loss(value, weight, gradient, int(np.count_nonzero(right)), len(right))
    judged = weights > 0
    return Loss(value, weight, gradient, int(np.count_nonzero(right & judged)), int(np.count_nonzero(judged)))


def _without_ignored(
    outputs: Array, labels: Array, ignore_index: int | None, weights: Array | None
) -> tuple[Array, Array | None]:
    """Return labels in range and sample weights, where each ignored label has become a 0 that weighs 0."""
    if ignore_index is not None:
        ignored = labels == ignore_index
        labels = np.where(ignored, 0, labels)
        weights = np.where(ignored, 0.0, 1.0 if weights is None else weights)
    _check_labels(outputs, labels)
    return labels, weights


def _of_class(class_weights: tuple[float, ...] | None, labels: Array, weights: Array | None) -> Array | None:
    """Return the sample weights, times those of the samples' classes."""
    if class_weights is None:
        return weights
    of_class = np.asarray(class_weights)[labels]
    return of_class if weights is None else of_class * weights


def _one_hot(labels: Array, outputs: Array) -> Array:
    one_hot = np.zeros_like(outputs)
    one_hot[np.arange(len(labels)), labels] = 1
    return one_hot


def _check_labels(outputs: Array, labels: Array) -> None:
    if outputs.ndim != 2 or labels.shape != outputs.shape[:1]:
        raise ValueError(
            f"labels must have shape (N,) for logits of shape (N, classes), "
            f"got labels of shape {labels.shape} for logits of shape {outputs.shape}"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels of shape (N,) must be integers, the numbers of classes, got {labels.dtype}")
    classes = outputs.shape[1]
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        raise ValueError(
            f"labels must be between 0 and {classes - 1} for a model of {classes} classes, got {labels[wrong][0]}"
        )


def _same_shape(outputs: Array, labels: Array) -> Array:
    """Return the labels with one element for each output, (N, K)."""
    if outputs.ndim == 2 and outputs.shape[1] == 1 and labels.ndim == 1:
        labels = labels[:, np.newaxis]
    if outputs.ndim != 2 or labels.shape != outputs.shape:
        raise ValueError(
            f"labels must have the shape (N, K) of the outputs, "
            f"got labels of shape {labels.shape} for outputs of shape {outputs.shape}"
        )
    return labels


def _set_numbers(loss: Any, argument: str) -> None:
    """Make the field a tuple of floats, which JSON gives back as a list, or leave it None."""
    given = getattr(loss, argument)
    if given is None:
        return
    numbers = tuple(map(float, given))
    if not numbers or not all(0 <= number < inf for number in numbers):
        raise ValueError(f"{type(loss).__name__}: {argument} must be finite numbers of at least 0, got {given}")
    object.__setattr__(loss, argument, numbers)


def _check_numbers(argument: str, numbers: tuple[float, ...] | None, outputs: Array) -> None:
    if numbers is not None and len(numbers) != outputs.shape[1]:
        raise ValueError(f"{argument} must be {outputs.shape[1]} numbers, one for each output, got {len(numbers)}")


_BY_NAME: dict[str, type[_Described]] = {
    loss.__name__: loss
    for loss in (
        softmax_cross_entropy,
        negative_log_likelihood,
        binary_cross_entropy,
        mean_squared_error,
        mean_absolute_error,
        huber,
    )
}


def get(name: str) -> LossFunction:
    """Return the loss called ``name``, with its default arguments.

    Raises:
        ValueError: there is none of that name.
    """
    return from_json({"name": name})


def from_json(value: str | JSON) -> LossFunction:
    """Return the loss that ``to_json`` described; its name alone stands for the default arguments.

    Raises:
        ValueError: there is none of that name, or an argument is unknown or out of range.
    """
    arguments: dict[str, Any] = {"name": value} if isinstance(value, str) else dict(value)
    name = arguments.pop("name", None)
    if name not in _BY_NAME:
        raise ValueError(f"loss must be one of {', '.join(_BY_NAME)}, got {name!r}")
    loss: Any = _BY_NAME[name]
    unknown = arguments.keys() - loss.__dataclass_fields__.keys()
    if unknown:
        permitted = ", ".join(loss.__dataclass_fields__) or "none"
        raise ValueError(f"{name}: arguments must be {permitted}, got {', '.join(sorted(unknown))}")
    made: LossFunction = loss(**arguments)
    return made
