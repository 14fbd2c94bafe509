"""What the tests of the service have in common: the same training here and there, and messages by hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from grpc import StatusCode, aio

import asynctrain as at
from asynctrain.serve import RemoteRun, TrainingClient
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve.messages import EOF
from asynctrain.train.events import StepEnd

FOREVER = 1_000_000  # epochs
OPTIONS: dict[str, Any] = {"epochs": 4, "batch_size": 16, "microbatch": 8, "seed": 3}
RATE = 3e-3


async def trained_here(data: at.ArrayDataset, model: at.Model, run_dir: Path | None = None) -> at.History:
    """Return the history of the training that ``OPTIONS`` ask for, in this process."""
    height, width, channels = model.input_shape
    loader = at.Loader(data, batch_size=16, image_size=(height, width), channels=channels, seed=3)
    async with at.ThreadExecutor(1) as executor:
        trainer = at.Trainer(model, optimizer=at.optim.adamw(RATE), executor=executor, microbatch=8, seed=3)
        return await trainer.fit(loader, epochs=4, run_dir=run_dir)


async def reach(run: RemoteRun, step: int) -> None:
    """Wait until ``step`` is told."""
    async for event in run.events():
        if isinstance(event, StepEnd) and event.step >= step:
            return


def start_of(model: at.Model, data: at.ArrayDataset, **fields: Any) -> pb.Start:
    """Return the Start of the same training."""
    usual = {
        "architecture": json.dumps(model.to_json()),
        "classes": data.classes,
        "optimizer": json.dumps(at.optim.adamw(RATE).to_json()),
        **OPTIONS,
    }
    return pb.Start(**{**usual, **fields})


def batches_of(data: at.ArrayDataset, size: int = 30, first: int = 0) -> list[pb.Batch]:
    """Return the data in messages of ``size`` images, from number ``first`` on."""
    starts = range(0, len(data), size)
    return [
        pb.Batch(
            sequence=number,
            tensor=tensor_of(data, slice(start, start + size)),
            labels=data.labels[start : start + size].tolist(),
            last=start + size >= len(data),
        )
        for number, start in enumerate(starts)
        if number >= first
    ]


def tensor_of(data: at.ArrayDataset, part: slice = slice(None)) -> pb.Tensor:
    images = data.images[part]
    return pb.Tensor(dtype=pb.Tensor.UINT8, shape=images.shape, data=images.tobytes())


@asynccontextmanager
async def calling(client: TrainingClient, start: pb.Start, batches: Iterable[pb.Batch] = ()) -> AsyncIterator[Any]:
    """Have a call of TrainModel to which a Start and batches were written; it is cancelled at the end."""
    call = client.call(client.stub.TrainModel)
    try:
        await call.write(pb.TrainRequest(start=start))
        for batch in batches:
            await call.write(pb.TrainRequest(batch=batch))
        yield call
    finally:
        call.cancel()


async def status_of(call: Any) -> StatusCode:
    """Read a call to its end and return its status, which comes after all messages."""
    async with asyncio.timeout(10):
        try:
            while await call.read() is not EOF:
                pass
        except aio.AioRpcError:
            pass
        code: StatusCode = await call.code()
        return code


async def read_until(call: Any, kind: str) -> pb.TrainEvent:
    """Return the next event of a kind."""
    while True:
        event = await call.read()
        assert isinstance(event, pb.TrainEvent), f"the stream has ended before {kind}: {await call.details()}"
        if event.WhichOneof("kind") == kind:
            return event
