"""Normalisation of activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from math import prod
from typing import ClassVar, NamedTuple

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn.kernels import norm
from asynctrain.nn.layers.base import Layer, Parameter, check_integer, register_layer
from asynctrain.nn.scope import Scope
from asynctrain.types import Params


class _Normalized(NamedTuple):
    """What batch normalisation saves: its input, and the mean and 1 / sqrt(variance + eps) that it used, (C,)."""

    x: Array
    mean: Array
    inverse: Array
    own: bool  # whether they are the microbatch's own, so that the gradient passes through them too

    def in_terms_of_n(self, of_dy: Array, of_dy_x: Array) -> tuple[Array, Array]:
        """Return the sum of dy n and that of dy, n the normalised x, for those of dy and of dy x."""
        return (of_dy_x - self.mean * of_dy) * self.inverse, of_dy


@register_layer("batch_norm")
@dataclass(frozen=True)
class BatchNorm(Layer):
    """y = scale (x - mean) / sqrt(variance + eps) + bias, for each channel: the last axis of x, of any rank.

    Ioffe and Szegedy 2015 (arXiv:1502.03167). In training, mean and variance are the microbatch's own, over all its
    samples and pixels (ghost batch normalisation, Hoffer et al. 2017, arXiv:1705.08741). Prediction uses the running
    ones, which are folded once a step: running = momentum running + (1 - momentum) step's. The step's are those of the
    whole batch, exactly: the variance includes the part between its microbatches. It is the biased one (divided by n,
    not n - 1), in the running statistics as in training.

    ``scale`` and ``bias`` are (C,) and begin as ones and zeros; ``mean`` and ``variance``, the running statistics, are
    (C,) float64 and begin as zeros and ones.

    Args:
        momentum: the share that the running statistics keep at each step, at least 0 and below 1 (PyTorch's momentum
            is the other share, 1 - momentum).
        eps: above 0.
    """

    leaves_output: ClassVar[bool] = True

    momentum: float = 0.9
    _: KW_ONLY
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"batch_norm: momentum must be at least 0 and below 1, got {self.momentum}")
        _check_positive(self, "eps", self.eps)

    def output_shape(self, input_shape: Shape) -> Shape:
        """Unchanged."""
        return _require_channels(self, input_shape)

    def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """Scale one, bias zero."""
        return _scale_and_bias(input_shape)

    def state(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """Mean zero, variance one."""
        return {"mean": Parameter(input_shape[-1:], "zeros"), "variance": Parameter(input_shape[-1:], "ones")}

    def statistics(self, input_shape: Shape) -> Mapping[str, Shape]:
        """The sum over samples of each sample's mean, and of its mean square."""
        return {"sum": input_shape[-1:], "sum_of_squares": input_shape[-1:]}

    def fold(self, state: Params, statistics: Params, samples: int, out: Params) -> None:
        """Put the step's mean, and its mean square less the mean's square, into the running ones."""
        mean = statistics["sum"] / samples
        variance = np.maximum(statistics["sum_of_squares"] / samples - np.square(mean), 0)  # rounding may go below
        for name, value in {"mean": mean, "variance": variance}.items():
            out[name][...] = self.momentum * state[name] + (1 - self.momentum) * value

    def flops(self, input_shape: Shape) -> int:
        """Two for each element, as in prediction: y = factor x + offset."""
        return 2 * prod(input_shape)

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Normalized]:
        """The formula above."""
        return self.normalized(params, x, scope, scope.kernels.norm_affine)

    def normalized(
        self, params: Params, x: Array, scope: Scope, affine: Callable[..., Array]
    ) -> tuple[Array, _Normalized]:
        """Return what ``affine`` makes of x and the factor and the offset of each channel."""
        rows = _rows(x)
        if scope.train:
            mean, variance = scope.kernels.norm_moments(rows, scratch=_scratch("scratch", rows, scope))
            scope.statistic("sum")[...] = len(x) * mean
            scope.statistic("sum_of_squares")[...] = len(x) * (variance + np.square(mean))
        else:
            mean, variance = scope.state("mean"), scope.state("variance")
        inverse = 1 / np.sqrt(variance + self.eps)
        factor = params["scale"] * inverse
        y = scope.empty("y", x.shape, x.dtype)
        affine(rows, factor, params["bias"] - mean * factor, out=_rows(y))
        return y, _Normalized(x, mean, inverse, scope.train)

    def backward(
        self, params: Params, saved: _Normalized, dy: Array, scope: Scope, need_input: bool = True
    ) -> Array | None:
        """Both parts at once: dx is made of the same two sums that are the weight gradients."""
        scope.check()
        dscale, dbias = self._sums(saved, dy, scope)
        scope.gradient("scale")[...] = dscale
        scope.gradient("bias")[...] = dbias
        if not need_input:
            return None
        return self.input_gradient(params, saved, dy, dscale, dbias, scope, out=scope.over("dx", dy))

    def backward_input(self, params: Params, saved: _Normalized, dy: Array, scope: Scope) -> Array:
        """dx = scale / sqrt(variance + eps) (dy - mean(dy) - n mean(dy n)), n the normalised x and means over rows.

        With running statistics, which do not depend on x, the two means fall away.
        """
        sums = self._sums(saved, dy, scope)
        return self.input_gradient(params, saved, dy, *sums, scope, out=scope.over("dx", dy))

    def backward_params(self, params: Params, saved: _Normalized, dy: Array, scope: Scope) -> None:
        """dscale = sum of dy n, dbias = sum of dy, over rows."""
        scope.gradient("scale")[...], scope.gradient("bias")[...] = self._sums(saved, dy, scope)

    def _sums(self, saved: _Normalized, dy: Array, scope: Scope) -> tuple[Array, Array]:
        return saved.in_terms_of_n(*scope.kernels.norm_sums(_rows(saved.x), _rows(dy)))

    def input_gradient(
        self, params: Params, saved: _Normalized, dy: Array, dscale: Array, dbias: Array, scope: Scope, *, out: Array
    ) -> Array:
        """Write dx for dy and the gradients of scale and bias into ``out``, which may be dy, and return it."""
        rows = _rows(dy)
        factor = params["scale"] * saved.inverse
        if not saved.own:
            norm.scaled(rows, factor, out=_rows(out))
            return out
        of_x = -factor * saved.inverse * dscale / len(rows)
        offset = -factor * dbias / len(rows) - of_x * saved.mean
        scratch = _scratch("scratch_of_dx", rows, scope)
        scope.kernels.norm_combination(_rows(saved.x), rows, of_x, factor, offset, out=_rows(out), scratch=scratch)
        return out


class _Rectified(NamedTuple):
    """What batch normalisation with a ReLU saves."""

    normalized: _Normalized
    y: Array


@dataclass(frozen=True)
class RectifiedNorm(Layer):
    """y = max(n(x), 0), n being a ``BatchNorm``: it and the ``ReLU`` behind it, in fewer passes over memory.

    It is no layer that a model is made of, but what a ``Sequential`` computes with; see ``fused``.

    Args:
        norm: the batch normalisation, whose parameters and statistics it has.
    """

    leaves_output: ClassVar[bool] = False  # the sign of y is that of n

    norm: BatchNorm

    def output_shape(self, input_shape: Shape) -> Shape:
        """Unchanged."""
        return self.norm.output_shape(input_shape)

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Rectified]:
        """The formula above."""
        y, saved = self.norm.normalized(params, x, scope, scope.kernels.norm_affine_relu)
        return y, _Rectified(saved, y)

    def backward(
        self, params: Params, saved: _Rectified, dy: Array, scope: Scope, need_input: bool = True
    ) -> Array | None:
        """That of the normalisation for g = dy [y > 0], which comes with the sums that all is made of."""
        scope.check()
        normalized, y = saved
        dx = scope.over("dx", dy)
        x, g = _rows(normalized.x), _rows(dx)
        positive = scope.empty("positive", (norm.block_size(x),), np.dtype(np.bool_))
        sums = scope.kernels.norm_relu_sums(x, _rows(y), _rows(dy), out=g, positive=positive)
        dscale, dbias = normalized.in_terms_of_n(*sums)
        scope.gradient("scale")[...] = dscale
        scope.gradient("bias")[...] = dbias
        if not need_input:
            return None
        return self.norm.input_gradient(params, normalized, dx, dscale, dbias, scope, out=dx)

    def backward_params(self, params: Params, saved: _Rectified, dy: Array, scope: Scope) -> None:
        """Not apart from the input gradient: see ``backward``."""
        self.backward(params, saved, dy, scope, need_input=False)


class _Grouped(NamedTuple):
    """What group normalisation saves: its input, and for each sample and channel mean and 1 / sqrt(variance + eps)."""

    x: Array
    mean: Array
    inverse: Array


@register_layer("group_norm")
@dataclass(frozen=True)
class GroupNorm(Layer):
    """y = scale (x - mean) / sqrt(variance + eps) + bias, mean and variance of a group of channels of one sample.

    Wu and He 2018 (arXiv:1803.08494). The channels are the last axis of x, of any rank; group g has the g-th part of
    them; the moments are over all pixels of the group. ``scale`` and ``bias`` are (C,) and begin as ones and zeros. One
    group for each channel is instance normalisation.

    Args:
        groups: divides the number of channels.
        eps: above 0.
    """

    groups: int
    _: KW_ONLY
    eps: float = 1e-5

    def __post_init__(self) -> None:
        check_integer(self, "groups", self.groups)
        _check_positive(self, "eps", self.eps)

    def output_shape(self, input_shape: Shape) -> Shape:
        """Unchanged."""
        _require_channels(self, input_shape)
        if input_shape[-1] % self.groups:
            raise ValueError(f"group_norm: groups must divide the {input_shape[-1]} channels, got {self.groups}")
        return input_shape

    def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """Scale one, bias zero."""
        return _scale_and_bias(input_shape)

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Grouped]:
        """The formula above."""
        samples = _pixels(x)
        y = scope.empty("y", x.shape, x.dtype)
        shape = (len(x), x.shape[-1])
        means, inverses = (scope.empty(name, shape, np.dtype(np.float64)) for name in ("mean", "inverse"))
        scratch = _scratch("scratch", samples[0], scope)
        for sample, mean, inverse, target in zip(samples, means, inverses, _pixels(y), strict=True):
            of_channels, variance = norm.moments(sample, scratch=scratch)
            mean[...] = self._over_group(of_channels)
            inverse[...] = 1 / np.sqrt(self._over_group(variance + np.square(of_channels - mean)) + self.eps)
            factor = params["scale"] * inverse
            norm.affine(sample, factor, params["bias"] - mean * factor, out=target)
        return y, _Grouped(x, means, inverses)

    def backward(
        self, params: Params, saved: _Grouped, dy: Array, scope: Scope, need_input: bool = True
    ) -> Array | None:
        """Both parts at once: they are made of the same sums."""
        scope.check()
        dscale, dbias = self._sums(saved, dy)
        scope.gradient("scale")[...] = dscale.sum(axis=0)
        scope.gradient("bias")[...] = dbias.sum(axis=0)
        return self._input_gradient(params, saved, dy, dscale, dbias, scope) if need_input else None

    def backward_input(self, params: Params, saved: _Grouped, dy: Array, scope: Scope) -> Array:
        """dx = (dn - mean(dn) - n mean(n dn)) / sqrt(variance + eps), means over the group.

        n is the normalised x, dn = scale dy.
        """
        return self._input_gradient(params, saved, dy, *self._sums(saved, dy), scope)

    def backward_params(self, params: Params, saved: _Grouped, dy: Array, scope: Scope) -> None:
        """dscale = sum of dy n, dbias = sum of dy, over samples and pixels."""
        dscale, dbias = self._sums(saved, dy)
        scope.gradient("scale")[...] = dscale.sum(axis=0)
        scope.gradient("bias")[...] = dbias.sum(axis=0)

    def _sums(self, saved: _Grouped, dy: Array) -> tuple[Array, Array]:
        """Return each sample's share of dscale and dbias, (N, C) float64."""
        both = [norm.sums(x, gradient) for x, gradient in zip(_pixels(saved.x), _pixels(dy), strict=True)]
        dbias, products = (np.array(sums) for sums in zip(*both, strict=True))
        return (products - saved.mean * dbias) * saved.inverse, dbias

    def _input_gradient(
        self, params: Params, saved: _Grouped, dy: Array, dscale: Array, dbias: Array, scope: Scope
    ) -> Array:
        samples, gradients = _pixels(saved.x), _pixels(dy)
        dx = scope.empty("dx", dy.shape, dy.dtype)
        scratch = _scratch("scratch_of_dx", samples[0], scope)
        scale, pixels = params["scale"], samples.shape[1]
        factor = scale * saved.inverse
        of_x = -np.square(saved.inverse) * self._over_group(scale * dscale) / pixels
        offset = -saved.inverse * self._over_group(scale * dbias) / pixels - of_x * saved.mean
        for sample, gradient, target, *coefficients in zip(
            samples, gradients, _pixels(dx), of_x, factor, offset, strict=True
        ):
            norm.combination(sample, gradient, *coefficients, out=target, scratch=scratch)
        return dx

    def _over_group(self, values: Array) -> Array:
        """Return for each channel (..., C) the mean over its group."""
        shape = (*values.shape[:-1], self.groups, values.shape[-1] // self.groups)
        mean = values.reshape(shape).mean(axis=-1)
        return np.repeat(mean, shape[-1], axis=-1)


class _RowNormalized(NamedTuple):
    """What layer normalisation saves: n, and for each row the mean and 1 / sqrt(variance + eps)."""

    n: Array
    mean: Array
    inverse: Array


@register_layer("layer_norm")
@dataclass(frozen=True)
class LayerNorm(Layer):
    """y = scale n + bias, n = (x - mean) / sqrt(variance + eps), mean and variance over the last axis of x.

    Ba et al. 2016 (arXiv:1607.06450). Each pixel is normalised by itself, over its channels; to normalise over a whole
    image, put it between ``Flatten`` and ``Reshape``, or take ``GroupNorm(1)``, whose scale and bias are the channels'.
    ``scale`` and ``bias`` are (C,) and begin as ones and zeros.

    Args:
        eps: above 0.
    """

    _: KW_ONLY
    eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_positive(self, "eps", self.eps)

    def output_shape(self, input_shape: Shape) -> Shape:
        """Unchanged."""
        return _require_channels(self, input_shape)

    def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """Scale one, bias zero."""
        return _scale_and_bias(input_shape)

    def activations(self, input_shape: Shape) -> int:
        """y and n."""
        return 2 * prod(input_shape)

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _RowNormalized]:
        """The formula above."""
        rows = _rows(x)
        n = scope.empty("n", rows.shape, x.dtype)
        mean, inverse = (scope.empty(name, (len(rows),), x.dtype) for name in ("mean", "inverse"))
        norm.row_norm(rows, self.eps, out=n, mean=mean, inverse=inverse)
        y = scope.empty("y", x.shape, x.dtype)
        norm.affine(n, params["scale"], params["bias"], out=_rows(y))
        return y, _RowNormalized(n, mean, inverse)

    def backward_input(self, params: Params, saved: _RowNormalized, dy: Array, scope: Scope) -> Array:
        """dx = (dn - mean(dn) - n mean(n dn)) / sqrt(variance + eps), dn = scale dy."""
        dx = scope.empty("dx", dy.shape, dy.dtype)
        dn = norm.scaled(_rows(dy), params["scale"], out=_rows(dx))
        scratch = scope.empty("scratch_of_dx", norm.few_rows(dn), dy.dtype)
        norm.row_norm_backward(saved.n, dn, saved.inverse, out=dn, scratch=scratch)
        return dx

    def backward_params(self, params: Params, saved: _RowNormalized, dy: Array, scope: Scope) -> None:
        """dscale = sum of dy n, dbias = sum of dy, over rows."""
        scope.gradient("bias")[...], scope.gradient("scale")[...] = norm.sums(saved.n, _rows(dy))


def _scale_and_bias(input_shape: Shape) -> Mapping[str, Parameter]:
    return {"scale": Parameter(input_shape[-1:], "ones"), "bias": Parameter(input_shape[-1:], "zeros")}


def _require_channels(layer: Layer, input_shape: Shape) -> Shape:
    if not input_shape:
        raise ValueError(f"{layer.kind} needs an input of shape (..., channels), got {input_shape}")
    return input_shape


def _check_positive(layer: Layer, argument: str, value: float) -> None:
    """Raise ValueError, naming the argument, unless ``value`` is above 0."""
    if not value > 0:
        raise ValueError(f"{layer.kind}: {argument} must be above 0, got {value}")


def _rows(x: Array) -> Array:
    """Return x (..., C) as a view (R, C)."""
    return x.reshape(-1, x.shape[-1])


def _pixels(x: Array) -> Array:
    """Return x (N, ..., C) as a view (N, P, C)."""
    return x.reshape(len(x), -1, x.shape[-1])


def _scratch(name: str, rows: Array, scope: Scope) -> Array:
    return scope.empty(name, (norm.block_size(rows),), rows.dtype)
