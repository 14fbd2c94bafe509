"""Samples that count more or less: from the dataset to the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import asynctrain as at
from asynctrain.arena import Array
from asynctrain.data import ArrayDataset, Concat, ImageManifest
from asynctrain.errors import DataError
from asynctrain.metrics import ConfusionMatrix, PrecisionRecallF1, TopK

pytestmark = pytest.mark.one_loop

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 4, 4, 1), dtype=np.uint8)
LABELS = np.arange(24) % 3
WEIGHTS = np.arange(24) % 4  # 0, 1, 2 and 3 times
MODEL = at.models.linear(num_classes=3, image_shape=(4, 4, 1))


def loader(dataset: Any, batch_size: int = 64, **options: Any) -> at.Loader:
    return at.Loader(dataset, batch_size=batch_size, image_size=(4, 4), channels=1, **options)


async def trained(dataset: ArrayDataset, **options: Any) -> at.History:
    async with at.ThreadExecutor(2) as executor:
        trainer = at.Trainer(MODEL, optimizer=at.optim.sgd(0.5), executor=executor, microbatch=5, dtype="float64")
        return await trainer.fit(loader(dataset), epochs=4, **options)


def values(history: at.History) -> Array:
    return np.concatenate([array.ravel() for array in history.state.params.values()])


async def test_a_sample_of_weight_n_counts_as_n_samples_in_the_gradient_and_the_loss() -> None:
    weighted = await trained(ArrayDataset(IMAGES, LABELS, weights=WEIGHTS))
    repeated = np.repeat(np.arange(24), WEIGHTS)
    expected = await trained(ArrayDataset(IMAGES[repeated], LABELS[repeated], classes=("0", "1", "2")))
    np.testing.assert_allclose(values(weighted), values(expected), rtol=1e-12)
    losses = [[epoch.loss for epoch in history.epochs] for history in (weighted, expected)]
    assert losses[0] == pytest.approx(losses[1])
    plain = await trained(ArrayDataset(IMAGES, LABELS))
    assert not np.allclose(values(plain), values(expected))


async def test_weights_of_one_change_no_bit() -> None:
    weighted = await trained(ArrayDataset(IMAGES, LABELS, weights=np.ones(24)))
    assert weighted.state.digest() == (await trained(ArrayDataset(IMAGES, LABELS))).state.digest()


async def test_in_evaluations_they_change_the_loss_and_neither_accuracy_nor_metrics() -> None:
    there = WEIGHTS > 0  # what weighs nothing is left out
    only = ArrayDataset(IMAGES[there], LABELS[there], classes=("0", "1", "2"))
    metrics = (TopK(1), PrecisionRecallF1(), ConfusionMatrix(), PrecisionRecallF1(multi_label=True))
    async with at.ThreadExecutor(2) as executor:
        trainer = at.Trainer(MODEL, optimizer=at.optim.sgd(0.5), executor=executor, microbatch=5)
        weighted = await trainer.evaluate(loader(ArrayDataset(IMAGES, LABELS, weights=WEIGHTS)), metrics=metrics)
        plain = await trainer.evaluate(loader(only), metrics=metrics)
        heavier = ArrayDataset(IMAGES[there], LABELS[there], classes=("0", "1", "2"), weights=WEIGHTS[there])
        assert (await trainer.evaluate(loader(heavier))).loss == pytest.approx(weighted.loss)
    assert (weighted.accuracy, weighted.metrics) == (plain.accuracy, plain.metrics)
    assert weighted.metrics["top_1"] == weighted.accuracy
    assert weighted.loss != pytest.approx(plain.loss)


@pytest.mark.parametrize("batch_size", [5, 24])
async def test_a_loader_delivers_each_samples_weight_with_it(batch_size: int) -> None:
    first, second = np.linspace(0, 2, 24), np.linspace(3, 4, 24)
    data = Concat({"a": ArrayDataset(IMAGES, LABELS, weights=first), "b": ArrayDataset(IMAGES, LABELS, weights=second)})
    train, held_out = data.split(0.75, seed=1)
    expected = {str(record.source): record.weight for record in map(data.__getitem__, range(48))}
    assert set(expected.values()) == {*first.astype(np.float32).tolist(), *second.astype(np.float32).tolist()}
    found: dict[str, float] = {}
    for part in (train, held_out):
        async with loader(part, batch_size, seed=3).open() as batches:
            async for batch in batches:
                assert batch.weights is not None
                assert batch.weights.dtype == np.float32
                found |= dict(zip(batch.sources, batch.weights.tolist(), strict=True))
    assert found == expected


async def test_where_all_weigh_one_a_batch_has_no_weights() -> None:
    async with loader(ArrayDataset(IMAGES, LABELS), 7).open() as batches:
        assert [batch.weights async for batch in batches] == [None] * 4


def test_a_manifest_tells_weights_in_a_column_that_is_named(tmp_path: Path) -> None:
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    table.write_text("Weight,path,label\n0.5,a.png,x\n2,b.png,y\n")
    lines.write_text('{"path": "a.png", "label": "x", "weight": 0.5}\n{"path": "b.png", "label": "y", "weight": 2}\n')
    for path in (table, lines):
        manifest = ImageManifest(path, weight="weight")
        assert [manifest[i].weight for i in range(2)] == [0.5, 2.0]
        assert [ImageManifest(path)[i].weight for i in range(2)] == [1.0, 1.0]


@pytest.mark.parametrize("weight", ["", "heavy", "-1", "nan", "inf"])
def test_a_weight_that_is_none_is_named_with_its_line(tmp_path: Path, weight: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"path,label,weight\na.png,x,1\nb.png,y,{weight}\n")
    with pytest.raises(DataError, match=f"line 3: weight must be a finite number of at least 0, got '{weight}'"):
        ImageManifest(path, weight="weight")


def test_a_manifest_without_the_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("path,label\na.png,x\n")
    with pytest.raises(DataError, match="line 1: is no header with the columns path, label, weight"):
        ImageManifest(path, weight="weight")


@pytest.mark.parametrize("weights", [[1.0] * 23, [1.0] * 23 + [-1.0], [1.0] * 23 + [np.nan]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must"):
        ArrayDataset(IMAGES, LABELS, weights=weights)
