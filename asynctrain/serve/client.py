"""The service in a Python program: a run on another machine, listened to and asked like one of its own."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any, Literal, Self, TypeVar

import numpy as np
from grpc import StatusCode, aio

from asynctrain._aio import in_thread, thread_pool
from asynctrain._files import write_whole
from asynctrain.arena import Array, Shape
from asynctrain.data.datasets import ArrayDataset, Dataset
from asynctrain.inference.classifier import Classifier
from asynctrain.inference.classifier import Prediction as Predicted
from asynctrain.nn.model import Model
from asynctrain.optim.transforms import Optimizer
from asynctrain.rpc.security import TLS, is_loopback
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve import asynctrain_pb2_grpc as rpc
from asynctrain.serve.limits import MESSAGE_BYTES
from asynctrain.serve.messages import CODES, EOF, from_message
from asynctrain.serve.refusal import Refused
from asynctrain.train.events import Event, RunEnd

T = TypeVar("T")

PIECE = 2**20  # bytes of images in a message, about: larger ones are no faster, and hold the loops up for longer
MOST_IMAGES = 4_096  # in a message
LAST_WORD = 5.0  # seconds that cancelling a run may take when its block is left

_INTERRUPTIONS = frozenset({StatusCode.UNAVAILABLE, StatusCode.CANCELLED})  # of the connection, or by the server's end
_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),  # a connection that is dead without a word is noticed
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # of the pings by which gRPC measures bandwidth; a minute by default
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run on the service has come to.

    Attributes:
        run_id: its name there.
        reason: whether all epochs are done, or it was asked to stop.
        step: steps that were done.
        digest: of the weights, as ``TrainState.digest``.
        metrics: of the last epoch: ``loss``, ``accuracy``, ``validation.loss``, ``validation.accuracy``.
        seconds: of the last attempt.
    """

    run_id: str
    reason: Literal["finished", "stopped"]
    step: int
    digest: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0


class TrainingClient:
    """A connection to a training service.

        async with TrainingClient("127.0.0.1:50051") as client:
            async for event in client.train(data, model="lenet", image_shape=(28, 28, 1), epochs=3):
                print(event)

    Args:
        address: ``host:port``, or ``unix:PATH``.
        token: who this is, where the service asks for it; sent to other machines over TLS alone.
        tls: the service's authority, and the certificate of this client where the service asks for one.
        patience: seconds that a connection that is broken may take to come back.

    Raises:
        ValueError: the token would be sent to another machine unencrypted.
    """

    def __init__(
        self, address: str, *, token: str | None = None, tls: TLS | None = None, patience: float = 60.0
    ) -> None:
        if token is not None and tls is None and not is_loopback(address.rpartition(":")[0] or address):
            raise ValueError(f"tls must be given where a token is sent to another machine, {address}")
        self.address = address
        self.patience = patience
        self._tls = tls
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._channel: aio.Channel | None = None

    async def __aenter__(self) -> Self:
        credentials = None if self._tls is None else await in_thread(self._tls.of_client)
        if credentials is None:
            self._channel = aio.insecure_channel(self.address, _OPTIONS)
        else:
            self._channel = aio.secure_channel(self.address, credentials, _OPTIONS)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close(None)

    @property
    def stub(self) -> rpc.TrainingAsyncStub:
        """The methods of ``asynctrain.proto``, as they are; raises ``RuntimeError`` outside of the client's block."""
        if self._channel is None:
            raise RuntimeError("a TrainingClient must be used as async with TrainingClient(...) as client")
        return rpc.TrainingStub(self._channel)

    def train(
        self,
        data: Dataset,
        *,
        model: Model | str,
        epochs: int,
        image_shape: Shape | None = None,
        arguments: Mapping[str, Any] | None = None,
        optimizer: Optimizer | None = None,
        batch_size: int = 64,
        microbatch: int | None = None,
        seed: int = 0,
        holdout: float = 0.0,
        checkpoint_steps: int | None = None,
        idempotency_key: str | None = None,
    ) -> RemoteTraining:
        """Return a run that sends ``data`` to the service and trains there.

        Nothing happens before it is listened to, awaited (``result()``), or entered: ``async with client.train(...) as
        run`` sends the data. Leaving the block, or the iteration, before the run's end cancels it. With an
        ``idempotency_key`` it goes on, and the same call, in another program too, finds it again.

        The run ends with the bits of ``Trainer.fit`` on a ``Loader`` with the same arguments, whose images have the
        model's height and width already.

        Args:
            data: arrays are sent as they are, files with their bytes.
            model: the architecture, or the name of a ready one.
            epochs: passes over the data.
            image_shape: (H, W, C), where ``model`` is a name.
            arguments: what else a ready model takes.
            optimizer: by default ``adamw(1e-3)``.
            batch_size: images in a step.
            microbatch: as for ``Trainer``.
            seed: of initial weights, order and dropout.
            holdout: the share of each class, 0 to below 1, that is tested with after each epoch.
            checkpoint_steps: steps between two checkpoints; by default one each epoch and each minute.
            idempotency_key: by which the run is found again.

        Raises:
            ValueError: the images have weights, or a name of a model has no ``image_shape`` beside it.
        """
        if getattr(data, "weights", None) is not None:
            raise ValueError("data must have no weights: the service knows none")
        start = pb.Start(
            version=1,
            idempotency_key=idempotency_key or uuid.uuid4().hex,
            classes=data.classes,
            optimizer="" if optimizer is None else json.dumps(optimizer.to_json()),
            epochs=epochs,
            batch_size=batch_size,
            microbatch=microbatch or 0,
            seed=seed,
            holdout=holdout,
            checkpoint_steps=checkpoint_steps or 0,
        )
        if isinstance(model, Model):
            start.architecture = json.dumps(model.to_json())
        elif image_shape is None:
            raise ValueError(f"image_shape must be given with the name of a model, {model!r}")
        else:
            told = json.dumps(dict(arguments)) if arguments else ""
            start.ready_model.CopyFrom(pb.ReadyModel(name=model, image_shape=image_shape, arguments=told))
        return RemoteTraining(self, start, data, cancels=idempotency_key is None)

    def run(self, run_id: str) -> RemoteRun:
        """Return a run by its name."""
        return RemoteRun(self, run_id)

    async def runs(self) -> list[pb.RunInfo]:
        """Return what is known of all runs of this client, the latest first."""
        found: list[pb.RunInfo] = []
        token = ""
        while True:
            page = await self.ask(self.stub.ListRuns, pb.ListRunsRequest(page_token=token))
            found += page.runs
            token = page.next_page_token
            if not token:
                return found

    async def ask(self, method: Callable[..., Awaitable[T]], request: Any, timeout: float | None = None) -> T:  # noqa: ASYNC109 - gRPC's own
        """Return the answer to one message. Raises ``Refused``."""
        try:
            return await method(request, timeout=timeout, metadata=self._metadata)
        except aio.AioRpcError as error:
            raise _refused(error) from error

    async def ask_patiently(self, method: Callable[..., Awaitable[T]], request: Any) -> T:
        """Return the answer to one message that may be sent again, through broken connections. Raises ``Refused``."""
        patience = _Patience(self.patience)
        while True:
            try:
                return await method(request, metadata=self._metadata)
            except aio.AioRpcError as error:
                await patience.spend(error)

    def call(self, method: Callable[..., Any], *request: Any) -> Any:
        """Return a call of a method that streams."""
        return method(*request, metadata=self._metadata)

    def __repr__(self) -> str:
        return f"<TrainingClient of {self.address}>"


class RemoteRun:
    """A run on the service, by its name. All methods raise ``Refused``, with its status, where the service refuses."""

    def __init__(self, client: TrainingClient, run_id: str) -> None:
        self._client = client
        self._run_id = run_id

    @property
    def run_id(self) -> str:
        """Its name on the service."""
        return self._run_id

    def __aiter__(self) -> AsyncIterator[Event]:
        return self.events()

    async def events(self, number: int = 0) -> AsyncGenerator[Event, None]:
        """Yield the events from ``number`` on until the run's end, through broken connections and servers that restart.

        Unlike a run in this process, one that failed does not raise: its ``RunEnd`` says why.
        """
        patience = _Patience(self._client.patience)
        while True:
            call = self._client.call(
                self._client.stub.WatchRun, pb.WatchRunRequest(run_id=self.run_id, from_event=number)
            )
            try:
                async for message in call:
                    patience.reward()
                    number = message.number + 1
                    if (event := from_message(message)) is not None:
                        yield event
                return
            except aio.AioRpcError as error:
                await patience.spend(error)
            finally:
                call.cancel()

    async def info(self) -> pb.RunInfo:
        """Return what is known of the run."""
        return await self._ask(self._client.stub.GetRun, pb.GetRunRequest)

    async def pause(self) -> int:
        """Let it wait after the step it is in; return how many steps are done."""
        return (await self._ask(self._client.stub.PauseRun, pb.PauseRunRequest)).step

    async def resume(self) -> None:
        """Let it go on."""
        await self._ask(self._client.stub.ResumeRun, pb.ResumeRunRequest)

    async def stop(self) -> Trained:
        """End it, normally, after the step it is in."""
        return _trained(await self._ask(self._client.stub.StopRun, pb.StopRunRequest))

    async def cancel(self) -> None:
        """End it at once."""
        await self._ask(self._client.stub.CancelRun, pb.CancelRunRequest)

    async def result(self) -> Trained:
        """Wait for the end. Raises ``Refused``, with the status that the run has failed with, where it has."""
        async for _ in self.events():
            pass
        request = pb.GetRunRequest(run_id=self.run_id)
        return _trained(await self._client.ask_patiently(self._client.stub.GetRun, request))

    async def save(self, path: str | PathLike[str]) -> None:
        """Write the model as it is now to a file, whole or not at all."""
        await in_thread(write_whole, Path(path), await self._file())

    async def model(self) -> Classifier:
        """Return the model as it is now."""
        return await in_thread(_classifier, await self._file())

    async def _file(self) -> bytes:
        call = self._client.call(self._client.stub.GetModel, pb.GetModelRequest(run_id=self.run_id))
        try:
            return b"".join([chunk.data async for chunk in call])
        except aio.AioRpcError as error:
            raise _refused(error) from error

    async def predict(self, images: Sequence[bytes] | Array, top_k: int = 5) -> list[Predicted]:
        """Return what the service's model sees on images: files' bytes, or an array (n, H, W, C) of uint8."""
        request = pb.PredictRequest(run_id=self.run_id, top_k=top_k)
        if isinstance(images, np.ndarray):
            _fill(request.tensor, images)
        else:
            request.encoded.images.extend(images)
        response = await self._client.ask(self._client.stub.Predict, request)
        return [
            Predicted(found.label, found.probability, tuple((share.label, share.probability) for share in found.top))
            for found in response.predictions
        ]

    async def _ask(self, method: Callable[..., Awaitable[T]], request: Callable[..., Any]) -> T:
        return await self._client.ask(method, request(run_id=self.run_id))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._run_id or 'not begun'} on {self._client.address}>"


class RemoteTraining(RemoteRun):
    """A run that this program has the data for, made by ``TrainingClient.train``."""

    def __init__(self, client: TrainingClient, start: pb.Start, data: Dataset, *, cancels: bool) -> None:
        super().__init__(client, "")
        self._start = start
        self._data = data
        self._cancels = cancels
        self._sending = asyncio.Lock()
        self._is_sent = False
        self._is_entered = False
        self._has_ended = False

    @property
    def run_id(self) -> str:
        """Its name on the service; ``RuntimeError`` before it has one."""
        if not self._run_id:
            raise RuntimeError("the run has not begun: listen to it, await its result, or enter it with async with")
        return self._run_id

    async def __aenter__(self) -> Self:
        self._is_entered = True
        try:
            await self.send()
        except BaseException:
            await self._leave()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._leave()

    async def events(self, number: int = 0) -> AsyncGenerator[Event, None]:
        """Send the data, and yield the events; see ``RemoteRun.events``."""
        try:
            await self.send()
            async with aclosing(super().events(number)) as events:
                async for event in events:
                    self._has_ended |= isinstance(event, RunEnd)
                    yield event
        finally:
            if not self._is_entered:
                await self._leave()

    async def send(self) -> None:
        """Send the data, through broken connections; done once, however often it is called."""
        async with self._sending:
            patience = _Patience(self._client.patience)
            while not self._is_sent:
                call = self._client.call(self._client.stub.TrainModel)
                try:
                    await self._send(call, patience)
                except aio.AioRpcError as error:
                    await patience.spend(error)
                finally:
                    call.cancel()

    async def _send(self, call: Any, patience: _Patience) -> None:
        """Send what the service does not have yet, on one stream; the next message is made while one is sent."""
        await _write(call, pb.TrainRequest(start=self._start))
        accepted = (await _read(call)).accepted
        self._run_id = accepted.run_id
        patience.reward()
        credit = accepted.credits
        if accepted.complete:
            self._is_sent = True
            return
        stored = accepted.next_sequence
        sequence = stored
        async with _made_ahead(_requests(self._data), skipped=stored) as next_request:
            while (request := await next_request()) is not None:
                while not credit:
                    credit += (await _read(call)).credit.credits
                    patience.reward()
                request.batch.sequence = sequence
                await _write(call, request)
                sequence, credit = sequence + 1, credit - 1
        while stored < sequence:
            event = await _read(call)
            stored = event.credit.next_sequence if event.WhichOneof("kind") == "credit" else sequence
        self._is_sent = True

    async def _leave(self) -> None:
        """Cancel a run that nobody will ask for any more."""
        if self._cancels and self._run_id and not self._has_ended:
            self._has_ended = True
            request = pb.CancelRunRequest(run_id=self._run_id)
            await self._client.ask(self._client.stub.CancelRun, request, timeout=LAST_WORD)


class _Patience:
    """How long to try again, and when: after ever longer times, until a connection has been broken for too long."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reward()

    def reward(self) -> None:
        """Begin anew: something has arrived."""
        self._deadline = monotonic() + self._seconds
        self._wait = 0.05

    async def spend(self, error: aio.AioRpcError) -> None:
        """Wait before the next try. Raises ``Refused`` where none is of use."""
        if not is_interruption(error) or monotonic() + self._wait > self._deadline:
            raise _refused(error) from error
        await asyncio.sleep(self._wait * random.uniform(0.5, 1.0))  # noqa: S311 - to spread clients out
        self._wait = min(2 * self._wait, 2.0)


def is_interruption(error: aio.AioRpcError) -> bool:
    """Return whether a call has ended for the connection's sake, not because the service refuses it.

    Whoever writes to a call at the moment of its end is told INTERNAL by gRPC itself, whatever the end was.
    """
    in_writing = error.code() is StatusCode.INTERNAL and error.details() == "Internal error from Core"
    return in_writing or error.code() in _INTERRUPTIONS


async def _write(call: Any, request: pb.TrainRequest) -> None:
    """Send a message; where the service does not take it any more, raise what it has answered."""
    try:
        await call.write(request)
    except asyncio.InvalidStateError:  # the call has ended
        await _read(call)


async def _read(call: Any) -> pb.TrainEvent:
    event = await call.read()
    if event is EOF:
        code, details = await call.code(), await call.details()
        raise aio.AioRpcError(code, await call.initial_metadata(), await call.trailing_metadata(), details, None)
    return event  # type: ignore[no-any-return]


@asynccontextmanager
async def _made_ahead(
    requests: Iterator[pb.TrainRequest], skipped: int
) -> AsyncIterator[Callable[[], Awaitable[pb.TrainRequest | None]]]:
    """Offer the messages one by one, None after the last; each is made in a thread while the one before is sent."""
    loop = asyncio.get_running_loop()
    async with thread_pool(1, "requests") as threads:
        made = loop.run_in_executor(threads, next, islice(requests, skipped, skipped + 1), None)

        async def next_request() -> pb.TrainRequest | None:
            nonlocal made
            request = await made
            made = loop.run_in_executor(threads, next, requests, None)
            return request

        yield next_request


def _requests(data: Dataset) -> Iterator[pb.TrainRequest]:
    """Yield the messages of a dataset, always the same ones: arrays in even pieces, files until one is full. Blocks."""
    yield from _array_requests(data) if isinstance(data, ArrayDataset) else _record_requests(data)


def _array_requests(data: ArrayDataset) -> Iterator[pb.TrainRequest]:
    images = data.images if data.images.ndim == 4 else data.images[..., np.newaxis]
    count = min(MOST_IMAGES, max(1, PIECE // max(1, images[:1].nbytes)))
    for first in range(0, len(images), count):
        labels = data.labels[first : first + count].tolist()
        yield _array_request(images[first : first + count], labels, last=first + count >= len(images))


def _array_request(images: Array, labels: Sequence[int], last: bool) -> pb.TrainRequest:
    request = pb.TrainRequest()
    _fill(request.batch.tensor, images)
    request.batch.labels.extend(labels)
    request.batch.last = last
    return request


def _record_requests(data: Dataset) -> Iterator[pb.TrainRequest]:
    waiting, size = pb.TrainRequest(), 0
    for index in range(len(data)):
        record = data[index]
        content = record.source.read()
        if isinstance(content, np.ndarray):
            yield from () if not waiting.batch.labels else (waiting,)
            image = content if content.ndim == 3 else content[..., np.newaxis]
            yield _array_request(image[np.newaxis], [record.label], last=index + 1 == len(data))
            waiting, size = pb.TrainRequest(), 0
            continue
        if waiting.batch.labels and (size + len(content) > PIECE or len(waiting.batch.labels) == MOST_IMAGES):
            yield waiting
            waiting, size = pb.TrainRequest(), 0
        waiting.batch.encoded.images.append(content)
        waiting.batch.labels.append(record.label)
        size += len(content)
    if waiting.batch.labels:
        waiting.batch.last = True
        yield waiting


def _classifier(content: bytes) -> Classifier:
    with TemporaryDirectory(prefix="asynctrain-") as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(content)
        return Classifier.load(path)


def _fill(tensor: pb.Tensor, images: Array) -> None:
    """Let ``tensor``, which is part of its message already, hold images: what is put together is copied once more."""
    if images.dtype != np.uint8:
        raise TypeError(f"images must be an array of uint8, got {images.dtype}")
    tensor.dtype = pb.Tensor.UINT8
    tensor.shape.extend(images.shape)
    tensor.data = images.tobytes()


def _trained(info: pb.RunInfo) -> Trained:
    if info.WhichOneof("outcome") == "failed":
        raise Refused(CODES[info.failed.code], info.failed.detail)
    found = info.done
    reason: Literal["finished", "stopped"] = "stopped" if found.stopped else "finished"
    return Trained(info.run_id, reason, found.step, found.digest, dict(found.metrics), found.seconds)


def _refused(error: aio.AioRpcError) -> Refused:
    return Refused(error.code(), error.details() or "")
