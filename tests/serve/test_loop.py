"""The loop that serves is free for others, however large what is sent and asked for."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import asynctrain as at
from asynctrain.serve import TrainingClient
from asynctrain.serve import asynctrain_pb2 as pb
from tests.serve.conftest import Serving
from tests.serve.remote import FOREVER, OPTIONS, calling, read_until, start_of, tensor_of

PERIOD, LATEST = 0.005, 0.5  # seconds; who decoded these images in the loop would be later by more


@asynccontextmanager
async def beating() -> AsyncIterator[list[float]]:
    """Have a heart that beats while the block lasts; yields how late its beats are."""
    loop, late = asyncio.get_running_loop(), [0.0]

    async def beat() -> None:
        while True:
            due = loop.time() + PERIOD
            await asyncio.sleep(PERIOD)
            late.append(loop.time() - due)

    task = asyncio.create_task(beat())
    try:
        yield late
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.usefixtures("no_blocking_calls")
async def test_no_call_of_the_service_or_its_client_blocks_the_loop(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with serving() as server, TrainingClient(server.address) as client:
        async with client.train(blobs, model=model, **OPTIONS | {"epochs": FOREVER}, holdout=0.2) as run:
            await run.pause()
            await run.predict(blobs.images[:3])
            await run.model()
            await run.resume()
            await run.stop()
            events = [event async for event in run]
            await run.model()
            await run.predict(blobs.images[:3])
        async with client.train(blobs, model=model, **OPTIONS | {"epochs": FOREVER}):
            pass  # which cancels it
        async with calling(client, start_of(model, blobs, idempotency_key="mine")) as call:
            await call.read()
        assert len(await client.runs()) == 3
    async with serving() as server, TrainingClient(server.address) as client:
        assert [event async for event in client.run(run.run_id)] == events


async def test_the_loop_beats_while_the_largest_messages_come_and_large_models_go(
    client: TrainingClient, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    data = at.ArrayDataset(rng.integers(0, 256, (300, 64, 64, 3), dtype=np.uint8), np.arange(300) % 2)
    model = at.models.mlp(num_classes=2, image_shape=(64, 64, 3), hidden=(256,))  # 12 MB
    labels = data.labels.tolist()
    raw = [pb.Batch(sequence=number, tensor=tensor_of(data), labels=labels) for number in range(4)]
    large = pb.EncodedImages(images=[_png(np.zeros((3_000, 3_000, 3), np.uint8))] * 40)
    encoded = pb.Batch(sequence=4, encoded=large, labels=labels[:40], last=True)
    start = start_of(model, data, batch_size=64, epochs=100_000, checkpoint_steps=1_000_000)
    async with beating() as late, calling(client, start, [*raw, encoded]) as call:
        run_id = (await call.read()).accepted.run_id
        await read_until(call, "progress")
        run = client.run(run_id)
        await run.save(tmp_path / "model.safetensors")
        await run.predict(data.images[:300])
        await run.pause()
    assert max(late) < LATEST


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()
