"""Kernels that numba compiles, with the arguments of numpy's and beside them: only where they are faster.

They let go of the interpreter while they run, and are kept on disk once they are compiled. No sum is reordered by the
compiler, and none by the number of threads, so the same input gives the same bits.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import numpy.typing as npt

from asynctrain.nn.kernels.backend import Kernels
from asynctrain.nn.kernels.compiled import activations, conv, depthwise, norm, pool, pooled, winograd


class NumbaKernels(Kernels):
    """numba's kernels, and numpy's for the rest."""

    name: ClassVar[str] = "numba"

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

    winograd_keeps_tiles: ClassVar[bool] = False  # to transform them again takes less time than to store them
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
        """Compile all kernels for arrays of ``dtype``, or read them from the cache."""
        for module in (activations, norm, conv, depthwise, winograd, pool, pooled):
            module.warm_up(np.dtype(dtype))


NUMBA = NumbaKernels()
