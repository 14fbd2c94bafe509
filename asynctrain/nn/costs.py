"""What a model costs in parameters, operations and memory, worked out from its shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from asynctrain.arena import Shape
from asynctrain.nn.layers import Placed
from asynctrain.nn.layers.base import times


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """What one leaf layer costs, for one sample.

    Attributes:
        path: of the layer.
        output_shape: without the batch axis.
        parameters: how many.
        flops: operations of the forward pass, a multiply-add being two; the backward pass takes about twice as many.
        activations: how many numbers the forward pass leaves for the backward pass.
    """

    path: str
    output_shape: Shape
    parameters: int
    flops: int
    activations: int

    @classmethod
    def of(cls, placed: Placed) -> LayerCosts:
        """Return the costs of a layer at its place."""
        layer, input_shape = placed.layer, placed.input_shape
        return cls(
            placed.path,
            placed.output_shape,
            sum(prod(parameter.shape) for parameter in layer.parameters(input_shape).values()),
            layer.flops(input_shape),
            layer.activations(input_shape),
        )


@dataclass(frozen=True, slots=True)
class Costs:
    """What a model costs; printed, it is a table of its rows and the totals.

    Attributes:
        rows: the input, which costs nothing but its activations, then each leaf layer in the order of the forward pass.
        microbatch: samples in one pass, at least 1.
        itemsize: of parameters and activations, in bytes.
    """

    rows: Sequence[LayerCosts]
    microbatch: int
    itemsize: int

    def __post_init__(self) -> None:
        if self.microbatch < 1:
            raise ValueError(f"microbatch must be at least 1, got {self.microbatch}")

    @property
    def parameters(self) -> int:
        """How many parameters there are."""
        return sum(row.parameters for row in self.rows)

    @property
    def parameter_bytes(self) -> int:
        """The bytes of one copy of the parameters; their gradients take as many, and so does each optimizer slot."""
        return self.parameters * self.itemsize

    @property
    def flops(self) -> int:
        """The operations of one microbatch's forward pass."""
        return self.microbatch * sum(row.flops for row in self.rows)

    @property
    def activation_bytes(self) -> int:
        """The bytes that one microbatch's forward pass leaves for the backward pass, at most.

        Each layer is counted as if it was computed by itself; what the next one writes over, or is computed together
        with, leaves fewer. The gradients of activations go where activations are no longer needed, so that training the
        small ready-made models in microbatches of 32 takes about as many in all, scratch included, or up to twice as
        many; where the parameters take more bytes than the activations it is more, as part of the scratch is as large
        as they are.
        """
        return self.microbatch * self.itemsize * sum(row.activations for row in self.rows)

    def __str__(self) -> str:
        one = replace(self, microbatch=1)
        return _aligned(
            [
                ("layer", "output", "parameters", "FLOPs", "activation bytes"),
                *(self._cells(row) for row in self.rows),
                ("total", "", f"{one.parameters:,}", f"{one.flops:,}", f"{one.activation_bytes:,}"),
                (f"{self.microbatch} samples", "", "", f"{self.flops:,}", f"{self.activation_bytes:,}"),
            ]
        )

    def _cells(self, row: LayerCosts) -> tuple[str, ...]:
        """Return a row as text, zeros left empty."""
        numbers = row.parameters, row.flops, row.activations * self.itemsize
        return row.path, times(row.output_shape), *(f"{number:,}" if number else "" for number in numbers)


def _aligned(table: Sequence[tuple[str, ...]]) -> str:
    """Return the table as lines, its first two columns flush left and the numbers flush right."""
    a, b, c, d, e = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = (f"{r[0]:{a}}  {r[1]:{b}}  {r[2]:>{c}}  {r[3]:>{d}}  {r[4]:>{e}}" for r in table)
    return "\n".join(line.rstrip() for line in lines)
