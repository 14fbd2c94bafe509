"""A model: layers bound to the shape of their input, their parameters in one flat namespace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from asynctrain.arena import Arena, Array, Layout, Shape
from asynctrain.nn import initializers
from asynctrain.nn.costs import Costs, LayerCosts
from asynctrain.nn.layers import Layer, Parameter, Sequential, layer_from_json
from asynctrain.nn.layers.base import times
from asynctrain.nn.layers.containers import Within
from asynctrain.nn.scope import Scope
from asynctrain.randomness import Purpose, generator
from asynctrain.types import JSON, Params


class Model:
    """Layers and the shape of one input; holds no parameters, so one model serves any number of passes at once.

        >>> model = Model([Flatten(), Dense(10)], input_shape=(8, 8, 1))
        >>> model
        <Model 8x8x1 -> 10, 2 layers, 650 parameters>

    Args:
        layers: from input to output.
        input_shape: of one sample, (H, W, C) for images.

    Attributes:
        input_shape: of one sample.
        output_shape: of one sample's output, (classes,) for a classifier.
        leaves: the paths of all leaf layers, in the order of the forward pass.
        parameters: what each parameter is, by its name ``path/local name``, in that order.
        layers_with_parameters: the paths of the layers that have parameters, each with its parameters' names.
        state: what each running statistic is, by its name ``path/local name``.

    Raises:
        ValueError: a layer does not fit what comes before it; the message names it.
    """

    def __init__(self, layers: Sequence[Layer] | Sequential, input_shape: Sequence[int]) -> None:
        self.root = layers if isinstance(layers, Sequential) else Sequential(layers)
        self.input_shape: Shape = _checked(input_shape)
        self._placed = tuple(self.root.walk(self.input_shape))
        self.output_shape: Shape = self.root.output_shape(self.input_shape)
        self.leaves: tuple[str, ...] = tuple(placed.path for placed in self._placed)
        self.parameters: Mapping[str, Parameter] = self.root.parameters(self.input_shape)
        self.layers_with_parameters: Mapping[str, tuple[str, ...]] = {
            placed.path: names
            for placed in self._placed
            if (names := tuple(f"{placed.path}/{name}" for name in placed.layer.parameters(placed.input_shape)))
        }

        self.state: Mapping[str, Parameter] = {
            f"{placed.path}/{name}": wanted
            for placed in self._placed
            for name, wanted in placed.layer.state(placed.input_shape).items()
        }
        self.state_layout = Layout({name: wanted.shape for name, wanted in self.state.items()}, np.dtype(np.float64))
        self.statistics_layout = Layout(
            {
                f"{placed.path}/{name}": shape
                for placed in self._placed
                for name, shape in placed.layer.statistics(placed.input_shape).items()
            },
            np.dtype(np.float64),
        )

    def layout(self, dtype: npt.DTypeLike = "float32") -> Layout:
        """Return the layout of an arena that holds the parameters, or their gradients."""
        return Layout({name: parameter.shape for name, parameter in self.parameters.items()}, np.dtype(dtype))

    def init(self, seed: int, dtype: npt.DTypeLike = "float32") -> Arena:
        """Return fresh parameters, each drawn from a stream of its own; the dtype only rounds them."""
        arena = self.layout(dtype).empty()
        for index, (name, parameter) in enumerate(self.parameters.items()):
            draw = initializers.get(parameter.initializer)
            arena[name][...] = draw(parameter.shape, generator(seed, Purpose.INIT, index))
        return arena

    def init_state(self) -> Arena:
        """Return the layers' running statistics, float64, as they are before the first step."""
        arena = self.state_layout.empty()
        for index, (name, wanted) in enumerate(self.state.items()):
            arena[name][...] = initializers.get(wanted.initializer)(wanted.shape, generator(0, Purpose.INIT, index))
        return arena

    def fold(self, state: Params, statistics: Params, samples: int, out: Params) -> None:
        """Write into ``out`` the running statistics after a step.

        Args:
            state: before the step.
            statistics: of the step's microbatches, added up in their order.
            samples: in the step.
            out: of the state's layout; may be ``state`` itself.
        """
        for placed in self._placed:
            if placed.layer.state(placed.input_shape):
                before, sums, after = (Within(arrays, placed.path) for arrays in (state, statistics, out))
                placed.layer.fold(before, sums, samples, after)

    def forward(self, params: Params, x: Array, scope: Scope) -> tuple[Array, Any]:
        """Return the outputs, and what ``backward`` wants saved; both are good until the workspace serves another pass.

        Args:
            params: as ``init`` made them.
            x: (N, *input_shape), C-contiguous, of the parameters' dtype.
            scope: what the pass may use.

        Raises:
            ValueError: x has another shape.
        """
        if x.shape[1:] != self.input_shape:
            raise ValueError(f"x must have shape (N, {', '.join(map(str, self.input_shape))}), got {x.shape}")
        return self.root.forward(params, x, scope)

    def backward(self, params: Params, saved: Any, dy: Array, scope: Scope) -> None:
        """Write the gradient of every parameter into the scope's gradients, for dy with respect to the outputs.

        Args:
            params: the same as in ``forward``.
            saved: what ``forward`` returned, used once.
            dy: in the shape and dtype of the outputs.
            scope: the same as in ``forward``.
        """
        self.root.backward(params, saved, dy, scope, need_input=False)

    def to_json(self) -> JSON:
        """Return the architecture as JSON values."""
        return {"input_shape": list(self.input_shape), "layers": self.root.to_json()["layers"]}

    @classmethod
    def from_json(cls, value: JSON) -> Model:
        """Return the model that ``to_json`` described; raises ValueError where that is none."""
        if not {"input_shape", "layers"} <= value.keys():
            raise ValueError(f"a model's JSON must have input_shape and layers, got {', '.join(value) or 'nothing'}")
        return cls([layer_from_json(layer) for layer in value["layers"]], value["input_shape"])

    def costs(self, microbatch: int = 1, dtype: npt.DTypeLike = "float32") -> Costs:
        """Return what the model costs, worked out from its shapes: nothing is allocated.

        Args:
            microbatch: samples in one pass, for the totals; at least 1.
            dtype: of parameters and activations.
        """
        first = LayerCosts("input", self.input_shape, parameters=0, flops=0, activations=prod(self.input_shape))
        rows = (first, *map(LayerCosts.of, self._placed))
        return Costs(rows, microbatch, np.dtype(dtype).itemsize)

    def summary(self, microbatch: int = 32, dtype: npt.DTypeLike = "float32") -> str:
        """Return ``costs`` as a table: each leaf layer for one sample, their total, and the microbatch's.

        >>> print(Model([Flatten(), Dense(10)], input_shape=(8, 8, 1)).summary())
        layer       output  parameters   FLOPs  activation bytes
        input       8x8x1                                    256
        flatten1    64
        dense1      10             650   1,280                40
        total                      650   1,280               296
        32 samples                      40,960             9,472
        """
        return str(self.costs(microbatch, dtype))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and (self.root, self.input_shape) == (other.root, other.input_shape)

    def __hash__(self) -> int:
        return hash((self.root, self.input_shape))

    def __repr__(self) -> str:
        return (
            f"<Model {times(self.input_shape)} -> {times(self.output_shape)}, {len(self.leaves)} layers, "
            f"{_count(self.parameters):,} parameters>"
        )


def _checked(shape: Sequence[Any]) -> Shape:
    if not shape or not all(isinstance(length, int) and length > 0 for length in shape):
        raise ValueError(f"input_shape must be positive integers, such as (28, 28, 1), got {shape!r}")
    return tuple(shape)


def _count(parameters: Mapping[str, Parameter]) -> int:
    return sum(prod(parameter.shape) for parameter in parameters.values())
