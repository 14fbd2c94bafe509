"""Everything but windows: dense layers, activations, normalisation, dropout, shapes and joins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np

from asynctrain import nn
from asynctrain.arena import Array, Shape
from asynctrain.nn.scope import Scope, Workspace
from tests.onnx.nodes import Node, Outputs, Run, UnsupportedError, along, checked, filled, run_layer

# Dense


def gemm(node: Node) -> Run:
    """``Gemm``, alpha A B + beta C: alpha B is the weight and beta C the bias.

    Where C has a row for each sample, it becomes more weights, for features by which the samples are numbered.
    """

    def run(a: Array, b: Array, c: Array | None = None) -> Outputs:
        x = a.T if node.get("transA", 0) else a
        weight = (b.T if node.get("transB", 0) else b) * a.dtype.type(node.get("alpha", 1.0))
        bias = np.zeros(weight.shape[1], a.dtype) if c is None else c * a.dtype.type(node.get("beta", 1.0))
        if bias.ndim == 2 and len(bias) == len(x):
            weight, x = np.vstack([weight, bias]), np.hstack([x, np.eye(len(x), dtype=a.dtype)])
            bias = np.zeros(weight.shape[1], a.dtype)
        return (dense(x, weight, bias),)

    return run


def matmul(node: Node) -> Run:
    """``MatMul``."""
    if len(node.shape(0)) < 2 or len(node.shape(1)) != 2:
        raise UnsupportedError("a product in which the second factor is not one matrix")
    return lambda x, weight: (dense(x.reshape(-1, len(weight)), weight).reshape(*x.shape[:-1], -1),)


def dense(x: Array, weight: Array, bias: Array | float = 0.0) -> Array:
    """Return x W + b; b is one number or one row."""
    row = np.broadcast_to(np.reshape(bias, -1), weight.shape[1:])
    return run_layer(nn.Dense(weight.shape[1]), x, {"weight": weight, "bias": row})


# Activations


def elementwise(make: Callable[[Node], nn.Layer]) -> Callable[[Node], Run]:
    """Return the translation to a layer that treats each number by itself, whatever its place."""

    def translate(node: Node) -> Run:
        layer = make(node)
        return lambda x: (run_layer(layer, x.reshape(1, -1)).reshape(x.shape),)

    return translate


def silu(node: Node) -> nn.Layer:
    """``Swish``."""
    if node.get("alpha", 1.0) != 1:
        raise UnsupportedError("a SiLU of another slope")
    return nn.SiLU()


def rowwise(layer: nn.Layer) -> Callable[[Node], Run]:
    """Return the translation to a layer along one axis or, before opset 13, along all from that one on, as one."""

    def translate(node: Node) -> Run:
        if node.opset >= 13:
            return lambda x: (along(layer, x, node.get("axis", -1)),)
        rows = prod(node.shape(0)[: node.get("axis", 1)])
        return lambda x: (run_layer(layer, x.reshape(rows, -1)).reshape(x.shape),)

    return translate


# Normalisation


def batch_norm(node: Node) -> Run:
    """``BatchNormalization``; in training mode the running statistics are those after one step."""
    layer = nn.BatchNorm(node.get("momentum", 0.9), eps=node.get("epsilon", 1e-5))

    def run(x: Array, scale: Array, bias: Array, mean: Array, variance: Array) -> Outputs:
        given = {"scale": scale, "bias": bias, "mean": mean, "variance": variance}
        rows = np.ascontiguousarray(np.moveaxis(x, 1, -1))
        if not node.get("training_mode", 0):
            return (np.moveaxis(run_layer(layer, rows, given), -1, 1),)
        y, state = trained(layer, rows, given)
        return (np.moveaxis(y, -1, 1), state["mean"].astype(mean.dtype), state["variance"].astype(variance.dtype))

    return run


def trained(layer: nn.Layer, x: Array, given: Mapping[str, Array]) -> tuple[Array, Mapping[str, Array]]:
    """Return y of a pass of training, and the layer's state after a step of this microbatch alone."""
    model = nn.Model([layer], x.shape[1:])
    params, state = (filled(layout.empty(), given) for layout in (model.layout(x.dtype), model.state_layout))
    statistics = model.statistics_layout.empty()
    y, _ = model.forward(params, x, Scope(Workspace(), train=True, statistics=statistics))
    model.fold(state, statistics, len(x), out=state)
    return checked(y, model, x), {name.rpartition("/")[2]: array for name, array in state.items()}


def group_norm(node: Node) -> Run:
    """``GroupNormalization``, and ``InstanceNormalization``, where each channel is a group."""
    layer = nn.GroupNorm(node.get("num_groups", node.shape(0)[1]), eps=node.get("epsilon", 1e-5))

    def run(x: Array, scale: Array, bias: Array) -> Outputs:
        return (np.moveaxis(run_layer(layer, np.moveaxis(x, 1, -1), {"scale": scale, "bias": bias}), -1, 1),)

    return run


def layer_norm(node: Node) -> Run:
    """``LayerNormalization`` over the axes from ``axis`` on, as one; what it saves are the other two outputs."""
    layer, axis = nn.LayerNorm(eps=node.get("epsilon", 1e-5)), node.get("axis", -1)

    def run(x: Array, scale: Array, bias: Array) -> Outputs:
        rows = x.reshape(prod(x.shape[:axis]), -1)
        given = {"scale": scale.reshape(-1), "bias": bias.reshape(-1)}
        y, saved = layer.forward(given, rows, Scope(Workspace(), train=False))
        shape = (*x.shape[:axis], *(1 for _ in x.shape[axis:]))
        return y.reshape(x.shape), *(kept.reshape(shape).astype(x.dtype) for kept in (saved.mean, saved.inverse))

    return run


# Dropout


class Replay(np.random.Generator):
    """Draws the uniform numbers of numpy's old global generator, with which the ONNX project made its data."""

    def __init__(self, seed: int) -> None:
        super().__init__(np.random.PCG64(0))
        self._old = np.random.RandomState(seed)

    def random(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        """Fill ``out``."""
        out[...] = self._old.uniform(size=out.shape)
        return out


def dropout(node: Node) -> Run:
    """``Dropout``; its mask is where ones come through."""

    def run(x: Array, ratio: Array | None = None, training: Array | None = None) -> Outputs:
        layer = nn.Dropout(float(node.get("ratio", 0.5) if ratio is None else ratio))
        train = training is not None and bool(training)
        scope = Scope(Workspace(), train=train, rng=lambda _: Replay(node.get("seed", 0)))
        y = layer.forward({}, x, scope)[0].copy()  # the mask is made in the same buffer
        mask = layer.forward({}, np.ones_like(x), scope)[0] != 0
        return (y, mask)[: node.outputs]

    return run


# Shapes


def flatten(node: Node) -> Run:
    """``Flatten``; the axes before ``axis`` are the batch."""
    shape, axis = node.shape(0), node.get("axis", 1)
    return lambda x: (run_layer(nn.Flatten(), x.reshape(prod(shape[:axis]), *(shape[axis:] or (1,)))),)


def reshape(node: Node) -> Run:
    """``Reshape``, of one sample."""
    if node.get("allowzero", 0):
        raise UnsupportedError("arrays without elements")

    def run(x: Array, shape: Array) -> Outputs:
        wanted = [length or x.shape[axis] for axis, length in enumerate(shape.tolist())]
        rest = x.size // abs(prod(wanted))
        layer = nn.Reshape(tuple(rest if length == -1 else length for length in wanted))
        return (run_layer(layer, x[np.newaxis])[0],)

    return run


# Joins


@dataclass(frozen=True)
class Part(nn.Layer):
    """y (1, *shape), a part of x (1, features): a branch of one input stands for a node's input of its own."""

    start: int
    shape: Shape

    def output_shape(self, input_shape: Shape) -> Shape:
        """The part's own."""
        return self.shape

    def forward(self, params: Mapping[str, Array], x: Array, scope: Scope) -> tuple[Array, None]:
        """A copy."""
        return x[:, self.start : self.start + prod(self.shape)].reshape(1, *self.shape).copy(), None


def joined(arrays: Sequence[Array], join: Literal["concat", "add"]) -> Array:
    """Return what a Parallel makes of arrays that its branches give."""
    ends = np.cumsum([array.size for array in arrays]).tolist()
    branches = [Part(end - array.size, array.shape) for end, array in zip(ends, arrays, strict=True)]
    side_by_side = np.concatenate([array.reshape(1, -1) for array in arrays], axis=1)
    y: Array = run_layer(nn.Parallel(branches, join=join), side_by_side)[0]
    return y


def concat(node: Node) -> Run:
    """``Concat``."""
    axis = node.get("axis", 1)
    return lambda *arrays: (
        np.moveaxis(joined([np.moveaxis(array, axis, -1) for array in arrays], "concat"), -1, axis),
    )


def add(node: Node) -> Run:
    """``Add`` and ``Sum``."""
    if len(set(node.shapes)) > 1:
        raise UnsupportedError("a sum of arrays of unequal shapes")
    return lambda *arrays: (joined(arrays, "add"),)
