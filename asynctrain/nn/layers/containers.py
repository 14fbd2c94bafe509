"""Layers made of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from math import prod
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.nn.layers.base import Layer, Parameter, Placed, register_layer, times
from asynctrain.nn.layers.fusion import NamedLayer, fused
from asynctrain.nn.scope import Scope
from asynctrain.types import Params


class Within(Mapping[str, Any]):
    """The entries of a flat mapping below one name, under their local names: ``conv1/weight`` as ``weight``."""

    __slots__ = ("_entries", "_prefix")

    def __init__(self, entries: Mapping[str, Any], name: str) -> None:
        if isinstance(entries, Within):
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


class Container(Layer):
    """What layers made of layers have in common; their parameters are their children's, as ``conv1/weight``."""

    @property
    def children(self) -> Mapping[str, Layer]:
        """The layers by name, in the order of the forward pass."""
        raise NotImplementedError

    @cached_property
    def has_parameters(self) -> bool:  # asked at each pass, hence cached
        """Whether any of the layers has."""
        return any(layer.has_parameters for layer in self.children.values())

    def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """Those of all leaf layers, by their paths."""
        return {
            f"{placed.path}/{name}": parameter
            for placed in self.walk(input_shape)
            for name, parameter in placed.layer.parameters(placed.input_shape).items()
        }

    def backward_input(self, params: Params, saved: Any, dy: Array, scope: Scope) -> Array:
        """Not apart from the weight gradients: see ``backward``."""
        raise NotImplementedError(f"{self.kind} goes backward as a whole")

    def _require_layers(self, argument: str) -> None:
        """Make the argument a tuple; raises TypeError where it holds anything but layers."""
        layers = getattr(self, argument)
        if isinstance(layers, Layer) or not isinstance(layers, Sequence):
            raise TypeError(f"{self.kind}: {argument} must be a sequence of layers, got {layers!r}")
        for layer in layers:
            if not isinstance(layer, Layer):
                raise TypeError(f"{self.kind}: {argument} must be layers, such as Dense(10), got {layer!r}")
        object.__setattr__(self, argument, tuple(layers))


def _named(layers: Sequence[Layer]) -> Mapping[str, Layer]:
    """Return the layers by kind and count: ``conv1``, ``relu1``, ``conv2``."""
    counts: dict[str, int] = {}
    named = {}
    for layer in layers:
        stem = layer.kind.removesuffix("2d")
        counts[stem] = counts.get(stem, 0) + 1
        named[f"{stem}{counts[stem]}"] = layer
    return named


def _output_shape(name: str, layer: Layer, input_shape: Shape) -> Shape:
    """Return the child's output shape; raises ValueError, told with its name, where the input does not fit."""
    try:
        return layer.output_shape(input_shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@register_layer("sequential")
@dataclass(frozen=True)
class Sequential(Container):
    """One layer after the other; nests freely.

    Its children are named by kind and count (``conv1``, ``relu1``, ``conv2``, ...). Of no layers at all, it gives its
    input back as it is: the shortcut of a block.

    Args:
        layers: from input to output.
    """

    layers: Sequence[Layer]

    def __post_init__(self) -> None:
        self._require_layers("layers")

    @cached_property
    def children(self) -> Mapping[str, Layer]:
        """The layers by name, in their order."""
        return _named(self.layers)

    @property
    def leaves_output(self) -> bool:  # type: ignore[override]  # of the last layer
        """Whether the last layer does."""
        return bool(self.layers) and self.layers[-1].leaves_output

    def walk(self, input_shape: Shape, path: str = "") -> Iterator[Placed]:
        """Yield the leaf layers of all children; an input that does not fit is told with the child's name."""
        for name, layer in self.children.items():
            output_shape = _output_shape(name, layer, input_shape)
            yield from layer.walk(input_shape, f"{path}/{name}" if path else name)
            input_shape = output_shape

    def output_shape(self, input_shape: Shape) -> Shape:
        """The output shape of the last layer."""
        for name, layer in self.children.items():
            input_shape = _output_shape(name, layer, input_shape)
        return input_shape

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, list[_Done]]:
        """Each layer in turn, the pass checked before each."""
        done = []
        spare = False
        for name, layer in self._steps(x.shape[1:]):
            child = scope.child(name)
            child.check()
            child.spare = spare
            x, saved = layer.forward(Within(params, name), x, child)
            spare = layer.leaves_output
            done.append(_Done(name, layer, saved))
        return x, done

    def backward(
        self, params: Params, saved: list[_Done], dy: Array, scope: Scope, need_input: bool = True
    ) -> Array | None:
        """Each layer in reverse, as far down as there is anything to train or ``need_input`` demands.

        What was saved is let go of layer by layer, so that the pass goes on in its memory.
        """
        for needed in reversed(list(_needs_input(saved, need_input))):
            name, layer, kept = saved.pop()
            child = scope.child(name)
            child.spare = scope.spare
            dx = layer.backward(Within(params, name), kept, dy, child, needed)
            if dx is None:
                return None
            scope.spare = _is_spare(dx, dy, layer, child)
            dy = dx
        return dy

    def _steps(self, input_shape: Shape) -> Sequence[NamedLayer]:
        """Return the layers by name as they are computed, some of them as one."""
        if input_shape not in self._known_steps:
            self._known_steps[input_shape] = tuple(fused(self.children, input_shape))
        return self._known_steps[input_shape]

    @cached_property
    def _known_steps(self) -> dict[Shape, Sequence[NamedLayer]]:
        return {}


class _Done(NamedTuple):
    """A layer that a forward pass has been through, and what it saved."""

    name: str
    layer: Layer
    saved: Any


def _needs_input(done: Sequence[_Done], need_input: bool) -> Iterator[bool]:
    """Yield for each layer whether somebody wants its input gradient: a caller, or a layer to train before it."""
    for step in done:
        yield need_input
        need_input = need_input or step.layer.has_parameters


def _is_spare(dx: Array, dy: Array, layer: Layer, scope: Scope) -> bool:
    """Return whether nobody needs dx, which the layer returned for dy, but the layer before it.

    An array of its own is nobody else's. What is in dy's memory may be dy, and so that of others, or of a job to come.
    """
    if isinstance(layer, Container):
        return scope.spare
    return not np.may_share_memory(dx, dy) or (scope.spare and not layer.has_parameters)


class _Join(Layer):
    """What makes one array of the branches' outputs; a leaf at the end of their container, without parameters."""

    def output_shape(self, input_shape: Shape) -> Shape:
        """Unchanged: the input counts as joined."""
        return input_shape

    def joined_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the shape of y for branches' outputs of these shapes; raises ValueError where they do not fit."""
        raise NotImplementedError

    def join(self, parts: Sequence[Array], scope: Scope) -> Array:
        """Return y for the branches' outputs."""
        raise NotImplementedError

    def split(self, dy: Array, widths: Sequence[int], scope: Scope) -> Sequence[Array]:
        """Return each branch's gradient for dy; ``widths`` are the lengths of the branches' last axes."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Add(_Join):
    """y = sum_b x_b, the outputs of ``terms`` branches; dx_b = dy."""

    kind: ClassVar[str] = "add"

    terms: int

    def flops(self, input_shape: Shape) -> int:
        """One addition for each element and term but the first."""
        return (self.terms - 1) * prod(input_shape)

    def joined_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """(H, W, C), (H, W, C) -> (H, W, C)."""
        if len(set(shapes.values())) > 1:
            raise ValueError(f"outputs that are added must have one shape, got {_told(shapes)}")
        return next(iter(shapes.values()))

    def join(self, parts: Sequence[Array], scope: Scope) -> Array:
        """y = sum_b x_b."""
        return _sum(parts, "y", scope)

    def split(self, dy: Array, widths: Sequence[int], scope: Scope) -> Sequence[Array]:
        """dx_b = dy."""
        return [dy] * len(widths)


@dataclass(frozen=True)
class _Concat(_Join):
    """y = [x_1, x_2, ...] along the last axis; dx_b is its part of dy."""

    kind: ClassVar[str] = "concat"

    def flops(self, input_shape: Shape) -> int:
        """None: it only copies."""
        return 0

    def joined_shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """(H, W, C), (H, W, D) -> (H, W, C + D)."""
        if len({shape[:-1] for shape in shapes.values()}) > 1:
            raise ValueError(f"outputs that are concatenated may differ in the last axis only, got {_told(shapes)}")
        first = next(iter(shapes.values()))
        return (*first[:-1], sum(shape[-1] for shape in shapes.values()))

    def join(self, parts: Sequence[Array], scope: Scope) -> Array:
        """The parts side by side."""
        shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
        return np.concatenate(parts, axis=-1, out=scope.empty("y", shape, parts[0].dtype))

    def split(self, dy: Array, widths: Sequence[int], scope: Scope) -> Sequence[Array]:
        """Each branch's part of dy, copied, as kernels take what is contiguous."""
        parts, end = [], 0
        for index, width in enumerate(widths):
            part = scope.empty(f"dx{index}", (*dy.shape[:-1], width), dy.dtype)
            np.copyto(part, dy[..., end : end + width])
            parts.append(part)
            end += width
        return parts


def _told(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(f"{times(shape)} from {name}" for name, shape in shapes.items())


def _sum(parts: Sequence[Array], name: str, scope: Scope) -> Array:
    """Return the parts added up from the first to the last, over the first or in the scope's buffer ``name``."""
    if len(parts) == 1:
        return parts[0]
    total = np.add(parts[0], parts[1], out=scope.over(name, parts[0]))
    for part in parts[2:]:
        np.add(total, part, out=total)
    return total


class _Joined(NamedTuple):
    """What branches save: each one's own, and the length of its output's last axis."""

    saved: list[Any]
    widths: list[int]


class _Branches(Container):
    """Layers that all take the same input, and a join of what they give, whose path is its kind."""

    @property
    def _join(self) -> _Join:
        raise NotImplementedError

    @property
    def leaves_output(self) -> bool:  # type: ignore[override]
        """Whether y is not just that of a single branch."""
        return len(self.children) > 1

    def output_shape(self, input_shape: Shape) -> Shape:
        """The shape of the branches' outputs, joined."""
        shapes = {name: _output_shape(name, layer, input_shape) for name, layer in self.children.items()}
        try:
            return self._join.joined_shape(shapes)
        except ValueError as error:
            raise ValueError(f"{self.kind}: {error}") from None

    def walk(self, input_shape: Shape, path: str = "") -> Iterator[Placed]:
        """Yield the leaf layers of each branch, then the join."""
        prefix = f"{path}/" if path else ""
        for name, layer in self.children.items():
            yield from layer.walk(input_shape, prefix + name)
        joined = self.output_shape(input_shape)
        yield Placed(prefix + self._join.kind, self._join, joined, joined)

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, _Joined]:
        """Each branch on the same x, then the join; the pass is checked before each."""
        parts, saved = [], []
        for name, layer in self.children.items():
            child = scope.child(name)
            child.check()
            child.spare = False  # the others take it too
            part, kept = layer.forward(Within(params, name), x, child)
            parts.append(part)
            saved.append(kept)
        joint = scope.child(self._join.kind)
        joint.check()
        joint.spare = next(iter(self.children.values())).leaves_output
        return self._join.join(parts, joint), _Joined(saved, [part.shape[-1] for part in parts])

    def backward(
        self, params: Params, saved: _Joined, dy: Array, scope: Scope, need_input: bool = True
    ) -> Array | None:
        """Each branch with its share of dy; dx is the sum of theirs, from the first branch to the last."""
        scope.check()
        shares = self._join.split(dy, saved.widths, scope.child(self._join.kind))
        gradients, spare = [], []
        for (name, layer), kept, share in zip(self.children.items(), saved.saved, shares, strict=True):
            child = scope.child(name)
            child.spare = False
            dx = layer.backward(Within(params, name), kept, share, child, need_input)
            if dx is not None:
                gradients.append(dx)
                spare.append(_is_spare(dx, share, layer, child))
        if not need_input:
            return None
        scope.spare = spare[0]
        dx = _sum(gradients, "dx", scope)
        scope.spare = scope.spare or len(gradients) > 1
        return dx


@register_layer("parallel")
@dataclass(frozen=True)
class Parallel(_Branches):
    """y = [f_1(x), f_2(x), ...] along the last axis, or their sum; nests freely.

    Its children are named by kind and count, as in ``Sequential``. A branch of several layers is a ``Sequential``, one
    that hands x on as it is an empty one: ``Parallel([Sequential([]), block])`` is the connection of a DenseNet (Huang
    et al. 2017, arXiv:1608.06993).

    Args:
        branches: at least one.
        join: ``"concat"``: outputs that differ in their last axis only, side by side; ``"add"``: outputs of one shape.
    """

    branches: Sequence[Layer]
    _: KW_ONLY
    join: Literal["concat", "add"] = "concat"

    def __post_init__(self) -> None:
        self._require_layers("branches")
        if not self.branches:
            raise ValueError("parallel: branches must be at least one layer, got none")
        if self.join not in ("concat", "add"):
            raise ValueError(f"parallel: join must be 'concat' or 'add', got {self.join!r}")

    @cached_property
    def children(self) -> Mapping[str, Layer]:
        """The branches by name, in their order."""
        return _named(self.branches)

    @cached_property
    def _join(self) -> _Join:
        return _Concat() if self.join == "concat" else _Add(len(self.branches))


@register_layer("residual")
@dataclass(frozen=True)
class Residual(_Branches):
    """y = f(x) + g(x), f being the layers and g the projection (He et al. 2016, arXiv:1512.03385); nests freely.

    Its children are ``main``, which is f, and ``shortcut``, which is g. An activation of the sum is a layer after it.

    Args:
        layers: f, from input to output.
        projection: g, a layer or several, where f changes the shape; by default g(x) = x.
    """

    layers: Sequence[Layer]
    projection: Layer | Sequence[Layer] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "projection", _listed(self.projection))
        self._require_layers("layers")
        self._require_layers("projection")

    @cached_property
    def children(self) -> Mapping[str, Layer]:
        """``main`` and ``shortcut``."""
        return {"main": Sequential(self.layers), "shortcut": Sequential(_listed(self.projection))}

    @cached_property
    def _join(self) -> _Join:
        return _Add(terms=2)


def _listed(layers: Layer | Sequence[Layer]) -> Sequence[Layer]:
    return (layers,) if isinstance(layers, Layer) else layers
