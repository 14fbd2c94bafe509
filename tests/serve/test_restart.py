"""Runs outlive connections and servers: the same bits and the same events, whatever was cut off on the way."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode, aio

import asynctrain as at
from asynctrain.serve import Refused, RemoteRun, TrainingClient
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.train.events import CheckpointSaved, Event, Resumed, RunEnd, StepEnd
from asynctrain.train.log import EventLog
from tests.ports import kept_port
from tests.serve.conftest import Serving
from tests.serve.proxy import Proxy
from tests.serve.remote import FOREVER, OPTIONS, RATE, batches_of, calling, reach, read_until, start_of, status_of

EPOCHS = 50  # 300 steps, about a second
LONG: dict[str, Any] = OPTIONS | {"epochs": EPOCHS, "checkpoint_steps": 20}


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Run these, which take long, on one loop: that of the command line."""
    return "asyncio", {"debug": True, "use_uvloop": True}


async def trained_long(data: at.ArrayDataset, model: at.Model, epochs: int = EPOCHS) -> str:
    loader = at.Loader(data, batch_size=16, image_size=(8, 8), channels=1, seed=3)
    async with at.ThreadExecutor(1) as executor:
        trainer = at.Trainer(model, optimizer=at.optim.adamw(RATE), executor=executor, microbatch=8, seed=3)
        return (await trainer.fit(loader, epochs=epochs)).state.digest()


@pytest.fixture(scope="module")
def digests() -> dict[str, str]:
    """Digests that are found once for all tests of this module, whose data are the same."""
    return {}


@pytest.fixture
async def whole(blobs: at.ArrayDataset, model: at.Model, digests: dict[str, str]) -> str:
    """Return the digest of the run that nobody interrupts."""
    if not digests:
        digests["whole"] = await trained_long(blobs, model)
    return digests["whole"]


async def events_of(run: RemoteRun) -> list[Event]:
    return [event async for event in run]


def require_whole(events: list[Event], epochs: int = EPOCHS) -> None:
    """Hold that no event was left out or told twice, and no step but those done again."""
    assert [event.number for event in events] == list(range(len(events)))
    steps = [event.step for event in events if isinstance(event, StepEnd)]
    assert sorted(set(steps)) == list(range(1, 6 * epochs + 1))
    ends = [event for event in events if isinstance(event, RunEnd)]
    assert ends[-1] == events[-1]
    assert ends[-1].reason == "finished"


@asynccontextmanager
async def served(folder: Path, port: int = 0) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Have a server in a process of its own, and its address."""
    command = [sys.executable, "-m", "asynctrain.cli", "serve", str(folder), "--grpc", "--json"]
    process = await asyncio.create_subprocess_exec(
        *command, "--port", str(port), "--executor", "threads:2", stdout=-1, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        yield process, json.loads(await process.stdout.readline())["address"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_server_that_is_killed_goes_on_from_the_checkpoint_and_so_does_the_watch(
    blobs: at.ArrayDataset, model: at.Model, tmp_path: Path, whole: str
) -> None:
    options = LONG | {"optimizer": at.optim.adamw(RATE), "idempotency_key": "mine"}
    with kept_port() as port:
        async with served(tmp_path, port) as (process, address), TrainingClient(address) as client:
            async with client.train(blobs, model=model, **options) as run, asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(events_of(run))
                await reach(run, 100)
                process.send_signal(signal.SIGKILL)
                await process.wait()
                async with served(tmp_path, port):
                    events = await watching
                    trained = await run.result()
                    assert await client.train(blobs, model=model, **options).result() == trained
    require_whole(events)
    assert trained.digest == whole
    (resumed,) = (event for event in events if isinstance(event, Resumed))
    saved = [event.step for event in events if isinstance(event, CheckpointSaved) and event.number < resumed.number]
    assert resumed.step >= max(saved) > 0


async def test_a_server_that_ends_saves_what_trains_and_the_next_one_goes_on(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model, whole: str
) -> None:
    async with serving() as server, TrainingClient(server.address, patience=0) as client:
        run = client.train(blobs, model=model, optimizer=at.optim.adamw(RATE), idempotency_key="mine", **LONG)
        await run.send()
        await reach(run, 50)
        async with asyncio.TaskGroup() as tasks:
            refused = tasks.create_task(refusal_of(run))
            await asyncio.sleep(0)
            await server.drain(10)
        assert refused.result() is StatusCode.UNAVAILABLE
    async with serving() as server, TrainingClient(server.address) as client:
        again = client.run(run.run_id)
        events = await events_of(again)
        assert (await again.result()).digest == whole
    require_whole(events)


async def refusal_of(run: RemoteRun) -> StatusCode:
    try:
        await events_of(run)
    except Refused as refused:
        return refused.code
    return StatusCode.OK


async def test_what_was_sent_before_the_server_ended_need_not_be_sent_again(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model, whole: str
) -> None:
    start = start_of(model, blobs, idempotency_key="mine", epochs=EPOCHS)
    async with serving() as server, TrainingClient(server.address) as client:
        async with calling(client, start, batches_of(blobs)[:2]) as call:
            await read_until(call, "credit")
            await read_until(call, "credit")
            await server.drain(1)
            assert await status_of(call) is StatusCode.UNAVAILABLE
    async with serving() as server, TrainingClient(server.address) as client, calling(client, start) as call:
        assert (await call.read()).accepted.next_sequence == 2
        await call.write(pb.TrainRequest(batch=batches_of(blobs, first=2)[0]))
        assert (await read_until(call, "done")).done.digest == whole


async def test_runs_that_wait_keep_their_order_through_a_restart(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model
) -> None:
    names = []
    async with serving() as server, TrainingClient(server.address) as client:
        for number in range(4):
            run = client.train(blobs, model=model, idempotency_key=str(number), **OPTIONS | {"epochs": FOREVER})
            await run.send()
            names.append(run.run_id)
    async with serving() as server, TrainingClient(server.address) as client:
        assert [(await client.run(name).info()).queue_position for name in names] == [0, 1, 2, 3]


async def test_a_paused_run_is_still_paused_after_a_restart(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model, whole: str
) -> None:
    async with serving() as server, TrainingClient(server.address) as client:
        run = client.train(blobs, model=model, optimizer=at.optim.adamw(RATE), idempotency_key="mine", **LONG)
        await run.send()
        await run.pause()
    async with serving() as server, TrainingClient(server.address) as client:
        again = client.run(run.run_id)
        assert (info := await again.info()).state == pb.PAUSED
        assert info.next_event > 0
        await again.resume()
        assert (await again.result()).digest == whole
        assert (await again.info()).next_event == len(await events_of(again))


async def test_ended_runs_are_known_after_a_restart_with_their_models(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with serving() as server, TrainingClient(server.address) as client:
        async with client.train(blobs, model=model, **OPTIONS) as run:
            events = await events_of(run)
            trained, predicted = await run.result(), await run.predict(blobs.images[:3])
            assert (await run.info()).next_event == len(events)
    async with serving() as server, TrainingClient(server.address) as client:
        again = client.run(run.run_id)
        assert await events_of(again) == events
        assert await again.result() == trained
        assert await again.predict(blobs.images[:3]) == predicted
        assert (await again.info()).next_event == len(events)


@pytest.mark.parametrize("number", [0, 1, 100, 10**9])
async def test_a_watch_begins_at_any_event(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model, number: int
) -> None:
    async with client.train(blobs, model=model, **OPTIONS | {"epochs": 30}) as run:
        live = [event async for event in run.events(number)] if number < 10**9 else []
        await run.result()
        everything = await events_of(run)
        assert [event async for event in run.events(number)] == everything[number:]
        assert live in ([], everything[number:])


async def test_a_watch_that_falls_behind_gets_what_memory_has_lost_from_the_disk(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Short(EventLog):
        def __init__(self, *args: Any) -> None:
            super().__init__(args[0], args[1], 5)

    monkeypatch.setattr("asynctrain.train.training.EventLog", Short)
    async with serving() as server, TrainingClient(server.address) as client:
        options = OPTIONS | {"epochs": 1_000_000}
        async with client.train(blobs, model=model, **options) as run:
            async with asyncio.timeout(30):
                while (await run.info()).step < 300:
                    await asyncio.sleep(0.01)
            events = []
            async for event in run.events():
                events.append(event)
                if len(events) == 200:
                    break
    assert [event.number for event in events] == list(range(200))
    assert not any(isinstance(event, at.events.Missed) for event in events)


@pytest.mark.parametrize("fault", ["drop", "delay", "throttle"])
async def test_a_connection_that_breaks_in_mid_stream_is_taken_up_again_and_changes_no_bit(
    server: Any, blobs: at.ArrayDataset, model: at.Model, whole: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asynctrain.serve import client as client_module

    monkeypatch.setattr(client_module, "PIECE", 640)  # ten images a message
    left = await require_same_through(
        [(fault, 3_000), (fault, 9_000), (fault, 20_000)], server.port, blobs, model, whole
    )
    assert len(left) == (0 if fault == "drop" else 2)


async def test_the_result_is_asked_for_again_where_the_connection_is_lost_after_the_last_event(
    server: Any, blobs: at.ArrayDataset, model: at.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_of: Any = TrainingClient.__dict__["stub"].fget
    answered = []

    def with_a_loss(client: TrainingClient) -> Any:
        stub = stub_of(client)
        answer = stub.GetRun

        async def get_run(request: pb.GetRunRequest, **options: Any) -> Any:
            answered.append(request.run_id)
            if len(answered) <= 2:
                raise aio.AioRpcError(StatusCode.UNAVAILABLE, aio.Metadata(), aio.Metadata(), "Socket closed", None)
            return await answer(request, **options)

        stub.GetRun = get_run
        return stub

    async with TrainingClient(server.address) as client:
        run = client.train(blobs, model=model, **OPTIONS)
        await events_of(run)
        monkeypatch.setattr(TrainingClient, "stub", property(with_a_loss))
        assert (await run.result()).digest
    assert answered == [run.run_id] * 3


async def require_same_through(
    plan: list[tuple[str, int]], port: int, data: at.ArrayDataset, model: at.Model, whole: str
) -> list[tuple[str, int]]:
    """Hold that a run through connections with faults gets every event and ends with the same bits.

    Returns:
        The faults of connections that were not needed.
    """
    async with Proxy(port) as proxy, TrainingClient(f"127.0.0.1:{proxy.port}") as client:
        proxy.plan = plan
        run = client.train(data, model=model, optimizer=at.optim.adamw(RATE), idempotency_key="mine", **LONG)
        events = await events_of(run)
        trained = await run.result()
    require_whole(events)
    assert trained.digest == whole
    return proxy.plan
