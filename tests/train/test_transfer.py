"""Transfer learning: a run that begins with what another one has learned, and unfreezes it when it is time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import asynctrain as at
from asynctrain.types import Params

pytestmark = pytest.mark.one_loop

nn = at.nn


def network(outputs: int) -> at.Model:
    layers = [nn.Conv2D(4, 3), nn.BatchNorm(), nn.ReLU(), nn.GlobalAveragePool(), nn.Dense(outputs)]
    return at.Model(layers, input_shape=(12, 12, 1))


def trainer(model: at.Model, optimizer: at.optim.Optimizer | None = None, seed: int = 3) -> at.Trainer:
    return at.Trainer(
        model, optimizer=optimizer or at.optim.adamw(1e-2), executor=at.InlineExecutor(), microbatch=20, seed=seed
    )


def same(one: Params, other: Params) -> set[str]:
    return {name for name in one if np.array_equal(one[name], other[name])}


@pytest.mark.anyio
async def test_a_part_of_another_model_is_taken_by_name_and_the_rest_is_drawn_anew(
    loader: at.Loader, tmp_path: Path
) -> None:
    known = (await trainer(network(3)).fit(loader, epochs=1)).state
    at.Classifier.from_state(network(3), known, classes=loader.classes).save(tmp_path / "known.safetensors")
    learner = trainer(network(5), seed=8)  # another number of classes
    fresh = learner.initial_state()
    for weights in (known, at.Classifier.load(tmp_path / "known.safetensors")):
        state = learner.initial_state(weights, only=["conv*", "batch_norm*"])
        taken = {"conv1/weight", "conv1/bias", "batch_norm1/scale", "batch_norm1/bias"}
        assert same({name: state.params[name] for name in taken}, known.params) == taken
        assert same(state.model_state, known.model_state) == set(known.model_state)
        assert same(state.params, fresh.params) >= {"dense1/weight", "dense1/bias"}
        assert not same(state.params, fresh.params) & {"conv1/weight"}


@pytest.mark.anyio
async def test_all_of_a_state_is_taken_by_default_and_means_of_weights_begin_there(loader: at.Loader) -> None:
    known = (await trainer(network(3)).fit(loader, epochs=1)).state
    state = trainer(network(3), at.optim.average_weights(at.optim.sgd(0.1)), seed=8).initial_state(known)
    assert state.step == 0
    assert same(state.params, known.params) == same(state.averaged().params, known.params) == set(known.params)


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("convolution*", "patterns that fit one of the names .*, got 'convolution"),
        (["conv*", "dense1/*"], r"dense1/weight, which 'dense1/\*' fits, in the shape \(4, 5\), got \(4, 3\)"),
    ],
)
def test_what_does_not_fit_is_named(only: str | Sequence[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(network(5)).initial_state(trainer(network(3)).initial_state(), only)


def test_what_is_not_there_is_named() -> None:
    bare = at.Model([nn.Flatten(), nn.Dense(3)], input_shape=(12, 12, 1))
    with pytest.raises(ValueError, match=re.escape("weights must have conv1/weight, which 'conv*' fits")):
        trainer(network(3)).initial_state(trainer(bare).initial_state(), only="conv*")


@pytest.mark.anyio
async def test_a_part_that_is_frozen_for_an_epoch_learns_from_then_on_and_resumes_to_the_bit(
    loader: at.Loader,
) -> None:
    body = at.optim.delayed(at.optim.adamw(1e-3), loader.batches_per_epoch)
    optimizer = at.optim.groups({"conv*": body, "*": at.optim.adamw(1e-2)})
    learner = trainer(network(3), optimizer)
    begin = learner.initial_state()
    frozen = (await learner.fit(loader, epochs=1)).state
    assert same(frozen.params, begin.params) == {"conv1/weight", "conv1/bias"}
    whole = (await trainer(network(3), optimizer).fit(loader, epochs=2)).state
    assert not same(whole.params, begin.params)
    half = (await trainer(network(3), optimizer).fit(loader, steps=3)).state
    assert (await trainer(network(3), optimizer).fit(loader, epochs=2, state=half)).state.digest() == whole.digest()
