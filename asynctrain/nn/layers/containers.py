"""Layers made of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from asynctrain.arena import Array, Shape
from asynctrain.nn.layers.base import Layer, Parameter, Placed, register_layer
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
            x, kept = layer.forward(Within(params, name), x, child)
            saved.append(kept)
        return x, saved

    def backward(
        self, params: Params, saved: Sequence[Any], dy: Array, scope: Scope, need_input: bool = True
    ) -> Array | None:
        """Each layer in reverse, as far down as there is anything to train or ``need_input`` demands."""
        steps = list(zip(self.children.items(), saved, self._needs_input(need_input), strict=True))
        for (name, layer), kept, needed in reversed(steps):
            dx = layer.backward(Within(params, name), kept, dy, scope.child(name), needed)
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
