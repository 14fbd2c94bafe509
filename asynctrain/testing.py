"""Checks and fakes for tests of your own parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import numpy as np

from asynctrain.arena import Arena, Array, Layout, Shape
from asynctrain.nn import initializers
from asynctrain.nn.kernels import backend
from asynctrain.nn.layers import Layer
from asynctrain.nn.layers.containers import Within
from asynctrain.nn.model import Model
from asynctrain.nn.scope import Scope, Workspace
from asynctrain.randomness import Purpose, generator


def check_gradients(
    layer: Layer,
    input_shape: Shape,
    *,
    batch: int = 2,
    seed: int = 0,
    train: bool = True,
    step: float = 1e-5,
    tolerance: float = 1e-7,
    kernels: str = "numpy",
) -> None:
    """Hold a layer's input and weight gradients against central differences in float64, element by element.

    The scalar that is differentiated is sum(r y) for random r. The inputs are a shuffled row of evenly spaced numbers
    without 0, so that none lies near a tie or a kink.

    Args:
        layer: any layer, composite ones too.
        input_shape: without the batch axis; keep it small, as each element takes two forward passes.
        batch: N, at least 1.
        seed: of inputs, parameters and r.
        train: whether the pass is one of training.
        step: by which each element is moved either way.
        tolerance: the largest error permitted, relative to the largest gradient or 1, whichever is larger.
        kernels: of the layers, ``numpy`` or ``numba``.

    Raises:
        AssertionError: a gradient is wrong; the message says which, and by how much.
    """
    rng = np.random.default_rng(seed)
    x = _apart((batch, *input_shape), rng)
    params = _random_params(layer, input_shape, rng)
    gradients = params.layout.empty()
    # An emitted gradient must be written, not added: leftovers would show.
    gradients.vector.fill(np.nan)
    model = Model([layer], input_shape)
    (name,) = model.root.children
    scope = Scope(
        Workspace(),
        train=train,
        rng=partial(generator, seed, Purpose.DROPOUT),
        gradients=gradients,
        state=Within(model.init_state(), name),
        statistics=Within(model.statistics_layout.empty(), name),
        kernels=backend.get(kernels),
    )
    r = rng.standard_normal((batch, *layer.output_shape(input_shape)))

    def value() -> float:
        return float(np.sum(r * layer.forward(params, x, scope)[0]))

    _, saved = layer.forward(params, x, scope)
    dx = layer.backward(params, saved, r.copy(), scope)
    if dx is None:
        raise AssertionError("the input gradient is missing: backward returned None")
    found = {"x": dx.copy(), **{name: gradients[name].copy() for name in params}}
    for name, array in {"x": x, **params}.items():
        expected = _central_differences(value, array, step)
        error = np.abs(found[name] - expected).max() / max(1.0, np.abs(expected).max())
        if not error <= tolerance:
            raise AssertionError(
                f"the gradient of {name} is wrong by {error:.2g}, {tolerance:.2g} is permitted: {layer}"
            )


def _apart(shape: Shape, rng: np.random.Generator) -> Array:
    """Return evenly spaced numbers between -1 and 1 in random order, none of them 0."""
    count = prod(shape)
    return rng.permutation((np.arange(count) + 0.25) / count * 2 - 1).reshape(shape)


def _random_params(layer: Layer, input_shape: Shape, rng: np.random.Generator) -> Arena:
    """Return parameters as they begin, moved a little, so that those which begin at zero count too."""
    wanted = layer.parameters(input_shape)
    arena = Layout({name: parameter.shape for name, parameter in wanted.items()}, np.dtype(np.float64)).empty()
    for name, (shape, initializer) in wanted.items():
        arena[name][...] = initializers.get(initializer)(shape, rng) + 0.1 * rng.standard_normal(shape)
    return arena


def _central_differences(value: Callable[[], float], array: Array, step: float) -> Array:
    """Return (value(a + step) - value(a - step)) / (2 step) for each element a of ``array``, which is put back."""
    differences = np.empty_like(array)
    for place in np.ndindex(array.shape):
        kept = array[place]
        array[place] = kept + step
        above = value()
        array[place] = kept - step
        below = value()
        array[place] = kept
        differences[place] = (above - below) / (2 * step)
    return differences
