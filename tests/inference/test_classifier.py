"""A trained model in use: it predicts from anything that is an image, and survives its file."""

from __future__ import annotations

import asyncio
import io
import json
import tracemalloc
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import asynctrain as at
from asynctrain.data import ImageSettings
from asynctrain.errors import CheckpointError, DecodeError, ReadError
from asynctrain.inference.predictor import ImageLike
from asynctrain.types import Program

pytestmark = pytest.mark.one_loop

MODEL = at.nn.models.small_cnn(num_classes=3, image_shape=(10, 14, 3))
CLASSES = ("ant", "bee", "cat")
PIXELS = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)


@pytest.fixture
def classifier() -> at.Classifier:
    return at.Classifier(Program(MODEL.to_json()), MODEL.init(0), {}, CLASSES, ImageSettings((10, 14), 3))


async def test_a_path_bytes_a_pillow_image_and_an_array_give_the_same_prediction(
    classifier: at.Classifier, tmp_path: Path
) -> None:
    image = Image.fromarray(PIXELS)
    image.save(tmp_path / "image.png")
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    forms: list[ImageLike] = [tmp_path / "image.png", str(tmp_path / "image.png"), encoded.getvalue(), image, PIXELS]
    one_by_one = [await classifier.predict(form) for form in forms]
    assert one_by_one == [one_by_one[0]] * 5
    assert await classifier.predict(forms) == one_by_one


async def test_probabilities_are_the_softmax_of_the_models_outputs_best_first(classifier: at.Classifier) -> None:
    prediction = await classifier.predict(PIXELS, top_k=3)
    names, shares = zip(*prediction.top, strict=True)
    assert sorted(names) == list(CLASSES)
    assert list(shares) == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1.0)
    assert (prediction.label, prediction.probability) == prediction.top[0]
    assert len((await classifier.predict(PIXELS, top_k=2)).top) == 2


async def test_classifiers_that_share_their_buffers_answer_each_by_its_own_weights_and_at_once(
    classifier: at.Classifier,
) -> None:
    others = [classifier.with_weights(MODEL.init(seed), {}) for seed in range(1, 9)]
    alone = [
        await at.Classifier(
            Program(MODEL.to_json()), MODEL.init(seed), {}, CLASSES, ImageSettings((10, 14), 3)
        ).predict(PIXELS)
        for seed in range(9)
    ]
    together = await asyncio.gather(*(each.predict(PIXELS) for each in [classifier, *others]))
    assert together == alone
    assert len({prediction.probability for prediction in together}) == 9


async def test_an_executor_gives_the_same_bits_as_the_calls_own_thread(classifier: at.Classifier) -> None:
    many = [np.roll(PIXELS, shift, axis=0) for shift in range(10)] * 10
    async with at.ThreadExecutor(2) as executor:
        assert await classifier.predict(many, executor=executor) == await classifier.predict(many)


@pytest.mark.parametrize("model", [MODEL, at.models.mlp(num_classes=3, image_shape=(10, 14, 3), hidden=(200,))])
async def test_what_an_image_is_told_to_be_depends_to_the_last_bit_on_nothing_that_is_asked_beside_it(
    model: at.Model,
) -> None:
    classifier = at.Classifier(Program(model.to_json()), model.init(0), {}, CLASSES, ImageSettings((10, 14), 3))
    images = list(np.random.default_rng(2).integers(0, 256, (100, 10, 14, 3), dtype=np.uint8))
    alone = [await classifier.predict(image) for image in images]
    assert await classifier.predict(images) == alone
    assert await asyncio.gather(*(classifier.predict(image) for image in images)) == alone
    async with at.ThreadExecutor(2) as executor:
        assert await classifier.predict(images, executor=executor) == alone


async def test_an_image_that_cannot_be_decoded_fails_only_the_call_it_is_in(classifier: at.Classifier) -> None:
    good = await classifier.predict(PIXELS)
    calls = (PIXELS, b"no image", [PIXELS, b"nor this"], [PIXELS, PIXELS])
    found = await asyncio.gather(*(classifier.predict(call) for call in calls), return_exceptions=True)  # type: ignore[arg-type]
    assert [type(answer) for answer in found[1:3]] == [DecodeError, DecodeError]
    assert [found[0], *cast("list[at.Prediction]", found[3])] == [good] * 3


async def test_a_prediction_that_is_cancelled_harms_none_of_those_computed_with_it(classifier: at.Classifier) -> None:
    good = await classifier.predict(PIXELS)
    tasks = [asyncio.create_task(classifier.predict(PIXELS)) for _ in range(20)]
    await asyncio.sleep(0)
    for task in tasks[::3]:
        task.cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(answer, asyncio.CancelledError) for answer in found] == [n % 3 == 0 for n in range(20)]
    assert all(answer == good for n, answer in enumerate(found) if n % 3)


async def test_read_only_weights_are_used_as_they_are_and_nothing_is_prepared_before_it_is_needed() -> None:
    model = at.models.mlp(num_classes=3, image_shape=(64, 64, 3), hidden=(100,))  # 5 MB
    state = at.Trainer(model, optimizer=at.optim.sgd(0.1), executor=at.InlineExecutor()).state.read_only()
    tracemalloc.start()
    try:
        classifiers = [at.Classifier.from_state(model, state, classes=CLASSES) for _ in range(10)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000
    image = np.zeros((64, 64, 3), np.uint8)
    assert await classifiers[0].predict(image) == await classifiers[9].predict(image)


async def test_concurrent_predictions_do_not_mix(classifier: at.Classifier) -> None:
    images = [np.roll(PIXELS, shift, axis=1) for shift in range(12)]
    together = await asyncio.gather(*(classifier.predict(image) for image in images))
    assert together == [await classifier.predict(image) for image in images]


async def test_saved_and_loaded_it_predicts_the_same(classifier: at.Classifier, tmp_path: Path) -> None:
    classifier.save(tmp_path / "model.safetensors")
    loaded = at.Classifier.load(tmp_path / "model.safetensors")
    assert loaded.classes == CLASSES
    assert loaded.image_shape == (10, 14, 3)
    assert await loaded.predict(PIXELS) == await classifier.predict(PIXELS)


async def test_it_keeps_the_weights_it_was_made_with() -> None:
    params = MODEL.init(0)
    classifier = at.Classifier(Program(MODEL.to_json()), params, {}, CLASSES, ImageSettings((10, 14), 3))
    before = await classifier.predict(PIXELS)
    params.vector.fill(0)
    assert await classifier.predict(PIXELS) == before


async def test_evaluate_counts_what_predict_says(classifier: at.Classifier) -> None:
    images = np.random.default_rng(1).integers(0, 256, (30, 10, 14, 3), dtype=np.uint8)
    predicted = [CLASSES.index(prediction.label) for prediction in await classifier.predict(list(images))]
    labels = np.array(predicted)
    labels[:6] = (labels[:6] + 1) % 3
    data = at.ArrayDataset(images, labels, classes=CLASSES)
    loader = at.Loader(data, batch_size=8, image_size=(10, 14), channels=3, shuffle=False)
    async with at.ThreadExecutor(2) as executor:
        evaluation = await classifier.evaluate(loader, executor=executor)
    assert (evaluation.samples, evaluation.accuracy) == (30, 0.8)


async def test_files_that_cannot_be_read_or_decoded_are_named(classifier: at.Classifier, tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"absent\.png: No such file"):
        await classifier.predict(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DecodeError, match=r"text\.png"):
        await classifier.predict(tmp_path / "text.png")


async def test_wrong_arguments_are_named(classifier: at.Classifier) -> None:
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        await classifier.predict(PIXELS, top_k=0)
    trainer = at.Trainer(MODEL, optimizer=at.optim.sgd(0.1), executor=at.InlineExecutor())
    with pytest.raises(ValueError, match="classes must be 1 to 3 names"):
        at.Classifier.from_state(MODEL, trainer.state, classes=("a", "b", "c", "d"))


def test_a_file_that_is_torn_foreign_or_does_not_fit_is_refused_by_name(
    classifier: at.Classifier, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        at.Classifier.load(path)
    classifier.save(path)
    whole = path.read_bytes()
    for end in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: this is no whole safetensors file"):
            at.Classifier.load(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="no model file of asynctrain"):
        at.Classifier.load(path)
    about = json.dumps({"format": "asynctrain.classifier/1", "program": {"architecture": {}}})
    save_file({"x": np.zeros(3)}, path, metadata={"asynctrain": about})
    with pytest.raises(CheckpointError, match="description cannot be used"):
        at.Classifier.load(path)


def test_weights_of_another_shape_are_refused_by_name(classifier: at.Classifier, tmp_path: Path) -> None:
    other = at.Classifier(
        Program(MODEL.to_json()), {"x": np.zeros(3, np.float32)}, {}, CLASSES, ImageSettings((10, 14), 3)
    )
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="the weights do not fit the architecture"):
        at.Classifier.load(tmp_path / "other.safetensors")
