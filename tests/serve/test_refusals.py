"""Whatever is beyond a limit, or not what it must be, is answered with its status; other runs do not notice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode
from PIL import Image

import asynctrain as at
from asynctrain.serve import Limits, Refused, TrainingClient
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve.plan import parse_start, require_key
from asynctrain.serve.samples import read_samples
from tests.serve.conftest import Serving
from tests.serve.remote import OPTIONS, batches_of, calling, start_of, status_of, tensor_of

pytestmark = pytest.mark.one_loop

INVALID, EXHAUSTED = StatusCode.INVALID_ARGUMENT, StatusCode.RESOURCE_EXHAUSTED
UNFIT, RANGE = StatusCode.FAILED_PRECONDITION, StatusCode.OUT_OF_RANGE
DENSE = {"layer": "dense", "units": 3}


def architecture(*layers: Any, shape: Any = (8, 8, 1)) -> str:
    return json.dumps({"input_shape": shape, "layers": list(layers)})


STARTS: dict[str, tuple[dict[str, Any], StatusCode]] = {
    "another version": ({"version": 2}, UNFIT),
    "no model": ({"architecture": None}, INVALID),
    "one class": ({"classes": ["a"]}, INVALID),
    "two classes of one name": ({"classes": ["a", "a"]}, INVALID),
    "a class without a name": ({"classes": ["a", ""]}, INVALID),
    "too many classes": ({"classes": [str(n) for n in range(10_001)]}, EXHAUSTED),
    "more classes than outputs": ({"classes": ["a", "b", "c", "d"]}, INVALID),
    "no epochs": ({"epochs": 0}, INVALID),
    "too many epochs": ({"epochs": 2**31}, EXHAUSTED),
    "a huge batch": ({"batch_size": 2**30}, EXHAUSTED),
    "a huge microbatch": ({"microbatch": 2**32 - 1}, EXHAUSTED),
    "a negative holdout": ({"holdout": -0.1}, INVALID),
    "a whole holdout": ({"holdout": 1.0}, INVALID),
    "a holdout that is no number": ({"holdout": float("nan")}, INVALID),
    "a long key": ({"idempotency_key": "k" * 129}, INVALID),
    "no JSON": ({"architecture": "{"}, INVALID),
    "a JSON list": ({"architecture": "[]"}, INVALID),
    "deep JSON": ({"architecture": '{"a":' + "[" * 30_000 + "]" * 30_000 + "}"}, INVALID),
    "long JSON": ({"architecture": '{"a": "' + "x" * 70_000 + '"}'}, EXHAUSTED),
    "an unknown layer": ({"architecture": architecture({"layer": "magic"})}, INVALID),
    "a layer of the wrong type": (
        {"architecture": architecture({"layer": "flatten"}, {**DENSE, "units": "x"})},
        INVALID,
    ),
    "no layers": ({"architecture": '{"input_shape": [8, 8, 1]}'}, INVALID),
    "images of two axes": ({"architecture": architecture(DENSE, shape=(8, 8))}, INVALID),
    "images of four channels": ({"architecture": architecture({"layer": "flatten"}, DENSE, shape=(8, 8, 4))}, INVALID),
    "images of no height": ({"architecture": architecture({"layer": "flatten"}, DENSE, shape=(0, 8, 1))}, INVALID),
    "huge images": ({"architecture": architecture({"layer": "flatten"}, DENSE, shape=(10**6, 8, 1))}, EXHAUSTED),
    "a model of two axes": ({"architecture": architecture({"layer": "relu"})}, INVALID),
    "too many parameters": (
        {"architecture": architecture({"layer": "flatten"}, {**DENSE, "units": 10**12}, DENSE)},
        EXHAUSTED,
    ),
    "too many layers": (
        {"architecture": architecture({"layer": "flatten"}, *[{"layer": "relu"}] * 1_001, DENSE)},
        EXHAUSTED,
    ),
    "too many activations": (
        {
            "architecture": architecture(
                {"layer": "conv2d", "filters": 2_000, "kernel_size": 1},
                {"layer": "flatten"},
                DENSE,
                shape=(256, 256, 1),
            )
        },
        EXHAUSTED,
    ),
    "too many operations": (
        {
            "architecture": architecture(
                {"layer": "conv2d", "filters": 500, "kernel_size": 31},
                {"layer": "conv2d", "filters": 50, "kernel_size": 31},
                {"layer": "global_average_pool"},
                DENSE,
                shape=(64, 64, 1),
            )
        },
        EXHAUSTED,
    ),
    "an unknown optimizer": ({"optimizer": '{"name": "magic"}'}, INVALID),
    "a negative learning rate": ({"optimizer": '{"name": "sgd", "learning_rate": -1}'}, INVALID),
    "an infinite learning rate": ({"optimizer": '{"name": "sgd", "learning_rate": 1e999}'}, INVALID),
    "a learning rate that is no number": ({"optimizer": '{"name": "sgd", "learning_rate": NaN}'}, INVALID),
    "an unknown ready model": ({"ready_model": pb.ReadyModel(name="magic", image_shape=[8, 8, 1])}, INVALID),
    "unknown arguments": (
        {"ready_model": pb.ReadyModel(name="mlp", image_shape=[8, 8, 1], arguments='{"magic": 1}')},
        INVALID,
    ),
    "arguments told twice": (
        {"ready_model": pb.ReadyModel(name="mlp", image_shape=[8, 8, 1], arguments='{"num_classes": 3}')},
        INVALID,
    ),
}


@pytest.mark.parametrize(("fields", "code"), STARTS.values(), ids=STARTS.keys())
def test_a_start_that_asks_for_what_cannot_be_is_refused_before_anything_is_allocated(
    blobs: at.ArrayDataset, model: at.Model, fields: dict[str, Any], code: StatusCode
) -> None:
    fields = {"architecture": None, **fields} if "ready_model" in fields else fields
    start = start_of(model, blobs, **fields)
    with pytest.raises(Refused) as refused:
        _checked(start)
    assert refused.value.code is code, refused.value


def _checked(start: pb.Start) -> None:
    parse_start(start, Limits())
    require_key(start)


def png(height: int = 8, width: int = 8) -> bytes:
    file = BytesIO()
    Image.fromarray(np.zeros((height, width), np.uint8)).save(file, "png")
    return file.getvalue()


def tensor(**fields: Any) -> pb.Batch:
    usual = {"dtype": pb.Tensor.UINT8, "shape": [1, 8, 8, 1], "data": bytes(64)}
    return pb.Batch(tensor=pb.Tensor(**{**usual, **fields}), labels=[0])


def floats(value: float) -> pb.Batch:
    return tensor(dtype=pb.Tensor.FLOAT32, data=np.full(64, value, "<f4").tobytes())


def files(*contents: bytes) -> pb.Batch:
    return pb.Batch(encoded=pb.EncodedImages(images=contents), labels=[0] * len(contents))


BATCHES: dict[str, tuple[pb.Batch, StatusCode]] = {
    "no dtype": (tensor(dtype=pb.Tensor.DTYPE_UNSPECIFIED), INVALID),
    "an unknown dtype": (tensor(dtype=77), INVALID),
    "another rank": (tensor(shape=[1, 8, 8]), INVALID),
    "another shape": (tensor(shape=[1, 8, 9, 1], data=bytes(72)), INVALID),
    "too few bytes": (tensor(data=bytes(63)), INVALID),
    "too many bytes": (tensor(data=bytes(65)), INVALID),
    "a shape that no memory holds": (tensor(shape=[2**32 - 1, 8, 8, 1]), EXHAUSTED),
    "bytes of another dtype": (tensor(dtype=pb.Tensor.FLOAT32), INVALID),
    "pixels that are no numbers": (floats(float("nan")), INVALID),
    "pixels without an end": (floats(float("inf")), INVALID),
    "pixels above 1": (floats(1.5), INVALID),
    "pixels below 0": (floats(-0.5), INVALID),
    "a label too many": (pb.Batch(tensor=tensor().tensor, labels=[0, 0]), INVALID),
    "labels without images": (pb.Batch(labels=[0]), INVALID),
    "a label that is no class": (pb.Batch(tensor=tensor().tensor, labels=[3]), RANGE),
    "a negative label": (pb.Batch(tensor=tensor().tensor, labels=[-1]), RANGE),
    "no image file": (files(b"magic"), INVALID),
    "an empty file": (files(b""), INVALID),
    "half an image file": (files(png()[:45]), INVALID),
    "a file of too many pixels": (files(png(4_100, 4_100)), INVALID),
    "too many files": (files(*[b"x"] * 8_193), EXHAUSTED),
}


@pytest.mark.parametrize(("batch", "code"), BATCHES.values(), ids=BATCHES.keys())
def test_a_batch_that_is_not_what_it_must_be_is_refused(
    blobs: at.ArrayDataset, model: at.Model, batch: pb.Batch, code: StatusCode
) -> None:
    plan = parse_start(start_of(model, blobs), Limits())
    with pytest.raises(Refused) as refused:
        read_samples(batch, plan.settings, 3, Limits())
    assert refused.value.code is code, refused.value


async def answer(client: TrainingClient, *requests: pb.TrainRequest, half_close: bool = False) -> StatusCode:
    """Return the status with which a stream of these requests ends."""
    call = client.call(client.stub.TrainModel)
    try:
        for request in requests:
            with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # the call may have ended already
                await call.write(request)
        if half_close:
            await call.done_writing()
        return await status_of(call)
    finally:
        call.cancel()


def batch_request(batch: pb.Batch, **fields: Any) -> pb.TrainRequest:
    for name, value in fields.items():
        setattr(batch, name, value)
    return pb.TrainRequest(batch=batch)


async def test_a_stream_ends_with_the_status_of_what_was_wrong_and_another_run_does_not_notice(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    start = pb.TrainRequest(start=start_of(model, blobs))
    first = batches_of(blobs)[0]
    async with client.train(blobs, model=model, **OPTIONS | {"epochs": 50}) as undisturbed:
        cases: list[tuple[StatusCode, list[pb.TrainRequest], bool]] = [
            (INVALID, [batch_request(batches_of(blobs)[0])], False),
            (INVALID, [pb.TrainRequest()], False),
            (INVALID, [start, start], False),
            (INVALID, [start, pb.TrainRequest()], False),
            (RANGE, [start, batch_request(batches_of(blobs)[0], sequence=1)], False),
            (StatusCode.ALREADY_EXISTS, [start, pb.TrainRequest(batch=first), pb.TrainRequest(batch=first)], False),
            (UNFIT, [start, pb.TrainRequest(batch=first)], True),
            (UNFIT, [start, pb.TrainRequest(batch=pb.Batch(last=True))], False),
            (UNFIT, [], True),
            (INVALID, [start, pb.TrainRequest(batch=tensor(shape=[1, 8, 9, 1], data=bytes(72)))], False),
        ]
        for number, (code, requests, half_close) in enumerate(cases):
            assert await answer(client, *requests, half_close=half_close) is code, f"case {number}"
        disturbed = await undisturbed.result()
    alone = await client.train(blobs, model=model, **OPTIONS | {"epochs": 50}).result()
    assert disturbed.digest == alone.digest


async def test_a_run_with_a_key_can_be_sent_right_what_was_wrong(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    start = start_of(model, blobs, idempotency_key="mine")
    wrong = batch_request(batches_of(blobs)[0])
    wrong.batch.labels[0] = 17
    assert await answer(client, pb.TrainRequest(start=start), wrong) is RANGE
    async with calling(client, start) as call:
        assert (await call.read()).accepted.next_sequence == 0


async def test_what_is_no_message_at_all_is_an_invalid_argument(client: TrainingClient) -> None:
    channel: Any = client._channel
    assert channel is not None
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await channel.unary_unary("/asynctrain.v1.Training/GetRun")(b"\xff\xff\xff")
    assert refused.value.code() is INVALID
    call = channel.stream_stream("/asynctrain.v1.Training/TrainModel")()
    await call.write(b"\xff\xff\xff")
    assert await status_of(call) is INVALID


async def test_a_message_above_four_mebibytes_is_refused_by_grpc_itself(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    request = pb.TrainRequest(batch=tensor(data=bytes(5 * 2**20)))
    assert await answer(client, pb.TrainRequest(start=start_of(model, blobs)), request) is EXHAUSTED


async def test_an_unknown_run_is_not_found_whatever_is_asked_of_it(client: TrainingClient) -> None:
    run = client.run("magic")
    for ask in (run.info, run.pause, run.resume, run.stop, run.cancel, run.model, run.result):
        with pytest.raises(Refused) as refused:
            await ask()
        assert refused.value.code is StatusCode.NOT_FOUND
    with pytest.raises(Refused) as refused:
        await run.predict([png()])
    assert refused.value.code is StatusCode.NOT_FOUND


LIMITED: dict[str, tuple[Limits, Callable[[pb.Start], Any]]] = {
    "images in all epochs": (Limits(epoch_samples=100), lambda start: None),
    "bytes of a run": (Limits(run_bytes=2_000), lambda start: None),
    "bytes of all runs": (Limits(quota_bytes=2_000), lambda start: None),
    "images in a message": (Limits(message_images=29), lambda start: None),
    "the disk": (Limits(free_bytes=2**60), lambda start: None),
}


@pytest.mark.parametrize("limits", [limits for limits, _ in LIMITED.values()], ids=LIMITED.keys())
async def test_data_beyond_a_limit_is_refused(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model, limits: Limits
) -> None:
    requests = [pb.TrainRequest(batch=batch) for batch in batches_of(blobs)]
    async with serving(limits=limits) as server, TrainingClient(server.address) as client:
        assert await answer(client, pb.TrainRequest(start=start_of(model, blobs)), *requests) is EXHAUSTED


async def test_the_quota_is_of_runs_that_have_not_ended(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model
) -> None:
    limits = Limits(quota_bytes=blobs.images.nbytes)
    async with serving(limits=limits) as server, TrainingClient(server.address) as client:
        for _ in range(3):
            assert (await client.train(blobs, model=model, **OPTIONS).result()).reason == "finished"


@pytest.mark.parametrize("limits", [Limits(runs=2), Limits(runs_per_client=2)], ids=["of all", "of one"])
async def test_runs_beyond_the_queue_are_refused_until_one_has_ended(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model, limits: Limits
) -> None:
    async with serving(limits=limits) as server, TrainingClient(server.address) as client:
        starts = [pb.TrainRequest(start=start_of(model, blobs, idempotency_key=str(number))) for number in range(3)]
        async with calling(client, starts[0].start) as first, calling(client, starts[1].start) as second:
            run_id = (await first.read()).accepted.run_id
            await second.read()
            assert await answer(client, starts[2]) is EXHAUSTED
            await client.run(run_id).cancel()
            async with calling(client, starts[2].start) as third:
                assert (await third.read()).accepted.run_id


async def test_only_so_many_ended_runs_are_kept(serving: Serving, blobs: at.ArrayDataset, model: at.Model) -> None:
    async with serving(limits=Limits(ended_runs=2)) as server, TrainingClient(server.address) as client:
        names = [(await client.train(blobs, model=model, **OPTIONS).result()).run_id for _ in range(4)]
        async with asyncio.timeout(10):  # the oldest is removed when the end of the latest has been told
            while [info.run_id for info in await client.runs()] != names[:1:-1]:
                await asyncio.sleep(0.01)


async def test_predictions_are_asked_for_within_limits_and_of_runs_that_have_a_model(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with serving(limits=Limits(prediction_images=2)) as server, TrainingClient(server.address) as client:
        async with calling(client, start_of(model, blobs)) as call:
            waiting = client.run((await call.read()).accepted.run_id)
            with pytest.raises(Refused, match="no model") as refused:
                await waiting.predict([png()])
            assert refused.value.code is UNFIT
        async with client.train(blobs, model=model, **OPTIONS) as run:
            await run.result()
            for images, code in (([png()] * 3, EXHAUSTED), ([], INVALID), ([b"magic"], INVALID)):
                with pytest.raises(Refused) as refused:
                    await run.predict(images)
                assert refused.value.code is code
            assert len(await run.predict([png(), png(30, 20)])) == 2


async def test_a_training_that_diverges_has_failed_and_says_why(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    run = client.train(blobs, model=model, optimizer=at.optim.sgd(1e30), **OPTIONS)
    with pytest.raises(Refused, match="diverged") as refused:
        await run.result()
    assert refused.value.code is INVALID
    assert (await run.info()).state == pb.FAILED


def test_limits_are_read_from_toml_and_unknown_ones_refused(tmp_path: Any) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("running = 3\nidle_seconds = 1.5\n")
    assert Limits.load(file) == replace(Limits(), running=3, idle_seconds=1.5)
    file.write_text("magic = 3\n")
    with pytest.raises(ValueError, match="magic"):
        Limits.load(file)
    with pytest.raises(ValueError, match="runs must be above 0, got 0"):
        Limits(runs=0)


def test_a_tensor_of_the_right_kind_is_not_copied(blobs: at.ArrayDataset, model: at.Model) -> None:
    plan = parse_start(start_of(model, blobs), Limits())
    message = pb.Batch(tensor=tensor_of(blobs), labels=blobs.labels.tolist())
    samples = read_samples(message, plan.settings, 3, Limits())
    assert np.array_equal(samples.images, blobs.images)
    assert not samples.images.flags.owndata
