"""A run on the service is the run of the same data here, whatever the way the data came."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import asynctrain as at
from asynctrain.serve import TrainingClient
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.train.events import CheckpointSaved, RunEnd
from tests.serve.conftest import Serving
from tests.serve.remote import OPTIONS, RATE, batches_of, calling, read_until, start_of, tensor_of, trained_here

pytestmark = pytest.mark.one_loop


@pytest.fixture
async def here(blobs: at.ArrayDataset, model: at.Model) -> at.History:
    return await trained_here(blobs, model)


async def test_a_run_on_the_service_ends_with_the_bits_and_the_events_of_a_run_here(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model, tmp_path: Path
) -> None:
    here = await trained_here(blobs, model, tmp_path / "here")
    told = [at.events.from_json(line) for line in _lines(tmp_path / "here" / "history.jsonl")]
    optimizer = at.optim.adamw(RATE)
    async with client.train(blobs, model=model, optimizer=optimizer, **OPTIONS) as run:
        events = [event async for event in run]
        trained = await run.result()
    assert trained.digest == here.state.digest()
    assert trained.step == here.state.step
    assert trained.metrics["loss"] == here.epochs[-1].loss
    assert [event.number for event in events] == list(range(len(events)))
    assert _but_checkpoints(events) == _but_checkpoints(told)


def _lines(path: Path) -> list[dict[str, object]]:
    import json

    return [json.loads(line) for line in path.read_text().splitlines()]


def _but_checkpoints(events: list[at.events.Event]) -> list[at.events.Event]:
    """Leave out what depends on how fast the disk is."""
    return [event for event in events if not isinstance(event, CheckpointSaved)]


@pytest.mark.parametrize("size", [1, 7, 90])
async def test_how_the_data_is_cut_into_messages_changes_nothing(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model, here: at.History, size: int
) -> None:
    async with calling(client, start_of(model, blobs), batches_of(blobs, size)) as call:
        done = (await read_until(call, "done")).done
        assert await call.read() is not None
        assert (await call.code()).name == "OK"
    assert done.digest == here.state.digest()


async def test_the_last_message_may_be_empty(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model, here: at.History
) -> None:
    batches = batches_of(blobs, 45)
    batches[-1].last = False
    async with calling(client, start_of(model, blobs), [*batches, pb.Batch(sequence=2, last=True)]) as call:
        assert (await read_until(call, "done")).done.digest == here.state.digest()


async def test_pixels_from_0_to_1_are_the_8_bits_that_they_were_made_of(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model, here: at.History
) -> None:
    (batch,) = batches_of(blobs, 90)
    shares = blobs.images.astype("<f4") / 255
    batch.tensor.CopyFrom(pb.Tensor(dtype=pb.Tensor.FLOAT32, shape=shares.shape, data=shares.tobytes()))
    async with calling(client, start_of(model, blobs), [batch]) as call:
        assert (await read_until(call, "done")).done.digest == here.state.digest()


async def test_image_files_are_sent_as_they_are_and_train_as_they_do_here(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model, tmp_path: Path
) -> None:
    for number in range(len(blobs)):
        path = tmp_path / "blobs" / blobs.classes[blobs.labels[number]] / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(blobs.images[number, :, :, 0]).save(path)
    folder = at.ImageFolder(tmp_path / "blobs")
    here = await trained_here(folder, model)  # type: ignore[arg-type]
    async with client.train(folder, model=model, optimizer=at.optim.adamw(RATE), **OPTIONS) as run:
        assert (await run.result()).digest == here.state.digest()


async def test_a_ready_model_is_made_by_its_name_and_arguments(client: TrainingClient, blobs: at.ArrayDataset) -> None:
    model = at.models.mlp(num_classes=3, image_shape=(8, 8, 1), hidden=[5])
    here = await trained_here(blobs, model)
    run = client.train(
        blobs,
        model="mlp",
        image_shape=(8, 8, 1),
        arguments={"hidden": [5]},
        optimizer=at.optim.adamw(RATE),
        **OPTIONS,
    )
    assert (await run.result()).digest == here.state.digest()


async def test_a_holdout_is_the_split_that_the_library_makes_and_is_tested_with_after_each_epoch(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model, executor: at.ThreadExecutor
) -> None:
    train, test = blobs.split(0.8, seed=3)
    trainer = at.Trainer(model, optimizer=at.optim.adamw(RATE), executor=executor, microbatch=8, seed=3)
    loader = at.Loader(train, batch_size=16, image_size=(8, 8), channels=1, seed=3)
    here = await trainer.fit(loader, epochs=4, validate=test)
    async with client.train(blobs, model=model, optimizer=at.optim.adamw(RATE), holdout=0.2, **OPTIONS) as run:
        epochs = [event async for event in run if isinstance(event, at.events.EpochEnd)]
        trained = await run.result()
    assert tuple(epochs) == here.epochs
    validation = here.epochs[-1].validation
    assert validation is not None
    assert trained.metrics["validation.accuracy"] == validation.accuracy
    assert trained.digest == here.state.digest()


async def test_one_message_trains_too(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model, here: at.History
) -> None:
    request = pb.TrainModelRequest(start=start_of(model, blobs), tensor=tensor_of(blobs), labels=blobs.labels.tolist())
    response = await client.ask(client.stub.TrainModelUnary, request)
    assert response.done.digest == here.state.digest()
    assert response.done.metrics["accuracy"] == here.epochs[-1].accuracy
    assert (await client.run(response.run_id).info()).state == pb.FINISHED


async def test_the_model_that_comes_back_is_the_one_that_was_trained_and_predicts_alike(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model, here: at.History, tmp_path: Path
) -> None:
    async with client.train(blobs, model=model, optimizer=at.optim.adamw(RATE), **OPTIONS) as run:
        await run.result()
        await run.save(tmp_path / "model.safetensors")
        mine, theirs = at.Classifier.load(tmp_path / "model.safetensors"), await run.model()
        predictions = await run.predict(blobs.images[:5], top_k=2)
    assert mine.classes == blobs.classes
    assert all(np.array_equal(mine.params[name], array) for name, array in here.state.params.items())
    assert all(np.array_equal(theirs.params[name], array) for name, array in here.state.params.items())
    assert predictions == await mine.predict(list(blobs.images[:5]), top_k=2)


async def test_the_model_can_be_had_and_asked_while_it_trains(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with client.train(blobs, model=model, **OPTIONS | {"epochs": 100_000}) as run:
        await run.pause()
        classifier = await run.model()
        assert await run.predict(blobs.images[:3]) == await classifier.predict(list(blobs.images[:3]))


async def test_a_model_that_is_fetched_leaves_no_file_behind_even_while_it_is_sent_or_when_that_is_broken_off(
    client: TrainingClient, tmp_path: Path
) -> None:
    data = at.ArrayDataset(np.zeros((4, 64, 64, 3), np.uint8), np.arange(4) % 2)
    model = at.models.mlp(num_classes=2, image_shape=(64, 64, 3), hidden=(512,))  # 25 MB, which waits to be read
    async with client.train(data, model=model, epochs=100_000) as run:
        await run.pause()
        folder = tmp_path / "service" / "runs" / run.run_id / "run"
        before = sorted(folder.iterdir())
        for read in (0, 1, 3):
            call = client.call(client.stub.GetModel, pb.GetModelRequest(run_id=run.run_id))
            for _ in range(read):
                assert len((await call.read()).data) == 2**20
                assert sorted(folder.iterdir()) == before
            call.cancel()
        await run.model()
        assert sorted(folder.iterdir()) == before


async def test_each_message_stored_gives_its_credit_back_and_events_are_numbered_without_a_gap(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with calling(client, start_of(model, blobs)) as call:
        accepted = (await call.read()).accepted
        assert (accepted.next_sequence, accepted.complete, accepted.state) == (0, False, pb.RECEIVING)
        assert accepted.credits >= 1
        for number, batch in enumerate(batches_of(blobs, 30)):
            await call.write(pb.TrainRequest(batch=batch))
            credit = (await call.read()).credit
            assert (credit.credits, credit.next_sequence) == (1, number + 1)
        events = [await call.read()]
        while events[-1].WhichOneof("kind") != "done":
            events.append(await call.read())
    assert [event.number for event in events] == list(range(len(events)))
    assert events[0].WhichOneof("kind") == "started"


async def test_two_runs_at_once_end_with_the_bits_that_they_have_alone(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model, here: at.History
) -> None:
    from asynctrain.serve import Limits

    async with serving(limits=Limits(running=2)) as server, TrainingClient(server.address) as client:
        runs = [client.train(blobs, model=model, optimizer=at.optim.adamw(RATE), **OPTIONS) for _ in range(2)]
        first, second = await asyncio.gather(*(run.result() for run in runs))
    assert first.digest == second.digest == here.state.digest()
    assert first.run_id != second.run_id


def test_data_with_weights_are_refused_as_the_service_would_drop_them(blobs: at.ArrayDataset) -> None:
    weighted = at.ArrayDataset(blobs.images, blobs.labels, weights=np.ones(len(blobs)))
    with pytest.raises(ValueError, match="weights"):
        TrainingClient("127.0.0.1:1").train(weighted, model="linear", image_shape=(8, 8, 1), epochs=1)


async def test_listening_without_a_block_trains_to_the_end(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    events = [event async for event in client.train(blobs, model=model, **OPTIONS)]
    assert isinstance(events[-1], RunEnd)
    assert events[-1].reason == "finished"
