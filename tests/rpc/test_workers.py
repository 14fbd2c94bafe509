"""The worker role: machines that compute for a training elsewhere."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc import StatusCode, aio

import asynctrain as at
from asynctrain import nn
from asynctrain._aio import in_thread
from asynctrain.errors import ClosedError, ExecutorError, FingerprintError, WorkerLostError
from asynctrain.executors.ledger import Patience
from asynctrain.rpc import TLS, Access, GrpcExecutor, Tokens, Worker, WorkerLimits, dial, dialling, listen
from asynctrain.rpc import link as links
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.codec import Cargo
from asynctrain.rpc.link import PROTOCOL, SCHEMA
from asynctrain.rpc.wire import SERVICE
from asynctrain.types import ForwardWork, GradientWork, Notice, Program, WorkerJoined, WorkerLost
from tests.rpc import fuzzing
from tests.serve.test_security import of

pytestmark = pytest.mark.one_loop

MODEL = nn.models.lenet(num_classes=10, image_shape=(12, 12, 1))
PROGRAM = Program(MODEL.to_json(), seed=1)
PARAMS = MODEL.init(0)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (16, 12, 12, 1), dtype=np.uint8)
WORK = [GradientWork(0, i, 2, IMAGES[8 * i : 8 * i + 8], np.arange(8)) for i in range(2)]
TOKEN = "worker-0123456789abcdef"  # noqa: S105 - of nobody


async def bits(session: at.Session, work: GradientWork = WORK[0], version: int = 0) -> bytes:
    result = await session.compute(work, version)
    vector = result.gradients.vector.tobytes()
    result.release()
    return vector


async def expected() -> bytes:
    async with at.InlineExecutor() as inline, inline.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        return await bits(session)


async def until(holds: object, seconds: float = 10.0) -> None:
    assert callable(holds)
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(
    executor: at.Executor | None = None, access: Access | None = None, **options: object
) -> AsyncIterator[tuple[Worker, str]]:
    async with executor or at.ThreadExecutor(1) as home:
        worker = Worker(home, capacity=1, **options)  # type: ignore[arg-type]
        async with listen(worker, "127.0.0.1:0", access) as port:
            yield worker, f"127.0.0.1:{port}"


# Joining and leaving


async def test_a_worker_that_dials_in_during_a_training_takes_part_from_the_next_step_on() -> None:
    notices: list[Notice] = []
    async with (
        GrpcExecutor(listen="127.0.0.1:0") as executor,
        at.ThreadExecutor(1) as first,
        at.ThreadExecutor(1) as second,
    ):
        address = await executor.listening()
        async with dialling(Worker(first, node="first", capacity=1), address):
            async with executor.open(PROGRAM, notices.append) as session:
                await session.broadcast(PARAMS, {}, 0)
                assert session.slots == 1
                async with dialling(Worker(second, node="second", capacity=1), address):
                    await until(lambda: session.slots == 2)
                    await session.broadcast(PARAMS, {}, 1)
                    assert await bits(session, version=1) == await expected()
                assert session.slots == 1, "it has left"
                assert await bits(session, version=1) == await expected()
    joined = [notice.address for notice in notices if isinstance(notice, WorkerJoined)]
    assert [address.split()[0] for address in joined] == ["first", "second"]
    assert next(notice.reason for notice in notices if isinstance(notice, WorkerLost)) == "it left, as it was asked to"


async def test_a_worker_that_drains_finishes_what_it_has(worker: tuple[Worker, str]) -> None:
    large = GradientWork(0, 0, 1, np.repeat(IMAGES, 40, axis=0), np.arange(640) % 10)
    async with GrpcExecutor(worker[1], worker_wait=1) as executor, executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        task = asyncio.create_task(session.compute(large, 0))
        await asyncio.sleep(0.02)
        await worker[0].drain()
        (await task).release()
        with pytest.raises(WorkerLostError, match="it left, as it was asked to"):
            await session.compute(WORK[0], 0)


async def test_a_listening_worker_serves_two_coordinators_that_do_not_see_each_other(
    worker: tuple[Worker, str],
) -> None:
    async with GrpcExecutor(worker[1]) as one, GrpcExecutor(worker[1]) as other:
        async with one.open(PROGRAM) as first, other.open(PROGRAM) as second:
            await first.broadcast(PARAMS, {}, 0)
            await second.broadcast(MODEL.init(5), {}, 0)
            results = await asyncio.gather(bits(first), bits(second), bits(first))
    assert results[0] == results[2] == await expected()
    assert results[1] != results[0]


async def test_without_a_worker_opening_a_session_says_so_in_time() -> None:
    async with GrpcExecutor(listen="127.0.0.1:0", join_wait=0.2) as executor:
        with pytest.raises(WorkerLostError, match=r"no worker within 0\.2 s"):
            async with executor.open(PROGRAM):
                pass


async def test_a_worker_that_goes_and_comes_back_at_its_address_is_dialled_again() -> None:
    async with serving() as (_, address):
        executor = GrpcExecutor(address)
        stack = executor.open(PROGRAM)
        session = await stack.__aenter__()
        await session.broadcast(PARAMS, {}, 0)
    try:
        async with at.ThreadExecutor(1) as home, listen(Worker(home, capacity=1), address):
            assert await bits(session) == await expected()
    finally:
        await stack.__aexit__(None, None, None)
        await executor.aclose()


# What reaches the other side


async def test_a_cancelled_computation_stops_there() -> None:
    """A long one, on the worker's only thread, is out of the way of the next in a fraction of its time."""
    slow = nn.Model([nn.Conv2D(32, 5), *[nn.Conv2D(32, 5)] * 6, nn.Flatten(), nn.Dense(10)], (32, 32, 3))
    images = RNG.integers(0, 256, (32, 32, 32, 3), dtype=np.uint8)
    long, short = (GradientWork(0, 0, 1, images[:n], np.arange(n) % 10) for n in (32, 1))
    async with serving() as (worker, address), GrpcExecutor(address) as executor:
        async with executor.open(Program(slow.to_json())) as session:
            await session.broadcast(slow.init(0), {}, 0)
            await bits(session, short)
            start = time.perf_counter()
            await bits(session, long)
            whole = time.perf_counter() - start
            task = asyncio.create_task(session.compute(long, 0))
            await asyncio.sleep(whole / 10)
            start = time.perf_counter()
            task.cancel()
            await bits(session, short)
            assert time.perf_counter() - start < whole / 2
            assert worker.coordinators == 1


async def test_memory_of_parameters_and_results_is_used_again(worker: tuple[Worker, str]) -> None:
    async with GrpcExecutor(worker[1]) as executor, executor.open(PROGRAM) as session:
        places = set()
        for version in range(6):
            await session.broadcast(PARAMS, {}, version)
            result = await session.compute(WORK[0], version)
            places.add(result.gradients.vector.ctypes.data)
            result.release()
        assert len(places) == 1
        (coordinator,) = worker[0]._coordinators
        (opened,) = coordinator._sessions.values()
        assert len(opened.boards) <= 2


async def test_large_parameters_arrive_in_many_frames_and_gradients_come_back(worker: tuple[Worker, str]) -> None:
    wide = nn.models.mlp(num_classes=10, image_shape=(32, 32, 3), hidden=(1_000,))
    program, params = Program(wide.to_json()), wide.init(0)
    assert params.vector.nbytes > 5 * 2**21
    work = GradientWork(0, 0, 1, RNG.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), np.arange(4))

    async def of(executor: at.Executor) -> bytes:
        async with executor.open(program) as session:
            await session.broadcast(dict(params), {}, 0)
            return await bits(session, work)

    async with GrpcExecutor(worker[1]) as executor, at.InlineExecutor() as inline:
        assert await of(executor) == await of(inline)


async def test_parameters_of_another_model_are_refused_here(worker: tuple[Worker, str]) -> None:
    async with GrpcExecutor(worker[1]) as executor, executor.open(PROGRAM) as session:
        with pytest.raises(ValueError, match="params must have the names"):
            await session.broadcast({"w": np.zeros(3, np.float32)}, {}, 0)


# Limits


async def test_a_model_beyond_the_limits_is_refused_before_anything_is_allocated() -> None:
    huge = nn.Model([nn.Flatten(), nn.Dense(10**9)], (100, 100, 1))
    async with serving() as (_, address), GrpcExecutor(address) as executor:
        with pytest.raises(ValueError, match="bytes of parameters"):
            async with executor.open(Program(huge.to_json())):
                pass
        async with executor.open(PROGRAM) as session:
            await session.broadcast(PARAMS, {}, 0)
            assert await bits(session) == await expected()


async def test_a_coordinator_too_many_is_turned_away() -> None:
    async with serving(limits=WorkerLimits(streams=1)) as (_, address):
        async with GrpcExecutor(address) as one, one.open(PROGRAM), GrpcExecutor(address, join_wait=0.3) as two:
            with pytest.raises(WorkerLostError):
                async with two.open(PROGRAM):
                    pass


async def test_announcements_of_more_bytes_than_may_be_under_way_are_refused() -> None:
    limits = WorkerLimits(pending_bytes=2**20)
    announced = Cargo.of_arrays({"images": np.zeros((2**17, 2, 2, 1), np.uint8)}).groups()
    async with serving(limits=limits) as (_, address), aio.insecure_channel(address) as channel:
        call = fuzzing.Call(channel, "Serve", pb.FromWorker)
        await call.say(WELCOME)
        await call.say(pb.FromCoordinator(open=pb.Open(session=1, program=json.dumps(fuzzing.PROGRAM.to_json()))))
        await call.hear("opened")
        for work in range(3):
            assign = pb.Assign(session=1, work=work, prediction=pb.Prediction(), groups=announced)
            await call.say(pb.FromCoordinator(assign=assign))
        assert await call.status() == StatusCode.INVALID_ARGUMENT


async def test_whoever_does_not_read_what_it_is_sent_loses_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf:
        async def read(self) -> object:
            return await asyncio.Event().wait()

        async def write(self, message: bytes) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(links, "UNREAD", 100)
    link = links.Link(Deaf(), pb.FromWorker, pb.FromCoordinator(heartbeat=pb.Heartbeat()), 60.0)
    async with asyncio.TaskGroup() as group:
        running = group.create_task(link.run(lambda kind, said: asyncio.sleep(0)))
        await asyncio.sleep(0)
        for _ in range(20):
            link.say(pb.FromCoordinator(open=pb.Open(program="a program")))
        assert await running == "it does not read what it is sent"


# The wire, by hand


def bytes_of(message: pb.FromCoordinator | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


async def said_after(address: str, *messages: pb.FromCoordinator | bytes) -> StatusCode:
    """Say these things to a listening worker, and return how it ends the stream."""

    def say() -> StatusCode:
        with grpc.insecure_channel(address) as channel:
            serve: Any = channel.stream_stream(f"/{SERVICE}/Serve", bytes_of, pb.FromWorker.FromString)
            call = serve(iter(messages), timeout=20)
            with suppress(grpc.RpcError):
                for _ in call:
                    pass
            code: StatusCode = call.code()
            return code

    return await in_thread(say)


WELCOME = pb.FromCoordinator(welcome=pb.Welcome(protocol=PROTOCOL, schema=SCHEMA, heartbeat_ms=60_000))


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([pb.FromCoordinator(heartbeat=pb.Heartbeat())], StatusCode.INVALID_ARGUMENT),
        ([pb.FromCoordinator(welcome=pb.Welcome(protocol=9, schema=SCHEMA))], StatusCode.FAILED_PRECONDITION),
        ([pb.FromCoordinator(welcome=pb.Welcome(protocol=PROTOCOL, schema="x"))], StatusCode.FAILED_PRECONDITION),
        ([b"nonsense"], StatusCode.INVALID_ARGUMENT),
        ([WELCOME, WELCOME], StatusCode.INVALID_ARGUMENT),
        ([WELCOME, pb.FromCoordinator()], StatusCode.INVALID_ARGUMENT),
        ([WELCOME], StatusCode.OK),
    ],
    ids=["no welcome", "another protocol", "another schema", "no message", "welcome twice", "nothing", "the end"],
)
async def test_who_does_not_keep_to_the_protocol_loses_the_stream_and_the_worker_stays(
    worker: tuple[Worker, str], messages: list[pb.FromCoordinator | bytes], code: StatusCode
) -> None:
    assert await said_after(worker[1], *messages) == code
    async with GrpcExecutor(worker[1]) as executor, executor.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        assert await bits(session) == await expected()


async def test_another_release_is_told_and_not_dialled_again(
    worker: tuple[Worker, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with GrpcExecutor(worker[1], join_wait=5) as executor:
        monkeypatch.setattr(links, "SCHEMA", "another")
        with pytest.raises(ExecutorError, match="one release of asynctrain"):
            async with executor.open(PROGRAM):
                pass


async def test_bits_of_another_fingerprint_are_refused() -> None:
    class Elsewhere(at.InlineExecutor):
        def _session(self, ready: object) -> object:  # type: ignore[override]
            session = super()._session(ready)  # type: ignore[arg-type]
            session.fingerprint = {**session.fingerprint, "numpy": "0.1"}
            return session

    async with serving() as (_, one), serving(Elsewhere()) as (_, other), GrpcExecutor(one, other) as executor:
        executor._start()
        await until(lambda: len(executor._present) == 2)
        with pytest.raises(FingerprintError, match="numpy is"):
            async with executor.open(PROGRAM):
                pass


# Who may


async def test_a_worker_without_a_known_token_is_refused_for_good() -> None:
    access = Access(tokens=Tokens([f"w {TOKEN}"]))
    async with GrpcExecutor(listen="127.0.0.1:0", access=access) as executor, at.ThreadExecutor(1) as home:
        address = await executor.listening()
        for token in (None, "wrong-0123456789abcdef"):
            with pytest.raises(ExecutorError, match="known token"):
                await dial(Worker(home), address, Access(token=token))
        async with dialling(Worker(home), address, Access(token=TOKEN)), executor.open(PROGRAM) as session:
            await session.broadcast(PARAMS, {}, 0)
            assert await bits(session) == await expected()


async def test_over_tls_both_sides_show_certificates_and_without_one_nobody_gets_in(certificates: Path) -> None:
    server = Access(tls=of(certificates, "server"))
    async with serving(access=server) as (_, address):
        async with (
            GrpcExecutor(address, access=Access(tls=of(certificates, "carol"))) as executor,
            executor.open(PROGRAM) as session,
        ):
            await session.broadcast(PARAMS, {}, 0)
            assert await bits(session) == await expected()
        stranger = TLS(authority=certificates / "ca.pem")
        async with GrpcExecutor(address, access=Access(tls=stranger), join_wait=0.5) as executor:
            with pytest.raises(WorkerLostError, match="no worker"):
                async with executor.open(PROGRAM):
                    pass


async def test_a_coordinator_without_a_known_token_is_refused_for_good() -> None:
    async with serving(access=Access(tokens=Tokens([TOKEN]))) as (_, address):
        async with GrpcExecutor(address, join_wait=5) as stranger:
            with pytest.raises(ExecutorError, match="known token"):
                async with stranger.open(PROGRAM):
                    pass
        async with GrpcExecutor(address, access=Access(token=TOKEN)) as known, known.open(PROGRAM) as session:
            assert session.slots == 1


def test_other_machines_are_refused_without_tls_unless_that_is_spelled_out() -> None:
    for addresses, own in ((["10.0.0.1:1"], None), ([], "0.0.0.0:1")):
        with pytest.raises(ValueError, match="--insecure"):
            GrpcExecutor(*addresses, listen=own)
        GrpcExecutor(*addresses, listen=own, access=Access(insecure=True))
    with pytest.raises(ValueError, match="TLS must be used where a token is sent"):
        GrpcExecutor("10.0.0.1:1", access=Access(insecure=True, token=TOKEN))
    assert TOKEN not in repr(Access(token=TOKEN))


@pytest.mark.parametrize("address", ["here", "127.0.0.1", ":1", "127.0.0.1:http", "127.0.0.1:70000", "::1:80"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        GrpcExecutor(address)


def test_wrong_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="neither"):
        GrpcExecutor()
    with pytest.raises(ValueError, match="differ"):
        GrpcExecutor("127.0.0.1:1", "127.0.0.1:1")
    with pytest.raises(ValueError, match="heartbeat"):
        GrpcExecutor("127.0.0.1:1", heartbeat=0)


async def test_a_closed_executor_does_not_listen() -> None:
    executor = GrpcExecutor(listen="127.0.0.1:0")
    await executor.aclose()
    with pytest.raises(ClosedError):
        await executor.listening()


async def test_predictions_come_with_their_sums(worker: tuple[Worker, str]) -> None:
    async with GrpcExecutor(worker[1], patience=Patience(5)) as executor, at.InlineExecutor() as inline:
        results = []
        for home in (executor, inline):
            async with home.open(PROGRAM) as session:
                await session.broadcast(PARAMS, {}, 0)
                results.append(await session.compute(ForwardWork(IMAGES, np.arange(16) % 10), 0))
    np.testing.assert_array_equal(results[0].outputs, results[1].outputs)
    assert results[0].sums == results[1].sums
