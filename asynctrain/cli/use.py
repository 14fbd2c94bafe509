"""``asynctrain evaluate`` and ``asynctrain predict``: a model file in use."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path

import asynctrain as at
from asynctrain.cli.folders import open_folder, require_classes
from asynctrain.cli.homes import make_executor
from asynctrain.cli.output import people, percent, to_programs
from asynctrain.train.run_folder import MODEL


def load(model: Path) -> at.Classifier:
    """Return the classifier in a file, or that of a run, whose folder ``model`` is. Blocks."""
    return at.Classifier.load(model / MODEL if model.is_dir() else model)


async def evaluate(model: Path, path: Path, batch_size: int, executor: str, as_json: bool) -> None:
    """Say how well the model recognises the images of ``path``, whose class folders are the model's classes."""
    classifier = await asyncio.to_thread(load, model)
    data = await asyncio.to_thread(open_folder, path)
    require_classes(path, data.classes, classifier.classes)
    height, width, channels = classifier.image_shape
    loader = at.Loader(data, batch_size=batch_size, image_size=(height, width), channels=channels, shuffle=False)
    async with make_executor(executor) as home:
        evaluation = await classifier.evaluate(loader, executor=home)
    people.print(
        f"{percent(evaluation.accuracy)} of {evaluation.samples:,} images are recognised, loss {evaluation.loss:.4f}"
    )
    if as_json:
        to_programs({"model": str(model), "data": data.path, **asdict(evaluation)})


async def predict(model: Path, images: list[Path], top: int, as_json: bool) -> None:
    """Say what is on each of the images."""
    classifier = await asyncio.to_thread(load, model)
    predictions = await classifier.predict(tuple(images), top_k=top)
    for path, found in zip(images, predictions, strict=True):
        likeliest = ", ".join(f"{name} {percent(share)}" for name, share in found.top)
        people.print(f"{path}: {likeliest}", markup=False, soft_wrap=True)
    if as_json:
        told = [{"image": str(path), **asdict(found)} for path, found in zip(images, predictions, strict=True)]
        to_programs({"model": str(model), "predictions": told})
