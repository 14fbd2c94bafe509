"""Initialisers: their moments, and the same draw whatever the dtype."""

from __future__ import annotations

import math

import numpy as np
import pytest

from asynctrain.arena import digest
from asynctrain.nn import Conv2D, Dense, Flatten, Model, initializers


@pytest.mark.parametrize(("shape", "fan_in"), [((400, 300), 400), ((3, 3, 50, 200), 450)])
def test_he_normal_has_variance_two_over_fan_in(shape: tuple[int, ...], fan_in: int) -> None:
    drawn = initializers.he_normal(shape, np.random.default_rng(0))
    assert drawn.shape == shape
    assert drawn.std() == pytest.approx(math.sqrt(2 / fan_in), rel=0.02)
    assert abs(drawn.mean()) < 3 * drawn.std() / math.sqrt(drawn.size)


@pytest.mark.parametrize(("shape", "fans"), [((400, 300), 700), ((3, 3, 50, 200), 9 * 250)])
def test_glorot_uniform_fills_its_interval(shape: tuple[int, ...], fans: int) -> None:
    drawn = initializers.glorot_uniform(shape, np.random.default_rng(0))
    limit = math.sqrt(6 / fans)
    assert 0.99 * limit < np.abs(drawn).max() <= limit
    assert drawn.std() == pytest.approx(limit / math.sqrt(3), rel=0.02)


MODEL = Model([Conv2D(3), Flatten(), Dense(4, initializer="glorot_uniform")], (4, 4, 2))


def test_the_same_seed_draws_the_same_parameters_and_another_seed_others() -> None:
    assert digest(MODEL.init(3)) == digest(MODEL.init(3)) != digest(MODEL.init(4))


def test_float32_parameters_are_the_float64_ones_rounded() -> None:
    single, double = MODEL.init(7, "float32"), MODEL.init(7, "float64")
    for name, array in double.items():
        np.testing.assert_array_equal(single[name], array.astype(np.float32))


def test_weights_of_equal_shape_differ_and_biases_begin_at_zero() -> None:
    params = Model([Dense(4), Dense(4)], (4,)).init(0)
    assert np.all(params["dense1/weight"] != params["dense2/weight"])
    assert not params["dense1/bias"].any()


def test_an_unknown_initializer_is_told() -> None:
    with pytest.raises(ValueError, match=r"initializer must be one of he_normal, .*, zeros, ones, got 'twos'"):
        initializers.get("twos")
