"""A service on a port of its own, its client, and data that a small model learns."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import asynctrain as at
from asynctrain.serve import TrainingClient, TrainingServer, serve

Serving = Callable[..., AbstractAsyncContextManager[TrainingServer]]


@pytest.fixture(scope="session")
def blobs() -> at.ArrayDataset:
    """Return 90 grey 8x8 images in three classes: a bright bar whose place is the class, in noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    images = rng.integers(0, 100, (90, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 120
    return at.ArrayDataset(images, labels, classes=("top", "middle", "bottom"))


@pytest.fixture(scope="session")
def model() -> at.Model:
    """Return a network with dropout and batch norm, which depend on the step and keep a state."""
    nn = at.nn
    layers = [nn.Conv2D(4, 3), nn.BatchNorm(), nn.ReLU(), nn.MaxPool2D(2), nn.Flatten(), nn.Dropout(0.2), nn.Dense(3)]
    return at.Model(layers, input_shape=(8, 8, 1))


@pytest.fixture
async def executor() -> AsyncIterator[at.ThreadExecutor]:
    async with at.ThreadExecutor(2) as executor:
        yield executor


@pytest.fixture
def serving(tmp_path: Path, executor: at.ThreadExecutor) -> Serving:
    """Return what serves the folder ``service`` of the test."""

    @asynccontextmanager
    async def start(**options: Any) -> AsyncIterator[TrainingServer]:
        async with serve(tmp_path / "service", executor, **options) as server:
            yield server

    return start


@pytest.fixture
async def server(serving: Serving) -> AsyncIterator[TrainingServer]:
    async with serving() as server:
        yield server


@pytest.fixture
async def client(server: TrainingServer) -> AsyncIterator[TrainingClient]:
    async with TrainingClient(server.address) as client:
        yield client
