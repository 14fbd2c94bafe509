"""A small data set that can be learned, for all tests of training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import asynctrain as at


@pytest.fixture(scope="session")
def blobs() -> at.ArrayDataset:
    """Return 180 grey 12x12 images in three classes: a bright square whose place is the class, in noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(180) % 3
    images = rng.integers(0, 100, (180, 12, 12, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 * label : 4 * label + 4, 3:9] += 120
    return at.ArrayDataset(images, labels, classes=("top", "middle", "bottom"))


@pytest.fixture(scope="session")
def blob_folder(blobs: at.ArrayDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same as PNG files in class folders."""
    folder = tmp_path_factory.mktemp("blobs")
    for number in range(len(blobs)):
        record = blobs[number]
        path = folder / blobs.classes[record.label] / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = record.source.read()
        assert isinstance(pixels, np.ndarray)
        Image.fromarray(pixels.reshape(12, 12)).save(path)
    return folder


@pytest.fixture
def loader(blobs: at.ArrayDataset) -> at.Loader:
    """Return a loader of five batches an epoch."""
    return at.Loader(blobs, batch_size=40, image_size=(12, 12), channels=1)


@pytest.fixture
def model() -> at.Model:
    """Return a network with every kind of layer."""
    nn = at.nn
    return at.Model(
        [
            nn.Conv2D(6, 3),
            nn.ReLU(),
            nn.MaxPool2D(2),
            nn.Flatten(),
            nn.Dense(16),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Dense(3),
        ],
        input_shape=(12, 12, 1),
    )
