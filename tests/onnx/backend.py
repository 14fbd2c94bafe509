"""An ONNX backend over asynctrain's layers, losses and optimizers, for models of a single node.

The translations only change layout, attributes and dtypes: channels first becomes channels last and back, an initial
value becomes a parameter, ``pads`` become ``padding``. Each number of an answer comes out of asynctrain's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.base import Backend, BackendRep

from asynctrain import nn
from asynctrain.arena import Array
from tests.onnx import learning, vectors, windows
from tests.onnx.nodes import Node, Outputs, Run, UnsupportedError

FLOATS = (np.dtype(np.float32), np.dtype(np.float64))

TRANSLATIONS: Mapping[str, Callable[[Node], Run]] = {
    "Adagrad": learning.optimizer(learning.adagrad, "sum_of_squares"),
    "Adam": learning.optimizer(learning.adam, "mu", "nu"),
    "Add": vectors.add,
    "AveragePool": windows.average_pool,
    "BatchNormalization": vectors.batch_norm,
    "Concat": vectors.concat,
    "Conv": windows.conv,
    "ConvTranspose": windows.conv_transpose,
    "Dropout": vectors.dropout,
    "Elu": vectors.elementwise(lambda node: nn.ELU(node.get("alpha", 1.0))),
    "Flatten": vectors.flatten,
    "Gelu": vectors.elementwise(lambda node: nn.GELU(approximate=node.get("approximate", "none"))),
    "Gemm": vectors.gemm,
    "GlobalAveragePool": windows.global_pool(nn.GlobalAveragePool()),
    "GlobalMaxPool": windows.global_pool(nn.GlobalMaxPool()),
    "GroupNormalization": vectors.group_norm,
    "InstanceNormalization": vectors.group_norm,
    "LayerNormalization": vectors.layer_norm,
    "LeakyRelu": vectors.elementwise(lambda node: nn.LeakyReLU(node.get("alpha", 0.01))),
    "LogSoftmax": vectors.rowwise(nn.LogSoftmax()),
    "MatMul": vectors.matmul,
    "MaxPool": windows.max_pool,
    "Momentum": learning.optimizer(learning.momentum, "trace"),
    "NegativeLogLikelihoodLoss": learning.negative_log_likelihood,
    "Relu": vectors.elementwise(lambda node: nn.ReLU()),
    "Reshape": vectors.reshape,
    "Sigmoid": vectors.elementwise(lambda node: nn.Sigmoid()),
    "Softmax": vectors.rowwise(nn.Softmax()),
    "SoftmaxCrossEntropyLoss": learning.softmax_cross_entropy,
    "Sum": vectors.add,
    "Swish": vectors.elementwise(vectors.silu),
    "Tanh": vectors.elementwise(lambda node: nn.Tanh()),
}


class AsynctrainBackend(Backend):
    """Runs models of a single node, in float32 or float64, whose operator has a translation."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> BackendRep:
        """Return what runs ``model``; raises UnsupportedError where asynctrain does not offer what it asks for."""
        super().prepare(model, device, **kwargs)
        node = Node.of(model)
        if node.operator not in TRANSLATIONS:
            raise UnsupportedError("no layer, loss or optimizer for the operator")
        if node.dtypes[0] not in FLOATS:
            raise UnsupportedError("neither float32 nor float64")
        return _Prepared(model, TRANSLATIONS[node.operator](node))


class _Prepared(BackendRep):
    """A model with its translation."""

    def __init__(self, model: onnx.ModelProto, run: Run) -> None:
        self._constants = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
        self._given = [value.name for value in model.graph.input if value.name not in self._constants]
        self._names = list(model.graph.node[0].input)
        self._run = run

    def run(self, inputs: Sequence[Array], **kwargs: Any) -> Outputs:
        """Return the node's outputs for the model's inputs."""
        values = self._constants | dict(zip(self._given, inputs, strict=True))
        return self._run(*(values[name] if name else None for name in self._names))
