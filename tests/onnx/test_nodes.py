"""The ONNX project's own tests of single operators, unchanged, through the adapter beside this file.

Each test brings a model, inputs, expected outputs and tolerances; here they are only collected, run and compared, by
the project's own comparison. What is attempted is decided before any data is seen, by the adapter's ``prepare``.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.backend.base import BackendRep
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

from asynctrain.arena import Array
from tests.onnx.backend import TRANSLATIONS, AsynctrainBackend
from tests.onnx.nodes import UnsupportedError

# How many tests of each operator there are to pass, at least: as many as did when this was written.
FLOORS = {
    "Adagrad": 2,
    "Adam": 2,
    "Add": 1,
    "AveragePool": 16,
    "BatchNormalization": 9,
    "Concat": 13,
    "Conv": 26,
    "ConvTranspose": 12,
    "Dropout": 12,
    "Elu": 4,
    "Flatten": 11,
    "Gelu": 4,
    "Gemm": 12,
    "GlobalAveragePool": 2,
    "GlobalMaxPool": 2,
    "GroupNormalization": 2,
    "InstanceNormalization": 3,
    "LayerNormalization": 19,
    "LeakyRelu": 5,
    "LogSoftmax": 10,
    "MatMul": 1,
    "MaxPool": 20,
    "Momentum": 3,
    "NegativeLogLikelihoodLoss": 18,
    "Relu": 2,
    "Reshape": 9,
    "Sigmoid": 3,
    "Softmax": 10,
    "SoftmaxCrossEntropyLoss": 34,
    "Sum": 3,
    "Swish": 1,
    "Tanh": 3,
}

# Of these operators, every test in two dimensions and floating point is attempted.
WHOLE = {
    "Adagrad",
    "Adam",
    "AveragePool",
    "BatchNormalization",
    "Conv",
    "Gemm",
    "GlobalAveragePool",
    "GlobalMaxPool",
    "LogSoftmax",
    "MaxPool",
    "Momentum",
    "NegativeLogLikelihoodLoss",
    "Softmax",
    "SoftmaxCrossEntropyLoss",
}


class Case(NamedTuple):
    """A test of the ONNX project, with what runs its model, or why that is not attempted."""

    test: TestCase
    model: onnx.ModelProto
    prepared: BackendRep | None
    reason: str

    @property
    def operator(self) -> str:
        """Of the model's only node; empty where there are several."""
        names = [node.op_type for node in self.model.graph.node]
        return names[0] if len(names) == 1 else ""


def cases() -> Iterator[Case]:
    """Yield the tests of nodes, and those that were made by converting PyTorch's own tests of its modules."""
    with warnings.catch_warnings():
        # The project computes the data of its node tests on import: some on purpose from what overflows, some by
        # setting an array's shape, which numpy 2.5 deprecates.
        warnings.simplefilter("ignore", RuntimeWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        tests = list(load_model_tests(kind="node"))
    for kind in ("pytorch-converted", "pytorch-operator"):
        tests += sorted(load_model_tests(kind=kind), key=lambda test: test.name)
    for test in tests:
        model = test.model or onnx.load(Path(str(test.model_dir)) / "model.onnx")
        try:
            yield Case(test, model, AsynctrainBackend.prepare(model), "")
        except UnsupportedError as error:
            yield Case(test, model, None, str(error))


CASES = tuple(cases())


def data_sets(case: Case) -> Iterator[tuple[list[Array], list[Array]]]:
    """Yield inputs and expected outputs."""
    if case.test.data_sets is not None:
        for inputs, outputs in case.test.data_sets:
            yield list(map(np.asarray, inputs)), list(map(np.asarray, outputs))
        return
    for folder in sorted(Path(str(case.test.model_dir)).glob("test_data_set*")):
        yield tensors(folder, "input"), tensors(folder, "output")


def tensors(folder: Path, stem: str) -> list[Array]:
    count = len(list(folder.glob(f"{stem}_*.pb")))
    return [numpy_helper.to_array(onnx.load_tensor(folder / f"{stem}_{index}.pb")) for index in range(count)]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.test.name, marks=[pytest.mark.skip(reason=case.reason)] if case.reason else [])
        for case in CASES
    ],
)
def test_a_model_of_one_node_gives_what_the_onnx_project_expects(case: Case) -> None:
    assert case.prepared is not None
    for inputs, expected in data_sets(case):
        outputs = case.prepared.run(inputs)
        Runner.assert_similar_outputs(expected, outputs, rtol=case.test.rtol, atol=case.test.atol)


def test_no_fewer_than_the_floor_are_attempted_of_each_operator() -> None:
    attempted = Counter(case.operator for case in CASES if case.prepared is not None)
    assert attempted.keys() == FLOORS.keys() == TRANSLATIONS.keys()
    assert {name: attempted[name] for name, floor in FLOORS.items() if attempted[name] < floor} == {}
    assert sum(case.test.kind == "node" for case in CASES if case.prepared is not None) >= 120


def test_the_central_operators_are_left_out_only_in_three_dimensions_or_integers() -> None:
    reasons = {case.reason for case in CASES if case.operator in WHOLE and case.prepared is None}
    assert reasons == {"three-dimensional images", "neither float32 nor float64"}
