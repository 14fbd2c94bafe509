"""What the translations share: a node as plain values, running a layer alone, and layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper

from asynctrain import nn
from asynctrain.arena import Arena, Array, Shape
from asynctrain.nn.scope import Scope, Workspace

Pair = tuple[int, int]
Outputs = tuple[Array, ...]
Run = Callable[..., Outputs]  # takes the node's inputs in their order, None for those left out


class UnsupportedError(Exception):
    """The node asks for something that asynctrain does not offer; the message says what."""


@dataclass(frozen=True)
class Node:
    """A node, as it is known before any data comes.

    shapes, dtypes: of the inputs in their order, None for an input that is left out. outputs: how many there are.
    opset: the version of the operators.
    """

    operator: str
    attributes: Mapping[str, Any]
    shapes: Sequence[Shape | None]
    dtypes: Sequence[np.dtype[Any] | None]
    outputs: int
    opset: int

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Node:
        """Return the only node of a model; raises UnsupportedError where there are several."""
        if len(model.graph.node) != 1:
            raise UnsupportedError("several nodes: a graph, or a function written out in other operators")
        (node,) = model.graph.node
        given = {value.name: value.type for value in model.graph.input}
        if not all(kind.HasField("tensor_type") for kind in given.values()):
            raise UnsupportedError("inputs that are not arrays")
        types = [given[name].tensor_type if name else None for name in node.input]
        return cls(
            node.op_type,
            {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute},
            [tuple(length.dim_value for length in kind.shape.dim) if kind else None for kind in types],
            [helper.tensor_dtype_to_np_dtype(kind.elem_type) if kind else None for kind in types],
            len(node.output),
            next((opset.version for opset in model.opset_import if opset.domain == node.domain), 1),
        )

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute; text as str."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def has(self, index: int) -> bool:
        """Tell whether the input ``index`` is given."""
        return index < len(self.shapes) and self.shapes[index] is not None

    def shape(self, index: int) -> Shape:
        """Return the shape of the input ``index``, which is given."""
        shape = self.shapes[index]
        assert shape is not None
        return shape

    @property
    def image(self) -> Pair:
        """Height and width of the first input, (N, C, H, W) or (N, C, W)."""
        return plane(self.shape(0)[2:])

    def pair(self, name: str, default: int) -> Pair:
        """Return an attribute with one number for each axis of the image; ``default`` for what it leaves out."""
        return plane(self.get(name, ()), default)


def plane(numbers: Sequence[int], missing: int = 1) -> Pair:
    """Return what is told for the axes of an image as two numbers; raises UnsupportedError where it has more axes."""
    if len(numbers) > 2:
        raise UnsupportedError("three-dimensional images")
    height, width = [*[missing] * (2 - len(numbers)), *numbers]
    return height, width


def run_layer(layer: nn.Layer, x: Array, given: Mapping[str, Array] | None = None) -> Array:
    """Return y as the model that is this layer alone predicts it; its parameters and state are ``given`` by name."""
    model = nn.Model([layer], x.shape[1:])
    state = filled(model.state_layout.empty(), given or {})
    params = filled(model.layout(x.dtype).empty(), given or {})
    y, _ = model.forward(params, np.ascontiguousarray(x), Scope(Workspace(), train=False, state=state))
    return checked(y, model, x)


def filled(arena: Arena, given: Mapping[str, Array]) -> Arena:
    """Return the arena with the values that are given by their local names, and are of its shapes."""
    for name, array in arena.items():
        value = given[name.rpartition("/")[2]]
        assert array.shape == value.shape, f"{name} has the shape {array.shape}, given is {value.shape}"
        array[...] = value
    return arena


def checked(y: Array, model: nn.Model, x: Array) -> Array:
    """Return y, if its shape is the one that the model announced, and its dtype that of x."""
    assert y.shape == (len(x), *model.output_shape), f"y has the shape {y.shape}, announced was {model.output_shape}"
    assert y.dtype == x.dtype, f"y is {y.dtype} for x of {x.dtype}"
    return y


def along(layer: nn.Layer, x: Array, axis: int) -> Array:
    """Return y of a layer for vectors, x being vectors along ``axis``, and so y."""
    vectors = np.moveaxis(x, axis, -1)
    y = run_layer(layer, vectors.reshape(-1, vectors.shape[-1]))
    return np.moveaxis(y.reshape(*vectors.shape[:-1], -1), -1, axis)


def channels_last(x: Array) -> Array:
    """(N, C, H, W) -> (N, H, W, C); images of one dimension, (N, C, W), get the height 1."""
    return np.ascontiguousarray(np.moveaxis(x if x.ndim == 4 else x[:, :, np.newaxis], 1, -1))


def channels_first(y: Array, like: Array) -> Array:
    """(N, H, W, C) -> (N, C, H, W), or (N, C, W) where ``like`` has three axes."""
    y = np.moveaxis(y, -1, 1)
    return y if like.ndim == 4 else y[:, :, 0]
