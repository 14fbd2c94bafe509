"""What a stranger may say on a worker's stream, to either side, and what must come of it: a status, in time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from grpc import StatusCode, aio
from hypothesis import strategies as st

import asynctrain as at
from asynctrain import nn
from asynctrain.errors import ExecutorError
from asynctrain.executors.shared_memory import Places
from asynctrain.rpc import GrpcExecutor
from asynctrain.rpc import worker_pb2 as pb
from asynctrain.rpc.codec import Cargo
from asynctrain.rpc.link import EOF, PROTOCOL, SCHEMA, Message, parsed
from asynctrain.rpc.wire import SERVICE
from asynctrain.types import GradientWork, Program

MODEL = nn.Model([nn.Flatten(), nn.Dense(2)], (2, 2, 1))
PROGRAM = Program(MODEL.to_json())
PARAMS = MODEL.init(0)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 1), dtype=np.uint8)
WORK = GradientWork(0, 0, 1, IMAGES, np.array([0, 1, 0]))
ANSWERED = {StatusCode.OK, StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION, StatusCode.UNAVAILABLE}
IN_TIME = 10.0  # seconds for a conversation, most of which take milliseconds

OWN = 2**64 - 1  # stands for a number that the other side has given
GIVEN = ("session", "transfer", "work")


@dataclass(slots=True)
class Given:
    """The numbers that the other side has given so far."""

    session: int = 1
    transfer: int = 1
    work: int = 2

    def hear(self, kind: str, said: Any) -> None:
        for name in GIVEN:
            if kind in ("open", "parameters", "assign") and name in said.DESCRIPTOR.fields_by_name:
                setattr(self, name, getattr(said, name))

    def fill(self, message: Message) -> bytes:
        kind = message.WhichOneof("kind")
        said = getattr(message, kind) if kind else message
        for name in GIVEN:
            if name in said.DESCRIPTOR.fields_by_name and getattr(said, name) == OWN:
                results = kind == "frame" and isinstance(message, pb.FromWorker)
                setattr(said, name, self.work if results else getattr(self, name))
        return message.SerializeToString()


# What is said

numbers = st.one_of(st.just(OWN), st.integers(0, 3), st.sampled_from([2**31, 2**63]))
counts = st.one_of(st.integers(0, 3), st.sampled_from([2**31, 2**32 - 1]))
names = st.sampled_from(["images", "labels", "weights", "outputs", *PARAMS, ""])
tensors = st.builds(pb.Tensor, name=names, shape=st.lists(st.sampled_from([0, 1, 2, 3, 4, 2**31, 2**63]), max_size=5))
work_cargo = Cargo.of_arrays({"images": WORK.images, "labels": WORK.labels})
gradient_cargo = Cargo.of(PARAMS, Places(PROGRAM).statistics.empty())
groups = st.one_of(
    st.sampled_from([Cargo.of(PARAMS).groups(), work_cargo.groups(), gradient_cargo.groups()]),
    st.lists(
        st.builds(pb.Group, dtype=st.sampled_from(["<f4", "<i8", "|u1", "|O"]), tensors=st.lists(tensors, max_size=3)),
        max_size=4,
    ),
)
frames = st.one_of(
    st.builds(pb.Frame, transfer=numbers, number=counts, data=st.binary(max_size=99), checksum=counts),
    st.sampled_from(
        [
            pb.FromWorker.FromString(frame).frame
            for cargo in (Cargo.of(PARAMS), work_cargo, gradient_cargo)
            for frame in cargo.frames(OWN)
        ]
    ),
)
programs = st.one_of(
    st.sampled_from(["", "{}", "[]", "null", "NaN", "[" * 10_000, json.dumps(PROGRAM.to_json())]),
    st.text(max_size=20),
    st.builds(
        lambda layers: json.dumps({**PROGRAM.to_json(), "architecture": {"input_shape": [2, 2, 1], "layers": layers}}),
        st.lists(
            st.sampled_from(
                [
                    {"layer": "flatten"},
                    {"layer": "dense", "units": 2},
                    {"layer": "dense", "units": 10**12},
                    {"layer": "magic"},
                ]
            ),
            max_size=3,
        ),
    ),
)
errors = st.one_of(
    st.sampled_from(
        [
            "",
            "{}",
            "[" * 10_000,
            '{"kind": "ValueError", "text": "x", "argument": "x", "traceback": "t"}',
            '{"kind": "UnicodeDecodeError", "text": "x", "argument": "x", "traceback": "t"}',
            '{"kind": 7, "text": [], "argument": {}, "traceback": null}',
        ]
    ),
    st.text(max_size=20),
)
assigns = st.one_of(
    st.builds(
        pb.Assign,
        session=numbers,
        work=numbers,
        version=counts,
        microbatch=st.builds(pb.Microbatch, step=numbers, number=counts, of=counts),
        groups=groups,
    ),
    st.builds(
        pb.Assign, session=numbers, work=numbers, version=counts, prediction=st.just(pb.Prediction()), groups=groups
    ),
)
to_worker = st.one_of(
    st.builds(lambda said: pb.FromCoordinator(open=said), st.builds(pb.Open, session=numbers, program=programs)),
    st.builds(
        lambda said: pb.FromCoordinator(parameters=said),
        st.builds(pb.Parameters, session=numbers, version=counts, transfer=numbers, groups=groups),
    ),
    st.builds(lambda said: pb.FromCoordinator(assign=said), assigns),
    st.builds(lambda said: pb.FromCoordinator(frame=said), frames),
    st.builds(lambda said: pb.FromCoordinator(cancel=said), st.builds(pb.Cancel, work=numbers)),
    st.builds(lambda said: pb.FromCoordinator(close=said), st.builds(pb.Close, session=numbers)),
    st.sampled_from(
        [
            pb.FromCoordinator(),
            pb.FromCoordinator(welcome=pb.Welcome()),
            pb.FromCoordinator(heartbeat=pb.Heartbeat()),
            pb.FromCoordinator(drained=pb.Drained()),
        ]
    ),
)
sums = st.builds(
    pb.Sums, loss=st.floats(), weight=st.floats(), samples=numbers, counts=st.dictionaries(names, st.floats())
)
to_coordinator = st.one_of(
    st.builds(
        lambda said: pb.FromWorker(opened=said),
        st.builds(pb.Opened, session=numbers, slots=counts, fingerprint=st.dictionaries(names, names)),
    ),
    st.builds(lambda said: pb.FromWorker(taken=said), st.builds(pb.Taken, session=numbers, transfer=numbers)),
    st.builds(lambda said: pb.FromWorker(result=said), st.builds(pb.Result, work=numbers, sums=sums, groups=groups)),
    st.builds(
        lambda said: pb.FromWorker(failed=said),
        st.one_of(
            st.builds(pb.Failed, session=numbers, error=errors, elsewhere=st.booleans()),
            st.builds(pb.Failed, work=numbers, error=errors, elsewhere=st.booleans()),
        ),
    ),
    st.builds(lambda said: pb.FromWorker(frame=said), frames),
    st.builds(lambda said: pb.FromWorker(slots=said), st.builds(pb.Slots, session=numbers, slots=counts)),
    st.builds(lambda said: pb.FromWorker(closed=said), st.builds(pb.Closed, session=numbers)),
    st.sampled_from(
        [
            pb.FromWorker(),
            pb.FromWorker(hello=pb.Hello()),
            pb.FromWorker(heartbeat=pb.Heartbeat()),
            pb.FromWorker(draining=pb.Draining()),
        ]
    ),
)


@dataclass(frozen=True, slots=True)
class Lie:
    """Something that is said: a message or bytes, of which one may have been damaged (modulo their number)."""

    message: Any
    damage: tuple[int, int] | None = None

    def to_bytes(self, given: Given) -> bytes:
        said = self.message if isinstance(self.message, bytes) else given.fill(type(self.message).FromString(self._raw))
        if self.damage is None or not said:
            return said
        place, bit = self.damage
        damaged = bytearray(said)
        damaged[place % len(damaged)] ^= 1 << bit
        return bytes(damaged)

    @property
    def _raw(self) -> bytes:
        raw: bytes = self.message.SerializeToString()
        return raw


@dataclass(frozen=True, slots=True)
class Talk:
    """A conversation: how many steps of the protocol are kept to, and what is said then."""

    honest: int
    lies: list[Lie] = field(default_factory=list)


def _talks(said: st.SearchStrategy[Any], steps: int) -> st.SearchStrategy[Talk]:
    damages = st.one_of(st.none(), st.none(), st.tuples(st.integers(0, 400), st.integers(0, 7)))
    lies = st.one_of(st.builds(Lie, said, damages), st.builds(Lie, st.binary(max_size=60)))
    return st.builds(Talk, st.integers(0, steps), st.lists(lies, max_size=6))


talks_to_worker = _talks(to_worker, 4)
talks_to_coordinator = _talks(to_coordinator, 4)


# How it is said


class Call:
    """A call by hand."""

    def __init__(self, channel: aio.Channel, method: str, of: type[Message]) -> None:
        self.given = Given()
        stream_of: Any = channel.stream_stream
        self._call: Any = stream_of(f"/{SERVICE}/{method}")()
        self._of = of

    async def say(self, message: Message | bytes) -> bool:
        """Return whether it could be said: the other side may have had enough."""
        data = message if isinstance(message, bytes) else message.SerializeToString()
        with suppress(asyncio.InvalidStateError, aio.AioRpcError):
            await self._call.write(data)
            return True
        return False

    async def hear(self, *kinds: str) -> Any:
        """Return the next of these that is said; None at the end."""
        with suppress(aio.AioRpcError):
            while (message := await self._call.read()) is not EOF:
                kind, said = parsed(message, self._of)
                self.given.hear(kind, said)
                if kind in kinds:
                    return said
        return None

    async def status(self) -> StatusCode | None:
        """Return how it ends, now that nothing more is said.

        None where something was said at the moment of the end, which gRPC's client then does not tell.
        """
        with suppress(asyncio.InvalidStateError, aio.AioRpcError):
            await self._call.done_writing()
        await self.hear()
        code: StatusCode = await self._call.code()
        masked = code == StatusCode.INTERNAL and (await self._call.details()).startswith("Internal error from Core")
        return None if masked else code

    def end(self) -> None:
        self._call.cancel()


async def _end(call: Call, lies: list[Lie]) -> None:
    for lie in lies:
        if not await call.say(lie.to_bytes(call.given)):
            break
    code = await call.status()
    assert code in ANSWERED or code is None, code


async def lie_to_worker(channel: aio.Channel, talk: Talk) -> None:
    """Be a coordinator that keeps to the protocol for so many steps, and then does not."""
    call = Call(channel, "Serve", pb.FromWorker)
    cargo = Cargo.of(PARAMS)
    welcome = pb.Welcome(protocol=PROTOCOL, schema=SCHEMA, heartbeat_ms=60_000)
    opening = pb.Open(session=1, program=json.dumps(PROGRAM.to_json()))
    parameters = pb.Parameters(session=1, version=0, transfer=1, groups=cargo.groups())
    microbatch = pb.Microbatch(step=0, number=0, of=1)
    assign = pb.Assign(session=1, work=2, version=0, microbatch=microbatch, groups=work_cargo.groups())
    try:
        async with asyncio.timeout(IN_TIME):
            if talk.honest >= 1:
                await call.say(pb.FromCoordinator(welcome=welcome))
            if talk.honest >= 2:
                await call.say(pb.FromCoordinator(open=opening))
                assert await call.hear("opened")
            if talk.honest >= 3:
                await call.say(pb.FromCoordinator(parameters=parameters))
                for frame in cargo.frames(1):
                    await call.say(frame)
                assert await call.hear("taken")
            if talk.honest >= 4:
                await call.say(pb.FromCoordinator(assign=assign))
            await _end(call, talk.lies)
    finally:
        call.end()


async def lie_to_coordinator(channel: aio.Channel, talk: Talk) -> None:
    """Be a worker that keeps to the protocol for so many steps, and then does not."""
    call = Call(channel, "Join", pb.FromCoordinator)
    hello = pb.Hello(node="liar", instance="liar", capacity=1, protocol=PROTOCOL, schema=SCHEMA)
    try:
        async with asyncio.timeout(IN_TIME):
            if talk.honest >= 1:
                await call.say(pb.FromWorker(hello=hello))
            if talk.honest >= 2:
                opening = await call.hear("open")
                opened = pb.Opened(session=opening.session, slots=1, fingerprint=dict(at.numeric_fingerprint()))
                await call.say(pb.FromWorker(opened=opened))
            if talk.honest >= 3:
                parameters = await call.hear("parameters")
                taken = pb.Taken(session=parameters.session, transfer=parameters.transfer)
                await call.say(pb.FromWorker(taken=taken))
            if talk.honest >= 4:
                assert await call.hear("assign")
            await _end(call, talk.lies)
    finally:
        call.end()


# A coordinator that is lied to


async def bits(session: at.Session) -> bytes:
    result = await session.compute(WORK, 0)
    vector = result.gradients.vector.tobytes()
    result.release()
    return vector


async def expected() -> bytes:
    async with at.InlineExecutor() as inline, inline.open(PROGRAM) as session:
        await session.broadcast(PARAMS, {}, 0)
        return await bits(session)


@asynccontextmanager
async def busy(executor: GrpcExecutor) -> AsyncIterator[at.Session]:
    """Have a session with always so much to do that whoever joins gets some of it; its block ends that."""

    async def keep_busy(session: at.Session) -> None:
        while True:
            with suppress(ExecutorError, ValueError):  # three workers have lied about the same work, or failed at it
                await bits(session)

    async with executor.open(PROGRAM) as session, asyncio.TaskGroup() as group:
        await session.broadcast(PARAMS, {}, 0)
        tasks = [group.create_task(keep_busy(session)) for _ in range(4)]
        yield session
        for task in tasks:
            task.cancel()
