"""The fully connected layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

from asynctrain.arena import Array, Shape
from asynctrain.nn import initializers
from asynctrain.nn.kernels import dense
from asynctrain.nn.layers.base import Layer, Parameter, check_integer, register_layer
from asynctrain.nn.scope import Scope
from asynctrain.types import Params


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
        check_integer(self, "units", self.units)
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

    def flops(self, input_shape: Shape) -> int:
        """2 I O, the bias being the first term of each sum."""
        return 2 * input_shape[0] * self.units

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
