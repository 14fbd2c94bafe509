"""What all layers have in common: the base class, its JSON and the registry of kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from math import prod
from typing import Any, ClassVar, NamedTuple, TypeVar

from asynctrain.arena import Array, Shape
from asynctrain.nn.scope import Scope
from asynctrain.types import JSON, Params

Pair = tuple[int, int]


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
    implements ``output_shape``, ``forward`` and ``backward_input``, if it has parameters ``parameters`` and
    ``backward_params``, and if it keeps running statistics ``state``, ``statistics`` and ``fold``.
    """

    kind: ClassVar[str] = "layer"  # the registered name

    leaves_output: ClassVar[bool] = False
    """Whether the next layer may write over y: it is an array of its own, and no backward function reads it."""

    def output_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of y for x of ``input_shape``; raises ValueError where such an x does not fit."""
        raise NotImplementedError

    def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """Return the parameters by local name (``weight``, ``bias``)."""
        return {}

    def state(self, input_shape: Shape) -> Mapping[str, Parameter]:
        """Return what prediction uses and no gradient changes, such as running means, by local name; all float64."""
        return {}

    def statistics(self, input_shape: Shape) -> Mapping[str, Shape]:
        """Return the shapes of the sums over samples that training writes to ``scope.statistic(name)``, float64."""
        return {}

    def fold(self, state: Params, statistics: Params, samples: int, out: Params) -> None:
        """Write into ``out`` the state after a step; called once a step for layers that have one.

        Args:
            state: before the step, by local name.
            statistics: added up over the step's microbatches, in their order.
            samples: in the step, at least 1.
            out: where the new state goes; may be ``state`` itself.
        """

    def flops(self, input_shape: Shape) -> int:
        """Return the operations of one sample's forward pass; by default one for each element of y.

        A multiply-add is two operations, a comparison, a root or an exponential is one, a copy is none.
        """
        return prod(self.output_shape(input_shape))

    def activations(self, input_shape: Shape) -> int:
        """Return how many numbers one sample's forward pass leaves for the backward pass; by default those of y.

        y counts unless it is a view of x, and so do copies of x that are kept; scratch does not.
        """
        return prod(self.output_shape(input_shape))

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


def modules_of(architecture: Any) -> set[str]:
    """Return the modules, asynctrain's own aside, that register the layers named in a model's JSON.

    Another process must import them before it can read that JSON.
    """
    modules: set[str] = set()
    if isinstance(architecture, Mapping):
        if (kind := architecture.get("layer")) in _KINDS:
            modules.add(_KINDS[kind].__module__)
        modules.update(*map(modules_of, architecture.values()))
    elif isinstance(architecture, list | tuple):
        modules.update(*map(modules_of, architecture))
    return {module for module in modules if not module.startswith("asynctrain.")}


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


def pair(layer: Layer, argument: str) -> Pair:
    """Return an argument that is one number or two as two."""
    value = getattr(layer, argument)
    if not isinstance(value, tuple):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{layer.kind}: {argument} must be one number or two, got {value}")
    return value


def check_integer(layer: Layer, argument: str, value: object, least: int = 1) -> None:
    """Raise TypeError or ValueError, naming the argument, unless ``value`` is an integer of ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{layer.kind}: {argument} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{layer.kind}: {argument} must be at least {least}, got {value}")


def times(lengths: Sequence[int]) -> str:
    """Return ``3x3`` for (3, 3)."""
    return "x".join(map(str, lengths))
