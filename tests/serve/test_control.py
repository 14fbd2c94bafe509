"""What is asked of a run from afar, and what becomes of runs that nobody wants any more."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode, aio

import asynctrain as at
from asynctrain.serve import Limits, Refused, RemoteRun, TrainingClient
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve import asynctrain_pb2_grpc as rpc
from asynctrain.train.events import Paused, Resumed, RunEnd, StepEnd
from tests.conftest import open_files
from tests.serve.conftest import Serving
from tests.serve.layers import SECONDS, Slow
from tests.serve.proxy import Proxy
from tests.serve.remote import (
    FOREVER,
    OPTIONS,
    RATE,
    batches_of,
    calling,
    reach,
    read_until,
    start_of,
    status_of,
    trained_here,
)

pytestmark = pytest.mark.one_loop

ENDLESS: dict[str, Any] = OPTIONS | {"epochs": FOREVER}


async def until(state: pb.RunState.ValueType, run: RemoteRun) -> pb.RunInfo:
    async with asyncio.timeout(10):
        while (info := await run.info()).state != state:
            await asyncio.sleep(0.01)
    return info


async def test_a_paused_run_trains_nothing_until_it_is_resumed_and_ends_with_the_same_bits(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    here = await trained_here(blobs, model)
    async with client.train(blobs, model=model, optimizer=at.optim.adamw(RATE), **OPTIONS) as run:
        await until(pb.RUNNING, run) if (await run.info()).state == pb.QUEUED else None
        steps = await run.pause()
        assert (await run.pause()) == steps
        assert (await run.info()).state == pb.PAUSED
        await asyncio.sleep(0.05)
        assert (await run.info()).step == steps
        await run.resume()
        await run.resume()
        events = [event async for event in run]
        assert (await run.result()).digest == here.state.digest()
    assert [event.step for event in events if isinstance(event, Paused | Resumed)] == [steps, steps]


async def test_a_stopped_run_ends_normally_and_stopping_it_again_does_no_harm(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with client.train(blobs, model=model, **ENDLESS) as run:
        await reach(run, 3)
        stopped = await run.stop()
        assert stopped.reason == "stopped"
        assert stopped.step >= 3
        assert await run.stop() == stopped == await run.result()
        await run.cancel()
        assert (await run.info()).state == pb.STOPPED


async def test_cancelling_stops_the_computing_within_a_second_and_again_does_no_harm(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with client.train(blobs, model=model, **ENDLESS) as run:
        await reach(run, 2)
        start = time.perf_counter()
        await run.cancel()
        assert time.perf_counter() - start < 1
        await run.cancel()
        info = await run.info()
        assert info.state == pb.CANCELLED
        assert info.failed.code == StatusCode.CANCELLED.value[0]
        events = [event async for event in run]
        assert isinstance(events[-1], RunEnd)
        assert events[-1].reason == "cancelled"
        with pytest.raises(Refused, match="cancelled") as refused:
            await run.result()
    assert refused.value.code is StatusCode.CANCELLED


@pytest.mark.parametrize("how", ["asked", "hung up"])
async def test_a_clients_cancel_stops_the_computing_within_a_second_in_the_midst_of_a_microbatch(
    client: TrainingClient, blobs: at.ArrayDataset, how: str
) -> None:
    slow = at.Model([*(Slow() for _ in range(50)), at.nn.Flatten(), at.nn.Dense(3)], input_shape=(8, 8, 1))
    Slow.passes.clear()
    async with calling(client, start_of(slow, blobs), batches_of(blobs)) as call:
        run = client.run((await call.read()).accepted.run_id)
        async with asyncio.timeout(10):
            while len(Slow.passes) < 2:  # of 50 for each microbatch, a fifth of a second each
                await asyncio.sleep(0.01)
        left = time.monotonic()
        if how == "asked":
            await run.cancel()
    await until(pb.CANCELLED, run)
    assert time.monotonic() - left < 1
    await asyncio.sleep(3 * SECONDS)
    assert Slow.passes[-1] - left < 1


async def test_leaving_the_block_of_a_run_cancels_it(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with client.train(blobs, model=model, **ENDLESS) as run:
        await reach(run, 2)
    assert (await client.run(run.run_id).info()).state == pb.CANCELLED


async def test_a_run_with_a_key_goes_on_when_its_block_is_left_and_is_found_again_by_it(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    here = await trained_here(blobs, model)
    options = OPTIONS | {"optimizer": at.optim.adamw(RATE), "idempotency_key": "mine"}
    async with client.train(blobs, model=model, **options) as first:
        pass
    async with client.train(blobs, model=model, **options) as second:
        assert second.run_id == first.run_id
        assert (await second.result()).digest == here.state.digest()
    assert len(await client.runs()) == 1


async def test_a_key_that_stands_for_another_start_is_refused(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with client.train(blobs, model=model, idempotency_key="mine", **OPTIONS):
        with pytest.raises(Refused, match="another Start") as refused:
            await client.train(blobs, model=model, idempotency_key="mine", **OPTIONS | {"epochs": 5}).result()
    assert refused.value.code is StatusCode.ALREADY_EXISTS


async def test_a_call_without_a_key_that_is_cancelled_takes_its_run_with_it(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with calling(client, start_of(model, blobs, epochs=FOREVER), batches_of(blobs)) as call:
        run_id = (await call.read()).accepted.run_id
        await read_until(call, "progress")
        left = time.perf_counter()
    await until(pb.CANCELLED, client.run(run_id))
    assert time.perf_counter() - left < 1


async def test_a_call_of_the_small_kind_that_runs_out_of_time_takes_its_run_with_it(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    (batch,) = batches_of(blobs, 90)
    request = pb.TrainModelRequest(
        start=start_of(model, blobs, epochs=FOREVER), tensor=batch.tensor, labels=batch.labels
    )
    with pytest.raises(Refused) as refused:
        await client.ask(client.stub.TrainModelUnary, request, timeout=0.5)
    assert refused.value.code is StatusCode.DEADLINE_EXCEEDED
    (info,) = await client.runs()
    await until(pb.CANCELLED, client.run(info.run_id))


async def test_of_two_streams_for_one_run_the_later_one_wins_and_goes_on_where_the_first_was(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    here = await trained_here(blobs, model)
    start = start_of(model, blobs, idempotency_key="mine")
    async with calling(client, start, batches_of(blobs)[:1]) as first:
        run_id = (await first.read()).accepted.run_id
        await read_until(first, "credit")
        async with calling(client, start) as second:
            accepted = (await second.read()).accepted
            assert (accepted.run_id, accepted.next_sequence) == (run_id, 1)
            assert await status_of(first) is StatusCode.ABORTED
            for batch in batches_of(blobs, first=1):
                await second.write(pb.TrainRequest(batch=batch))
            assert (await read_until(second, "done")).done.digest == here.state.digest()


async def test_runs_beyond_the_limit_wait_in_order_of_arrival_and_one_that_waits_can_be_cancelled(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    runs = [
        client.train(blobs, model=model, idempotency_key=f"run {number}", **OPTIONS | {"epochs": epochs})
        for number, epochs in enumerate((FOREVER, 1, 1, 1))
    ]
    for run in runs:
        await run.send()
    first, second, third, fourth = runs
    await until(pb.RUNNING, first)
    assert [(await run.info()).queue_position for run in runs] == [0, 1, 2, 3]
    with pytest.raises(Refused, match="QUEUED") as refused:
        await third.pause()
    assert refused.value.code is StatusCode.FAILED_PRECONDITION
    await third.cancel()
    assert (await third.info()).state == pb.CANCELLED
    assert (await fourth.info()).queue_position == 2
    await first.cancel()
    one, other = [[event async for event in run if isinstance(event, StepEnd | RunEnd)] for run in (second, fourth)]
    assert len(one) == len(other) == 7
    assert max(event.time for event in one) <= min(event.time for event in other)


async def test_what_an_ended_run_is_asked_for_is_refused_by_its_state(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with client.train(blobs, model=model, **OPTIONS) as run:
        await run.result()
        for asked in (run.pause, run.resume):
            with pytest.raises(Refused, match="FINISHED") as refused:
                await asked()
            assert refused.value.code is StatusCode.FAILED_PRECONDITION


async def test_runs_are_listed_page_by_page_the_latest_first(
    client: TrainingClient, blobs: at.ArrayDataset, model: at.Model
) -> None:
    made = []
    for number in range(5):
        async with calling(client, start_of(model, blobs, idempotency_key=str(number))) as call:
            made.append((await call.read()).accepted.run_id)
    first = await client.ask(client.stub.ListRuns, pb.ListRunsRequest(page_size=3))
    rest = await client.ask(client.stub.ListRuns, pb.ListRunsRequest(page_size=3, page_token=first.next_page_token))
    assert [info.run_id for info in (*first.runs, *rest.runs)] == made[::-1]
    assert rest.next_page_token == ""


async def test_a_hundred_clients_that_connect_and_vanish_leave_nothing_behind(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model, tmp_path: Path
) -> None:
    limits = Limits(runs=200, runs_per_client=200)
    async with (
        serving(limits=limits) as server,
        TrainingClient(server.address) as client,
        Proxy(server.port) as proxy,
    ):
        await client.runs()
        files, tasks = len(open_files()), len(asyncio.all_tasks())
        proxy.plan = [("drop", 100 * number) for number in range(50)]

        async def send(stub: Any, number: int) -> None:
            call = stub.TrainModel()
            with suppress(aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(pb.TrainRequest(start=start_of(model, blobs, epochs=FOREVER)))
                for batch in batches_of(blobs, 10)[: number % 4]:
                    await call.write(pb.TrainRequest(batch=batch))
                if number % 3:
                    await call.read()
            call.cancel()

        async def vanish(number: int) -> None:
            if number % 2:
                await send(client.stub, number)
            else:  # on a connection of its own, which is cut
                own = aio.insecure_channel(f"127.0.0.1:{proxy.port}", [("grpc.use_local_subchannel_pool", 1)])
                await send(rpc.TrainingStub(own), number)
                await own.close(None)

        await asyncio.gather(*(vanish(number) for number in range(100)))
        async with asyncio.timeout(20):
            while await client.runs() or len(open_files()) > files or len(asyncio.all_tasks()) > tasks:
                await asyncio.sleep(0.05)
        assert list((tmp_path / "service" / "runs").iterdir()) == []
        assert "0 bytes" in repr(server.runs)
        trained = await client.train(blobs, model=model, **OPTIONS).result()
        assert trained.reason == "finished"


async def test_a_run_with_a_key_whose_client_does_not_come_back_is_discarded_in_the_end(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with serving(limits=Limits(linger_seconds=0.2)) as server, TrainingClient(server.address) as client:
        async with calling(client, start_of(model, blobs, idempotency_key="mine")) as call:
            await call.read()
            await asyncio.sleep(0.4)  # a client that is there may take its time
            assert len(await client.runs()) == 1
        async with asyncio.timeout(5):
            while await client.runs():
                await asyncio.sleep(0.02)


async def test_a_client_with_data_left_to_send_may_not_be_silent_for_too_long(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with (
        serving(limits=Limits(idle_seconds=0.1)) as server,
        TrainingClient(server.address) as client,
        calling(client, start_of(model, blobs)) as call,
    ):
        assert await status_of(call) is StatusCode.DEADLINE_EXCEEDED
