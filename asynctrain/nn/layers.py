"""Layers: pure functions on arrays, described by frozen dataclasses whose fields are their JSON.

A layer holds neither parameters nor state. Images are (N, H, W, C), vectors (N, features); the shapes that layers talk
about leave out N. Forward and derivative stand side by side; the derivative comes in two parts, as the second can run
beside the chain of input gradients:

    backward_input   dx from dy: the chain, one layer after the other
    backward_params  weight gradients from dy: free once the chain has passed

So that parts may overlap, a layer only reads what it is handed (x, saved, dy), writes only buffers of its own, and
keeps those of its two backward parts apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, MISSING, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn import initializers
from asynctrain.nn.kernels import activations, conv, dense, pool
from asynctrain.nn.scope import Scope
from asynctrain.types import JSON, Params

Padding = Literal["same", "valid"] | int


class Parameter(NamedTuple):
    """A parameter that a layer wants: its shape, and the name of a function in ``asynctrain.nn.initializers``."""

    shape: Shape
    initializer: str


class Placed(NamedTuple):
    """A leaf layer at its place in a model; shapes without the batch axis."""

    path: str
    layer: Layer
    input_shape: Shape
    output_shape: Shape


@dataclass(frozen=True)
class Layer:
    """The base of all layers.

    A layer of your own is a frozen dataclass with fields that JSON can hold, decorated with ``register_layer``. It
    implements ``output_shape``, ``forward`` and ``backward_input``, and if it has parameters ``parameters`` and
    ``backward_params``.
    """

    kind: ClassVar[str] = "layer"  # the registered name

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of y for x of ``input_shape``; raises ValueError where such an x does not fit."""
        raise NotImplementedError

    def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """Return the parameters by local name (``weight``, ``bias``)."""
        return {}

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Any]:
        """Return y, and whatever the backward functions want saved."""
        raise NotImplementedError

    def backward_input(self, params: Params, saved: Any, dy: Array, scope: Scope) -> Array:
        """Return dx, the gradient with respect to x, for dy with respect to y."""
        raise NotImplementedError

    def backward_params(self, params: Params, saved: Any, dy: Array, scope: Scope) -> None:
        """Write the gradient of each parameter, summed over the batch, into ``scope.gradient(name)``."""

    def backward(self, params: Params, saved: Any, dy: Array, scope: Scope, need_input: bool = True) -> Array | None:
        """Emit the job of the weight gradients, if there are any, and return dx, or None if it is not needed."""
        if self.has_parameters:

            def job() -> None:
                scope.check()
                self.backward_params(params, saved, dy, scope)

            scope.emit(job)
        if not need_input:
            return None
        scope.check()
        return self.backward_input(params, saved, dy, scope)

    @property
    def has_parameters(self) -> bool:
        """Whether there is anything to train."""
        return type(self).backward_params is not Layer.backward_params

    def walk(self, input_shape: Shape, path: str = "") -> Iterator[Placed]:
        """Yield the leaf layers in the order of the forward pass."""
        yield Placed(path, self, input_shape, self.output_shape(input_shape))

    def to_json(self) -> JSON:
        """Return the layer as JSON values; ``layer_from_json`` reads them."""
        return {"layer": self.kind} | {field.name: _to_json(getattr(self, field.name)) for field in fields(self)}


_KINDS: dict[str, type[Layer]] = {}

L = TypeVar("L", bound=Layer)


def register_layer(kind: str) -> Callable[[type[L]], type[L]]:
    """Return a class decorator that makes a layer known under the name ``kind``, by which JSON refers to it.

    Raises:
        ValueError: the name belongs to another class already.
    """

    def register(cls: type[L]) -> type[L]:
        if kind in _KINDS:
            raise ValueError(f"kind must be a name that no other layer has, got {kind!r}, which is {_KINDS[kind]}")
        cls.kind = kind
        _KINDS[kind] = cls
        return cls

    return register


def layer_from_json(value: JSON) -> Layer:
    """Return the layer that ``Layer.to_json`` described.

    Raises:
        ValueError: the kind is not registered in this process, or its arguments do not fit.
    """
    arguments = {name: _from_json(argument) for name, argument in value.items() if name != "layer"}
    kind = value.get("layer")
    if kind not in _KINDS:
        raise ValueError(f"layer must be one of {', '.join(sorted(_KINDS))} or be registered, got {kind!r}")
    known = fields(_KINDS[kind])
    missing = [field.name for field in known if field.default is MISSING and field.name not in arguments]
    foreign = arguments.keys() - {field.name for field in known}
    if missing or foreign:
        permitted = ", ".join(field.name for field in known) or "none"
        raise ValueError(f"{kind} takes the arguments {permitted}, got {', '.join(arguments) or 'none'}")
    return _KINDS[kind](**arguments)


def _to_json(value: Any) -> Any:
    if isinstance(value, Layer):
        return value.to_json()
    if isinstance(value, tuple):
        return [_to_json(item) for item in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping) and "layer" in value:
        return layer_from_json(value)
    if isinstance(value, list | tuple):
        return tuple(_from_json(item) for item in value)
    return value


@register_layer("dense")
@dataclass(frozen=True)
class Dense(Layer):
    """y = x W + b; x (N, I), W ``weight`` (I, O), b ``bias`` (O,).

    Args:
        units: O, at least 1.
        initializer: of the weight.
    """

    units: int
    _: KW_ONLY
    initializer: str = "he_normal"

    def __post_init__(self) -> None:
        _check_integer(self, "units", self.units)
        initializers.get(self.initializer)

    def output_shape(self, input_shape: Shape) -> Shape:
        """(I,) -> (O,)."""
        if len(input_shape) != 1:
            raise ValueError(f"dense needs an input of shape (features,), as Flatten gives, got {input_shape}")
        return (self.units,)

    def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """W from the initializer, b zero."""
        return {
            "weight": Parameter((*input_shape, self.units), self.initializer),
            "bias": Parameter((self.units,), "zeros"),
        }

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array]:
        """y = x W + b."""
        y = scope.empty("y", (len(x), self.units), x.dtype)
        return dense.affine(x, params["weight"], params["bias"], out=y), x

    def backward_input(self, params: Params, saved: Array, dy: Array, scope: Scope) -> Array:
        """dx = dy W^T."""
        dx = scope.empty("dx", saved.shape, dy.dtype)
        return dense.affine_backward_input(params["weight"], dy, out=dx)

    def backward_params(self, params: Params, saved: Array, dy: Array, scope: Scope) -> None:
        """dW = x^T dy, db = sum_n dy_n."""
        dense.affine_backward_params(saved, dy, out_weight=scope.gradient("weight"), out_bias=scope.gradient("bias"))


class _Seen(NamedTuple):
    """What a convolution saves: the padded image, the image's own shape, and where in the former it begins."""

    padded: Array
    shape: Shape
    corner: conv.Pair


@register_layer("conv2d")
@dataclass(frozen=True)
class Conv2D(Layer):
    """y[h, w, f] = b[f] + sum_ijc x[h s + i - top, w t + j - left, c] W[i, j, c, f], x being zero outside the image.

    W is ``weight`` (kh, kw, C, F), b is ``bias`` (F,).

    Args:
        filters: F, at least 1.
        kernel_size: (kh, kw) in pixels, or one number for both.
        stride: (s, t) in pixels, or one number for both.
        padding: ``"same"``: as much as makes the output ceil(H / s) high, the odd pixel at the end; ``"valid"``: none;
            or the pixels at each side.
        initializer: of the weight.
    """

    filters: int
    kernel_size: int | tuple[int, int] = 3
    _: KW_ONLY
    stride: int | tuple[int, int] = 1
    padding: Padding = "same"
    initializer: str = "he_normal"

    def __post_init__(self) -> None:
        _check_integer(self, "filters", self.filters)
        for argument in ("kernel_size", "stride"):
            for number in _pair(self, argument):
                _check_integer(self, argument, number)
        if self.padding not in ("same", "valid"):
            if isinstance(self.padding, str):
                raise ValueError(f"conv2d: padding must be 'same', 'valid' or an integer, got {self.padding!r}")
            _check_integer(self, "padding", self.padding, least=0)
        initializers.get(self.initializer)

    @cached_property
    def _window(self) -> conv.Pair:
        return _pair(self, "kernel_size")

    @cached_property
    def _stride(self) -> conv.Pair:
        return _pair(self, "stride")

    def _margins(self, length: int, axis: int) -> conv.Pair:
        """Return the padding before and after ``length`` pixels along ``axis`` (0 high, 1 wide)."""
        if self.padding == "valid":
            return 0, 0
        if self.padding == "same":
            stride = self._stride[axis]
            total = max(0, (-(-length // stride) - 1) * stride + self._window[axis] - length)
            return total // 2, total - total // 2
        return self.padding, self.padding

    def output_shape(self, input_shape: Shape) -> Shape:
        """(H, W, C) -> ((H + top + bottom - kh) // s + 1, (W + left + right - kw) // t + 1, F)."""
        if len(input_shape) != 3:
            raise ValueError(f"conv2d needs an input of shape (height, width, channels), got {input_shape}")
        padded = [length + sum(self._margins(length, axis)) for axis, length in enumerate(input_shape[:2])]
        if padded[0] < self._window[0] or padded[1] < self._window[1]:
            raise ValueError(
                f"conv2d with kernel_size {_times(self._window)} needs an input of at least that size, padding "
                f"included, got {_times(padded)}"
            )
        height, width = ((padded[axis] - self._window[axis]) // self._stride[axis] + 1 for axis in (0, 1))
        return height, width, self.filters

    def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """W from the initializer, b zero."""
        return {
            "weight": Parameter((*self._window, input_shape[2], self.filters), self.initializer),
            "bias": Parameter((self.filters,), "zeros"),
        }

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Seen]:
        """The formula above, as tiles of matrix products."""
        seen = self._pad(x, scope)
        y = scope.empty("y", (len(x), *self.output_shape(x.shape[1:])), x.dtype)
        columns = self._columns("columns", y.shape, x.shape[3], x.dtype, scope)
        conv.correlate(seen.padded, params["weight"], self._stride, out=y, columns=columns, bias=params["bias"])
        return y, seen

    def backward_input(self, params: Params, saved: _Seen, dy: Array, scope: Scope) -> Array:
        """dx[u, v, c] = sum_hwf dy[h, w, f] W[u + top - h s, v + left - w t, c, f], where W has such an entry."""
        weight = params["weight"]
        kh, kw, C, F = weight.shape
        N, H, W, _ = saved.shape
        dx = scope.empty("dx", saved.shape, dy.dtype)
        return conv.correlate_backward_input(
            weight,
            dy,
            saved.corner,
            self._stride,
            out=dx,
            spread=scope.empty("spread", (N, H + kh - 1, W + kw - 1, F), dy.dtype),
            flipped=scope.empty("flipped", (kh, kw, F, C), dy.dtype),
            columns=self._columns("columns_of_dy", dx.shape, F, dy.dtype, scope),
        )

    def backward_params(self, params: Params, saved: _Seen, dy: Array, scope: Scope) -> None:
        """dW[i, j, c, f] = sum_nhw x[n, h s + i - top, w t + j - left, c] dy[n, h, w, f], db = sum_nhw dy[n, h, w]."""
        gradient = scope.gradient("weight")
        channels = saved.shape[3]
        conv.correlate_backward_params(
            saved.padded,
            dy,
            self._stride,
            out_weight=gradient,
            out_bias=scope.gradient("bias"),
            columns=self._columns("columns", dy.shape, channels, dy.dtype, scope),
            partial=scope.empty("partial", (gradient.size // self.filters, self.filters), dy.dtype),
            ones=scope.empty("ones", (dy.size // self.filters,), dy.dtype),
        )

    def _pad(self, x: Array, scope: Scope) -> _Seen:
        N, H, W, C = x.shape
        (top, bottom), (left, right) = self._margins(H, 0), self._margins(W, 1)
        if not (top or bottom or left or right):
            return _Seen(x, x.shape, (0, 0))
        padded = scope.empty("padded", (N, top + H + bottom, left + W + right, C), x.dtype)
        return _Seen(conv.place(x, (top, left), (1, 1), out=padded), x.shape, (top, left))

    def _columns(self, name: str, output: Shape, channels: int, dtype: np.dtype[Any], scope: Scope) -> Array:
        plan = conv.tiling(output, self._window, channels, dtype.itemsize)
        return scope.empty(name, (plan.scratch,), dtype)


class _Pooled(NamedTuple):
    """What max pooling saves."""

    x: Array
    y: Array


@register_layer("max_pool2d")
@dataclass(frozen=True)
class MaxPool2D(Layer):
    """y[h, w, c] = max_ij x[h s + i, w s + j, c]; dy goes back to the maximum, of equals to the first in row order.

    Args:
        size: of the window in pixels, i and j below it.
        stride: s in pixels; by default the size. Rows and columns that fill no window are left out.
    """

    size: int = 2
    _: KW_ONLY
    stride: int | None = None

    def __post_init__(self) -> None:
        _check_integer(self, "size", self.size)
        if self.stride is not None:
            _check_integer(self, "stride", self.stride)

    @property
    def _step(self) -> int:
        return self.size if self.stride is None else self.stride

    def output_shape(self, input_shape: Shape) -> Shape:
        """(H, W, C) -> ((H - size) // s + 1, (W - size) // s + 1, C)."""
        if len(input_shape) != 3:
            raise ValueError(f"max_pool2d needs an input of shape (height, width, channels), got {input_shape}")
        height, width, channels = input_shape
        if height < self.size or width < self.size:
            raise ValueError(
                f"max_pool2d with size {self.size} needs an input of at least that size, got {_times((height, width))}"
            )
        return (height - self.size) // self._step + 1, (width - self.size) // self._step + 1, channels

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Pooled]:
        """The formula above."""
        y = scope.empty("y", (len(x), *self.output_shape(x.shape[1:])), x.dtype)
        return pool.max_pool(x, self.size, self._step, out=y), _Pooled(x, y)

    def backward_input(self, params: Params, saved: _Pooled, dy: Array, scope: Scope) -> Array:
        """Each dy[h, w, c] goes to where its maximum was; where windows overlap, they add up."""
        return pool.max_pool_backward(
            saved.x,
            saved.y,
            dy,
            self.size,
            self._step,
            out=scope.empty("dx", saved.x.shape, dy.dtype),
            free=scope.empty("free", dy.shape, np.dtype(np.bool_)),
            hit=scope.empty("hit", dy.shape, np.dtype(np.bool_)),
        )


@register_layer("relu")
@dataclass(frozen=True)
class ReLU(Layer):
    """y = max(x, 0), element by element, of any shape; dx = dy [x > 0]."""

    def output_shape(self, input_shape: Shape) -> Shape:
        """Unchanged."""
        return input_shape

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array]:
        """y = max(x, 0)."""
        y = activations.relu(x, out=scope.empty("y", x.shape, x.dtype))
        return y, y

    def backward_input(self, params: Params, saved: Array, dy: Array, scope: Scope) -> Array:
        """dx = dy [y > 0]."""
        return activations.relu_backward(
            saved,
            dy,
            out=scope.empty("dx", dy.shape, dy.dtype),
            positive=scope.empty("positive", dy.shape, np.dtype(np.bool_)),
        )


@register_layer("flatten")
@dataclass(frozen=True)
class Flatten(Layer):
    """(N, H, W, C) -> (N, H W C), or whatever the axes after the first are; nothing is copied."""

    def output_shape(self, input_shape: Shape) -> Shape:
        """(H, W, C) -> (H W C,)."""
        return (int(np.prod(input_shape)),)

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Shape]:
        """A view of x."""
        return x.reshape(len(x), -1), x.shape

    def backward_input(self, params: Params, saved: Shape, dy: Array, scope: Scope) -> Array:
        """A view of dy."""
        return dy.reshape(saved)


@register_layer("dropout")
@dataclass(frozen=True)
class Dropout(Layer):
    """In training y = x m / (1 - rate), m being 0 with probability ``rate``, else 1; otherwise y = x.

    Srivastava et al., JMLR 15 (2014), scaled in training so that nothing is to be done in prediction.

    Args:
        rate: from 0 up to, but not including, 1.
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"dropout: rate must be at least 0 and below 1, got {self.rate}")

    def output_shape(self, input_shape: Shape) -> Shape:
        """Unchanged."""
        return input_shape

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Array | None]:
        """y = x m / (1 - rate) in training, else x itself."""
        if not scope.train or self.rate == 0:
            return x, None
        mask = self._mask(x, scope)
        return np.multiply(x, mask, out=scope.empty("y", x.shape, x.dtype)), mask

    def backward_input(self, params: Params, saved: Array | None, dy: Array, scope: Scope) -> Array:
        """dx = dy m / (1 - rate) in training, else dy itself."""
        if saved is None:
            return dy
        return np.multiply(dy, saved, out=scope.empty("dx", dy.shape, dy.dtype))

    def _mask(self, x: Array, scope: Scope) -> Array:
        drawn = scope.empty("drawn", x.shape, np.dtype(np.float32))  # the same mask, whatever x's dtype
        scope.rng().random(out=drawn, dtype=np.float32)
        kept = np.greater_equal(drawn, np.float32(self.rate), out=scope.empty("kept", x.shape, np.dtype(np.bool_)))
        mask = scope.empty("mask", x.shape, x.dtype)
        np.multiply(kept, x.dtype.type(1 / (1 - self.rate)), out=mask)
        return mask


class _Within(Mapping[str, Any]):
    """The entries of a flat mapping below one name, under their local names: ``conv1/weight`` as ``weight``."""

    __slots__ = ("_entries", "_prefix")

    def __init__(self, entries: Mapping[str, Any], name: str) -> None:
        if isinstance(entries, _Within):
            self._entries: Mapping[str, Any] = entries._entries
            self._prefix: str = f"{entries._prefix}{name}/"
        else:
            self._entries = entries
            self._prefix = f"{name}/"

    def __getitem__(self, name: str) -> Any:
        return self._entries[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._entries if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@register_layer("sequential")
@dataclass(frozen=True)
class Sequential(Layer):
    """One layer after the other; nests freely.

    Its children are named by kind and count (``conv1``, ``relu1``, ``conv2``, ...), and its parameters are theirs, as
    ``conv1/weight``.
    """

    layers: Sequence[Layer]

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"sequential: layers must be layers, such as Dense(10), got {layer!r}")

    @cached_property
    def children(self) -> Mapping[str, Layer]:
        """The layers by name, in their order."""
        counts: dict[str, int] = {}
        named = {}
        for layer in self.layers:
            stem = layer.kind.removesuffix("2d")
            counts[stem] = counts.get(stem, 0) + 1
            named[f"{stem}{counts[stem]}"] = layer
        return named

    @cached_property
    def has_parameters(self) -> bool:  # asked at each pass, hence cached
        """Whether any of the layers has."""
        return any(layer.has_parameters for layer in self.layers)

    def walk(self, input_shape: Shape, path: str = "") -> Iterator[Placed]:
        """Yield the leaf layers of all children; an input that does not fit is told with the child's name."""
        for name, layer in self.children.items():
            child_path = f"{path}/{name}" if path else name
            try:
                output_shape = layer.output_shape(input_shape)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            yield from layer.walk(input_shape, child_path)
            input_shape = output_shape

    def output_shape(self, input_shape: Shape) -> Shape:
        """The output shape of the last layer."""
        for placed in self.walk(input_shape):
            input_shape = placed.output_shape
        return input_shape

    def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """Those of all leaf layers, by their paths."""
        return {
            f"{placed.path}/{name}": parameter
            for placed in self.walk(input_shape)
            for name, parameter in placed.layer.parameters(placed.input_shape).items()
        }

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, list[Any]]:
        """Each layer in turn, the pass checked before each."""
        saved = []
        for name, layer in self.children.items():
            child = scope.child(name)
            child.check()
            x, kept = layer.forward(_Within(params, name), x, child)
            saved.append(kept)
        return x, saved

    def backward(
        self, params: Params, saved: Sequence[Any], dy: Array, scope: Scope, need_input: bool = True
    ) -> Array | None:
        """Each layer in reverse, as far down as there is anything to train or ``need_input`` demands."""
        steps = list(zip(self.children.items(), saved, self._needs_input(need_input), strict=True))
        for (name, layer), kept, needed in reversed(steps):
            dx = layer.backward(_Within(params, name), kept, dy, scope.child(name), needed)
            if dx is None:
                return None
            dy = dx
        return dy

    def _needs_input(self, need_input: bool) -> list[bool]:
        """Return for each child whether somebody wants its input gradient: a caller, or a layer to train before it."""
        needs = []
        for layer in self.layers:
            needs.append(need_input)
            need_input = need_input or layer.has_parameters
        return needs

    def backward_input(self, params: Params, saved: Any, dy: Array, scope: Scope) -> Array:
        """Not apart from the weight gradients: see ``backward``."""
        raise NotImplementedError("sequential goes backward as a whole")


def _pair(layer: Layer, argument: str) -> conv.Pair:
    value = getattr(layer, argument)
    if not isinstance(value, tuple):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{layer.kind}: {argument} must be one number or two, got {value}")
    return value


def _check_integer(layer: Layer, argument: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{layer.kind}: {argument} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{layer.kind}: {argument} must be at least {least}, got {value}")


def _times(lengths: Sequence[int]) -> str:
    return "x".join(map(str, lengths))
