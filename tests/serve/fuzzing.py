"""Messages as a stranger may send them, and what must come of each: a status, or what was asked for."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import grpc
from grpc import StatusCode
from hypothesis import strategies as st

from asynctrain.serve import TrainingServer
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve.client import is_interruption
from asynctrain.serve.messages import EOF

SILENCE = 0.05  # seconds after which a call that waits for more is left

numbers = st.one_of(st.integers(0, 12), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1]))
texts = st.one_of(
    st.sampled_from(["", "{}", "[]", "null", "NaN", '{"name": "sgd", "learning_rate": 0.1}']), st.text(max_size=20)
)
layers = st.lists(
    st.one_of(
        st.fixed_dictionaries({"layer": st.sampled_from(["flatten", "relu", "dropout", "batch_norm", "magic"])}),
        st.fixed_dictionaries({"layer": st.just("dense"), "units": st.one_of(st.integers(-1, 5), st.just(10**15))}),
        st.fixed_dictionaries(
            {"layer": st.just("conv2d"), "filters": st.integers(-1, 5), "stride": st.integers(-1, 10**9)}
        ),
    ),
    max_size=4,
)
architectures = st.builds(
    lambda shape, found: json.dumps({"input_shape": shape, "layers": found}),
    st.lists(st.integers(-1, 9), max_size=4) | st.just([2, 2, 1]),
    layers | st.just([{"layer": "flatten"}, {"layer": "dense", "units": 2}]),
)
good = json.dumps({"input_shape": [2, 2, 1], "layers": [{"layer": "flatten"}, {"layer": "dense", "units": 2}]})
starts = st.builds(
    pb.Start,
    version=st.integers(0, 2),
    architecture=st.one_of(st.just(good), architectures, texts),
    classes=st.one_of(st.just(["a", "b"]), st.lists(st.text(max_size=3), max_size=3)),
    optimizer=st.one_of(st.just(""), texts),
    epochs=st.one_of(st.just(1), numbers),
    batch_size=numbers,
    microbatch=numbers,
    seed=st.integers(0, 2**64 - 1),
    holdout=st.one_of(st.just(0.0), st.floats()),
)
tensors = st.builds(
    pb.Tensor,
    dtype=st.sampled_from([0, 1, 2, 9]),
    shape=st.one_of(st.just([1, 2, 2, 1]), st.lists(numbers, max_size=5)),
    data=st.one_of(st.just(bytes(4)), st.binary(max_size=40)),
)
encoded = st.builds(pb.EncodedImages, images=st.lists(st.binary(max_size=60), max_size=3))
labels = st.one_of(st.just([0]), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3))
batches = st.one_of(
    st.builds(pb.Batch, sequence=numbers, tensor=tensors, labels=labels, last=st.booleans()),
    st.builds(pb.Batch, sequence=numbers, encoded=encoded, labels=labels, last=st.booleans()),
)
requests = st.one_of(
    st.builds(lambda start: pb.TrainRequest(start=start).SerializeToString(), starts),
    st.builds(lambda batch: pb.TrainRequest(batch=batch).SerializeToString(), batches),
    st.binary(max_size=60),
)
streams = st.one_of(
    st.lists(requests, max_size=4),
    st.tuples(
        st.just(pb.TrainRequest(start=pb.Start(architecture=good, classes=["a", "b"], epochs=1)).SerializeToString()),
        requests,
        requests,
    ).map(list),
)
unary = st.tuples(
    st.sampled_from(
        ["TrainModelUnary", "GetRun", "ListRuns", "PauseRun", "ResumeRun", "StopRun", "CancelRun", "Predict"]
    ),
    st.one_of(
        st.binary(max_size=60),
        st.builds(
            lambda start, tensor, labels: pb.TrainModelRequest(
                start=start, tensor=tensor, labels=labels
            ).SerializeToString(),
            starts,
            tensors,
            labels,
        ),
    ),
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # and empty settings
frames = st.builds(
    lambda kind, flags, stream, content: (
        len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content
    ),
    st.integers(0, 10),
    st.integers(0, 255),
    st.integers(0, 5),
    st.binary(max_size=60),
)
raw = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda found, rest: PREFACE + b"".join(found) + rest, st.lists(frames, max_size=5), st.binary(max_size=20)
    ),
)


async def send_raw(address: str, content: bytes) -> None:
    """Send bytes to the port itself, and wait until the service has hung up, which it must."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    with suppress(ConnectionError):
        writer.write(content)
        writer.write_eof()
        async with asyncio.timeout(10):
            await reader.read()
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


async def send_stream(channel: Any, requests: list[bytes]) -> StatusCode | None:
    """Send a stream; return its status, None where the service waits for more."""
    call = channel.stream_stream("/asynctrain.v1.Training/TrainModel")()
    try:
        for request in requests:
            try:
                await call.write(request)
            except asyncio.InvalidStateError:
                break
            except grpc.aio.AioRpcError as error:
                if is_interruption(error):  # written at the moment of the end, which gRPC's client then does not tell
                    return None
                break
        async with asyncio.timeout(SILENCE):
            with suppress(grpc.aio.AioRpcError):
                while await call.read() is not EOF:
                    pass
            code: StatusCode = await call.code()
            return code
    except TimeoutError:
        return None
    finally:
        call.cancel()


async def send_one(channel: Any, name: str, request: bytes) -> StatusCode:
    try:
        await channel.unary_unary(f"/asynctrain.v1.Training/{name}")(request, timeout=5)
    except grpc.aio.AioRpcError as error:
        return error.code()
    return StatusCode.OK


def require_answer(code: StatusCode | None) -> None:
    """Hold that the service has found out what was wrong, and is not itself at fault."""
    assert code not in (StatusCode.UNKNOWN, StatusCode.INTERNAL, StatusCode.UNAVAILABLE), code


def require_tidy(server: TrainingServer) -> None:
    assert "0 bytes" in repr(server.runs)
