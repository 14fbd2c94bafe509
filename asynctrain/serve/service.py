"""The methods of the training service."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from io import BufferedRandom, BufferedReader
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from grpc import StatusCode

from asynctrain._aio import ServingGroup
from asynctrain.data.images import ImageSettings
from asynctrain.inference.classifier import Classifier
from asynctrain.inference.classifier import Prediction as Predicted
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve import asynctrain_pb2_grpc as rpc
from asynctrain.serve.boundary import Context, Malformed, client
from asynctrain.serve.messages import EOF, done, failed
from asynctrain.serve.refusal import Refused, invalid, require_at_most, unfit
from asynctrain.serve.runs import Runs, ServedRun, Ticket
from asynctrain.serve.samples import read_images
from asynctrain.serve.watching import watch

CREDITS = 8  # batches that a client may be ahead of the disk
CHUNK = 2**20  # bytes of a model in one message
PAGE = 100  # runs in one message
TOP = 5  # classes named for an image
LOADED = 4  # models of ended runs that are kept in memory


class TrainingService(rpc.TrainingServicer):
    """Answers calls; whoever makes them, and how they are refused, is the boundary's business."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._loaded: OrderedDict[str, Classifier] = OrderedDict()

    # Training

    async def TrainModel(  # type: ignore[override] # noqa: N802 - the proto's name; the stubs know only generators
        self, request_iterator: Any, context: Context
    ) -> None:
        """Take data in, and tell what becomes of it until the run ends."""
        async with ServingGroup() as tasks:
            inbox = _Inbox(self._runs, context, tasks)
            start = (await inbox.next("start")).start
            run = await self._runs.begin(client(), start)
            with self._held(run) as ticket:
                await self._accept(run, context)
                await self._receive(run, ticket, inbox, context)
                async with aclosing(watch(self._runs, run, start.from_event)) as events:
                    async for event in events:
                        await context.write(event)

    async def TrainModelUnary(  # noqa: N802 - as above
        self, request: pb.TrainModelRequest, context: Context
    ) -> pb.TrainModelResponse:
        """Train on one message's data, and answer at the end."""
        if not request.HasField("start"):
            raise invalid("a TrainModelRequest must have a start")
        run = await self._runs.begin(client(), request.start)
        with self._held(run) as ticket:
            if run.record.phase == "receiving":
                await self._runs.store(run, ticket, request, 0, last=True)
            outcome = await self._runs.ended(run)
        response = pb.TrainModelResponse(run_id=run.run_id)
        if outcome.end in ("finished", "stopped"):
            response.done.CopyFrom(done(outcome))
        else:
            response.failed.CopyFrom(failed(outcome))
        return response

    @contextmanager
    def _held(self, run: ServedRun) -> Iterator[Ticket]:
        """Hold a run for this call, until another call takes it over, which ends this one."""
        ticket = run.take()
        try:
            yield ticket
        except asyncio.CancelledError:
            ticket.require()
            raise
        finally:
            self._runs.leave(run, ticket)

    async def _accept(self, run: ServedRun, context: Context) -> None:
        accepted = pb.Accepted(
            run_id=run.run_id,
            credits=CREDITS,
            next_sequence=await self._runs.stored(run),
            complete=run.record.phase != "receiving",
            state=run.state,
        )
        await context.write(pb.TrainEvent(accepted=accepted))

    async def _receive(self, run: ServedRun, ticket: Ticket, inbox: _Inbox, context: Context) -> None:
        """Store what the client sends, until it is complete, or the run not wanted any more."""
        while run.record.phase == "receiving":
            news = run.news
            request = await inbox.next("batch", news)
            if request is not None:
                batch = request.batch
                if not batch.last:
                    inbox.read_ahead()
                stored = await self._runs.store(run, ticket, batch, batch.sequence, batch.last)
                await context.write(pb.TrainEvent(credit=pb.Credit(credits=1, next_sequence=stored)))

    # Runs

    async def GetRun(self, request: pb.GetRunRequest, context: Context) -> pb.RunInfo:  # noqa: N802
        """Return what is known of a run."""
        return self._info(self._run(request.run_id))

    async def ListRuns(self, request: pb.ListRunsRequest, context: Context) -> pb.ListRunsResponse:  # noqa: N802
        """Return the client's runs, a page at a time."""
        runs = self._runs.of(client())
        names = [run.run_id for run in runs]
        if request.page_token and request.page_token not in names:
            raise invalid("page_token must be the next_page_token of the page before")
        first = names.index(request.page_token) if request.page_token else 0
        after = first + min(request.page_size or PAGE, PAGE)
        page = [self._info(run) for run in runs[first:after]]
        return pb.ListRunsResponse(runs=page, next_page_token=names[after] if after < len(names) else "")

    async def WatchRun(  # noqa: N802
        self, request: pb.WatchRunRequest, context: Context
    ) -> AsyncGenerator[pb.TrainEvent, None]:
        """Yield the events of a run."""
        async with aclosing(watch(self._runs, self._run(request.run_id), request.from_event)) as events:
            async for event in events:
                yield event

    async def PauseRun(self, request: pb.PauseRunRequest, context: Context) -> pb.RunInfo:  # noqa: N802
        """Let a run wait."""
        run = self._run(request.run_id)
        await self._runs.pause(run)
        return self._info(run)

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: Context) -> pb.RunInfo:  # noqa: N802
        """Let a run go on."""
        run = self._run(request.run_id)
        await self._runs.resume(run)
        return self._info(run)

    async def StopRun(self, request: pb.StopRunRequest, context: Context) -> pb.RunInfo:  # noqa: N802
        """End a run after its step."""
        run = self._run(request.run_id)
        await self._runs.stop(run)
        return self._info(run)

    async def CancelRun(self, request: pb.CancelRunRequest, context: Context) -> pb.RunInfo:  # noqa: N802
        """End a run at once."""
        run = self._run(request.run_id)
        await self._runs.cancel(run)
        return self._info(run)

    def _run(self, run_id: str) -> ServedRun:
        return self._runs.get(client(), run_id)

    def _info(self, run: ServedRun) -> pb.RunInfo:
        record, spool, live, outcome = run.record, run.spool, run.live, run.outcome
        info = pb.RunInfo(
            run_id=run.run_id,
            state=run.state,
            idempotency_key=record.key,
            created=record.created,
            next_sequence=record.messages if spool is None else spool.contents.messages,
            samples=record.images if spool is None else spool.contents.images,
            queue_position=self._runs.queue_position(run),
            epochs=record.epochs,
            next_event=run.next_event,
        )
        if live is not None:
            progress = live.progress
            info.epoch, info.step, info.loss = progress.epoch, progress.step, progress.loss
            info.accuracy = progress.metrics["accuracy"]
            if progress.steps is not None:
                info.steps = progress.steps
        if outcome is not None:
            info.step = outcome.step
            if outcome.end in ("finished", "stopped"):
                info.done.CopyFrom(done(outcome))
            else:
                info.failed.CopyFrom(failed(outcome))
        return info

    # Models

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> AsyncGenerator[pb.ModelChunk, None]:
        """Yield the model's file, piece by piece."""
        run = self._run(request.run_id)
        snapshot = None if run.live is None else run.live.snapshot()
        in_thread = self._runs.in_file_thread
        stack = ExitStack()  # has the file, should this be cancelled while it is being opened
        try:
            file = await in_thread(_opened, stack, snapshot, run.folder.model)
            total, digest = await in_thread(_measured, file)
            for offset in range(0, total, CHUNK):
                data = await in_thread(file.read, CHUNK)
                yield pb.ModelChunk(data=data, offset=offset, total=total, sha256=digest)
        finally:
            await in_thread(stack.close)  # with a file that has no name its bytes go, which takes a while

    async def Predict(self, request: pb.PredictRequest, context: Context) -> pb.PredictResponse:  # noqa: N802
        """Say what is on images."""
        classifier = await self._classifier(self._run(request.run_id))
        limits = self._runs.limits
        height, width, channels = classifier.image_shape
        settings = ImageSettings((height, width), channels, max_pixels=limits.image_pixels)
        images = await self._runs.in_file_thread(read_images, request, settings, limits)
        require_at_most(limits.prediction_images, len(images), "images to be predicted")
        if not len(images):
            raise invalid("a PredictRequest must have at least one image")
        found = await classifier.predict(list(images), top_k=request.top_k or TOP)
        return pb.PredictResponse(predictions=[_prediction(prediction) for prediction in found])

    async def _classifier(self, run: ServedRun) -> Classifier:
        """Return the model of a run as it is now."""
        if run.live is not None:
            return run.live.snapshot()
        if run.outcome is not None and run.run_id in self._loaded:
            self._loaded.move_to_end(run.run_id)
            return self._loaded[run.run_id]
        try:
            classifier = await self._runs.in_file_thread(Classifier.load, run.folder.model)
        except FileNotFoundError as error:
            raise _no_model() from error
        if run.outcome is not None:
            self._loaded[run.run_id] = classifier
            if len(self._loaded) > LOADED:
                self._loaded.popitem(last=False)
        return classifier


class _Inbox:
    """What a client sends, message by message, and no longer in coming than the limits permit."""

    def __init__(self, runs: Runs, context: Context, tasks: asyncio.TaskGroup) -> None:
        self._runs = runs
        self._context = context
        self._tasks = tasks
        self._reading: asyncio.Task[Any] | None = None  # goes on where meanwhile there was news
        self._news: asyncio.Event | None = None
        self._told: asyncio.Task[Any] | None = None  # of that news

    def read_ahead(self) -> asyncio.Task[Any]:
        """Let the next message come while this one is dealt with: one, so that memory stays bounded."""
        self._reading = self._reading or self._tasks.create_task(self._context.read(), name="read-request")
        return self._reading

    async def next(self, kind: str, news: asyncio.Event | None = None) -> Any:
        """Return the next message, which must be of ``kind``; None where ``news`` came first.

        Raises:
            Refused: it is of another kind, malformed, too late, or never comes.
        """
        reading = self.read_ahead()
        waiting = {reading} if news is None else {reading, self._await(news)}
        idle = self._runs.limits.idle_seconds
        finished, _ = await asyncio.wait(waiting, timeout=idle, return_when=asyncio.FIRST_COMPLETED)
        if self._runs.is_draining:
            raise Refused(StatusCode.UNAVAILABLE, "the server is shutting down")
        if not finished:
            raise Refused(StatusCode.DEADLINE_EXCEEDED, f"the client has sent nothing for {idle:g} s")
        if reading not in finished:
            return None
        self._reading = None
        return _required(reading.result(), kind)

    def _await(self, news: asyncio.Event) -> asyncio.Task[Any]:
        """Return the task that waits for ``news``: the same one until there is some."""
        if self._told is None or self._news is not news:
            self._news, self._told = news, self._tasks.create_task(news.wait(), name="await-news")
        return self._told


def _required(request: Any, kind: str) -> Any:
    """Return a message that was read; raises ``Refused`` where it is not of ``kind``."""
    if request is EOF:
        raise unfit("the stream has ended before its last batch")
    if isinstance(request, Malformed):
        request.require()
    if request.WhichOneof("kind") != kind:
        raise invalid(f"this message of the stream must have a {kind}")
    return request


def _opened(stack: ExitStack, snapshot: Classifier | None, path: Path) -> BufferedReader | BufferedRandom:
    """Return the open file of a model, which ``stack`` closes; that of a snapshot has no name and goes with it."""
    if snapshot is None:
        try:
            return stack.enter_context(path.open("rb"))
        except FileNotFoundError as error:
            raise _no_model() from error
    file = stack.enter_context(TemporaryFile(dir=path.parent))  # noqa: SIM115 - it is closed by the stack
    file.write(snapshot.to_bytes())
    file.seek(0)
    return file


def _no_model() -> Refused:
    return unfit("the run has no model yet")


def _measured(file: BufferedReader | BufferedRandom) -> tuple[int, str]:
    """Return the length and the SHA-256 of a file, and go back to its beginning."""
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    total = file.tell()
    file.seek(0, os.SEEK_SET)
    return total, digest


def _prediction(found: Predicted) -> pb.Prediction:
    top = [pb.Share(label=label, probability=share) for label, share in found.top]
    return pb.Prediction(label=found.label, probability=found.probability, top=top)
