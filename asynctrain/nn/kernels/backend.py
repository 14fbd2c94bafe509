"""The kernels that there is a choice of, numpy's. Layers call them through their scope, ``scope.kernels.relu(...)``."""

from __future__ import annotations

from typing import ClassVar

import numpy.typing as npt

from asynctrain.nn.kernels import activations, conv, depthwise, norm, pool, pooled, winograd


class Kernels:
    """numpy's kernels, the reference; a subclass has others of the same arguments in the place of some."""

    name: ClassVar[str] = "numpy"

    relu = staticmethod(activations.relu)
    relu_backward = staticmethod(activations.relu_backward)

    norm_moments = staticmethod(norm.moments)
    norm_affine = staticmethod(norm.affine)
    norm_affine_relu = staticmethod(norm.affine_relu)
    norm_sums = staticmethod(norm.sums)
    norm_relu_sums = staticmethod(norm.relu_sums)
    norm_combination = staticmethod(norm.combination)

    conv_correlate = staticmethod(conv.correlate)
    conv_correlate_backward_input = staticmethod(conv.correlate_backward_input)
    conv_scatter = staticmethod(conv.scatter)
    conv_correlate_backward_params = staticmethod(conv.correlate_backward_params)

    depthwise_correlate = staticmethod(depthwise.correlate)
    depthwise_correlate_backward_input = staticmethod(depthwise.correlate_backward_input)
    depthwise_correlate_backward_params = staticmethod(depthwise.correlate_backward_params)

    winograd_keeps_tiles: ClassVar[bool] = True  # from the forward pass for the weight gradient
    winograd_pays = staticmethod(winograd.pays)
    winograd_correlate = staticmethod(winograd.correlate)
    winograd_correlate_backward_input = staticmethod(winograd.correlate_backward_input)
    winograd_correlate_backward_params = staticmethod(winograd.correlate_backward_params)

    pooled_correlate = staticmethod(pooled.correlate)
    pooled_spread_maxima = staticmethod(pooled.spread_maxima)
    pooled_correlate_backward_input = staticmethod(pooled.correlate_backward_input)

    max_pool = staticmethod(pool.max_pool)
    max_pool_backward = staticmethod(pool.max_pool_backward)

    def warm_up(self, dtype: npt.DTypeLike) -> None:
        """Do what else the first calls with arrays of ``dtype`` would take seconds for: here there is nothing."""

    def __repr__(self) -> str:
        return f"<Kernels of {self.name}>"


NUMPY = Kernels()
