"""Clients in other languages, written from the proto file alone, do what it says."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from grpc import StatusCode, aio

import asynctrain as at
from asynctrain.serve import TrainingClient
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve import asynctrain_pb2_grpc as rpc
from asynctrain.serve.messages import EOF
from tests.clients.conftest import Client, Lesson, answers
from tests.serve.conftest import blobs, model  # noqa: F401 - fixtures
from tests.serve.remote import batches_of, start_of
from tests.serve.test_command import TOKEN, serving
from tests.serve.test_security import certificates  # noqa: F401 - a fixture

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

LONG = ("--model", "small_cnn", "--size", 8, "--epochs", 100_000)  # until it is cancelled
CANCELLED = StatusCode.CANCELLED.value[0]


def refusal(done: subprocess.CompletedProcess[str]) -> StatusCode:
    """Return the status that a client was refused with: it says ``NAME (NUMBER): why``."""
    assert done.returncode == 1, (done.stdout, done.stderr)
    number = int(done.stderr.partition("(")[2].partition(")")[0])
    (code,) = [code for code in StatusCode if code.value[0] == number]
    return code


def next_with(process: subprocess.Popen[str], kind: str) -> dict[str, Any]:
    """Return the next event of a kind that a client prints."""
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, Any] = json.loads(line)
        if kind in event:
            return event
    raise AssertionError(f"it has ended before {kind}")


@contextmanager
def started(client: Client, command: object, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Have a client at work; it is killed at the end."""
    with client.start(command, *arguments) as process:
        try:
            yield process
        finally:
            process.kill()


def test_it_trains_on_png_files_until_the_model_knows_97_percent_of_others(client: Client, lesson: Lesson) -> None:
    done = client.run("train", *lesson.options, lesson.folder / "train")
    assert done.returncode == 0, done.stderr
    accepted, *events = answers(done.stdout)
    numbered = [event for event in events if "number" in event]
    assert [int(event["number"]) for event in numbered] == list(range(len(numbered)))
    steps = [int(event["progress"]["step"]) for event in numbered if "progress" in event]
    assert steps == list(range(1, int(numbered[0]["started"]["steps"]) + 1))
    assert len(numbered[-1]["done"]["digest"]) == 64

    tested = client.run("test", accepted["accepted"]["runId"], lesson.folder / "test")
    assert tested.returncode == 0, tested.stderr
    (found,) = answers(tested.stdout)
    print(f"{found['accuracy']:.2%} of {found['images']:,} images")  # noqa: T201 - what the long tests show
    assert found["accuracy"] >= 0.97


def test_it_watches_a_run_of_another_and_cancels_it(client: Client, digits: Path) -> None:
    with started(client, "train", *LONG, digits / "train") as training:
        run_id = next_with(training, "accepted")["accepted"]["runId"]
        with started(client, "watch", run_id) as watching:
            while int(next_with(watching, "progress")["progress"]["step"]) < 10:
                pass
            (cancelled,) = answers(client.run("cancel", run_id).stdout)
            assert cancelled["state"] == "CANCELLED"
            for process in (training, watching):
                assert next_with(process, "failed")["failed"]["code"] == CANCELLED
                assert process.wait(10) == 1
    assert client.run("cancel", run_id).returncode == 0  # asking again does no harm
    (found,) = [run for run in answers(client.run("runs").stdout) if run["runId"] == run_id]
    assert found["state"] == "CANCELLED"

    everything = answers(client.run("watch", run_id).stdout)
    assert [int(event["number"]) for event in everything] == list(range(len(everything)))
    assert everything[-1]["failed"]["code"] == CANCELLED
    assert answers(client.run("watch", "--from", 7, run_id).stdout) == everything[7:]


def test_a_run_with_a_key_outlives_its_client_and_has_the_digest_of_the_same_training_from_python(
    client: Client, digits: Path
) -> None:
    command = ("train", "--model", "small_cnn", "--size", 8, "--epochs", 4, "--batch-size", 32, "--seed", 7)
    again: tuple[object, ...] = (*command, "--key", f"outlives {client.command[0]}", digits / "train")
    with started(client, *again) as cut:
        run_id = next_with(cut, "accepted")["accepted"]["runId"]
        next_with(cut, "progress")
    accepted, *events = answers(client.run(*again).stdout)
    assert accepted["accepted"]["runId"] == run_id
    assert int(events[0]["number"]) == 0

    async def train_from_python() -> str:
        options: dict[str, Any] = {"epochs": 4, "batch_size": 32, "seed": 7, "optimizer": at.optim.adamw(3e-3)}
        data = await asyncio.to_thread(at.ImageFolder, digits / "train")
        async with TrainingClient(client.address, token=TOKEN) as python:
            run = python.train(data, model="small_cnn", image_shape=(8, 8, 1), **options)
            return (await run.result()).digest

    assert events[-1]["done"]["digest"] == asyncio.run(train_from_python())


def test_it_sends_no_more_batches_than_it_has_credits_for_and_none_that_the_server_has(
    client: Client, tmp_path: Path
) -> None:
    (tmp_path / "images" / "0").mkdir(parents=True)
    for number in range(6):
        (tmp_path / "images" / "0" / str(number)).write_bytes(bytes(600_000))  # no two of them in one message
    miser = Miser()  # type: ignore[abstract]  # no other method is called

    async def train() -> int:
        server = aio.server()
        rpc.add_TrainingServicer_to_server(miser, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            one = replace(client, address=f"127.0.0.1:{port}")
            return (await asyncio.to_thread(one.run, "train", tmp_path / "images")).returncode
        finally:
            await server.stop(None)

    assert asyncio.run(train()) == 0
    assert miser.received == [2, 3, 4, 5]
    assert miser.unasked == 0


class Miser(rpc.TrainingServicer):
    """Has two batches already, wants two more, and then one at a time.

    Attributes:
        received: the numbers of the batches that credits were given for.
        unasked: how many had come besides, half a second after each of these.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.unasked = 0

    async def TrainModel(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        arrived: asyncio.Queue[int] = asyncio.Queue()

        async def receive() -> None:
            while (request := await context.read()) is not EOF:
                arrived.put_nowait(request.batch.sequence)

        assert (await context.read()).HasField("start")
        async with asyncio.TaskGroup() as tasks:
            receiving = tasks.create_task(receive())
            for wanted, event in (
                (2, pb.TrainEvent(accepted=pb.Accepted(run_id="miser", credits=2, next_sequence=2))),
                (1, pb.TrainEvent(credit=pb.Credit(credits=1, next_sequence=4))),
                (1, pb.TrainEvent(credit=pb.Credit(credits=1, next_sequence=5))),
            ):
                await context.write(event)
                self.received += [await arrived.get() for _ in range(wanted)]
                await asyncio.sleep(0.5)
                self.unasked += arrived.qsize()
            receiving.cancel()
        await context.write(pb.TrainEvent(number=0, done=pb.Done(step=1)))


def changed(batch: pb.Batch, **tensor: Any) -> pb.Batch:
    """Return a batch whose tensor is another one."""
    other = pb.Batch()
    other.CopyFrom(batch)
    other.tensor.MergeFrom(pb.Tensor(**tensor))
    return other


def wrong(first: pb.Batch) -> dict[str, tuple[pb.Batch, StatusCode]]:
    """Return what is refused instead of a first batch, and how."""
    count = first.tensor.shape[0]
    label, gap, shape = pb.Batch(), pb.Batch(), pb.Batch()
    for batch in (label, gap, shape):
        batch.CopyFrom(first)
    label.labels[0] = 3
    gap.sequence = 1
    shape.tensor.shape[:] = [count, 8, 4, 2]
    return {
        "wrong shape": (shape, StatusCode.INVALID_ARGUMENT),
        "wrong dtype": (changed(first, dtype=pb.Tensor.FLOAT32), StatusCode.INVALID_ARGUMENT),
        "unknown dtype": (changed(first, dtype=77), StatusCode.INVALID_ARGUMENT),
        "label out of range": (label, StatusCode.OUT_OF_RANGE),
        "oversized message": (changed(first, data=bytes(5 * 2**20)), StatusCode.RESOURCE_EXHAUSTED),
        "sequence gap": (gap, StatusCode.OUT_OF_RANGE),
    }


def written(path: Path, requests: Sequence[pb.TrainRequest]) -> Path:
    """Write messages as ``send`` takes them."""
    path.write_text("".join(json.dumps(MessageToDict(request)) + "\n" for request in requests))
    return path


@pytest.mark.parametrize(
    "case", ["wrong shape", "wrong dtype", "unknown dtype", "label out of range", "oversized message", "sequence gap"]
)
def test_what_it_sends_wrong_is_refused_with_the_status_of_the_proto_file(
    client: Client,
    tmp_path: Path,
    blobs: at.ArrayDataset,  # noqa: F811
    model: at.Model,  # noqa: F811
    case: str,
) -> None:
    start = pb.TrainRequest(start=start_of(model, blobs))
    batches = batches_of(blobs)
    right = [start, *(pb.TrainRequest(batch=batch) for batch in batches)]
    assert client.run("send", written(tmp_path / "right", right)).returncode == 0
    batch, code = wrong(batches[0])[case]
    assert refusal(client.run("send", written(tmp_path / "wrong", [start, pb.TrainRequest(batch=batch)]))) is code


def test_without_the_right_token_it_is_refused_whatever_it_asks_for(
    client: Client, stranger: Client, digits: Path
) -> None:
    for one in (stranger, replace(client, token=TOKEN[::-1])):
        for command in (["runs"], ["watch", "magic"], ["cancel", "magic"], ["train", *LONG, digits / "train"]):
            assert refusal(one.run(*command)) is StatusCode.UNAUTHENTICATED, command


def test_a_run_that_is_not_there_is_not_found(client: Client, digits: Path) -> None:
    for command in (["watch", "magic"], ["cancel", "magic"], ["test", "magic", digits / "test"]):
        assert refusal(client.run(*command)) is StatusCode.NOT_FOUND, command


def test_it_trusts_the_authority_that_it_is_told_and_sends_no_token_in_clear(
    command: tuple[str, ...],
    tmp_path: Path,
    certificates: Path,  # noqa: F811
) -> None:
    files = ("--tls-cert", certificates / "server.pem", "--tls-key", certificates / "server.key")
    with serving(tmp_path, *files, ASYNCTRAIN_TOKENS=f"alice {TOKEN}") as (_, address):
        client = Client(command, address)
        assert client.run("runs", "--ca", certificates / "ca.pem").returncode == 0
        assert refusal(client.run("runs")) is StatusCode.UNAVAILABLE
    sent = replace(client, address="192.0.2.1:50051").run("runs")
    assert sent.returncode == 1
    assert "clear" in sent.stderr


def test_a_command_that_is_none_is_answered_with_those_that_are(client: Client) -> None:
    for arguments in (["magic"], ["watch"], ["test", "one"]):
        done = client.run(*arguments)
        assert done.returncode == 2
        assert "client" in done.stderr.splitlines()[0]
