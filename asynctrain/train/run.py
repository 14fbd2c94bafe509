"""A run under way: await it, iterate over its events, stop it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from asynctrain._aio import thread_pool
from asynctrain.executors.base import Executor, Session
from asynctrain.inference.classifier import Classifier
from asynctrain.inference.evaluate import Evaluation, evaluate
from asynctrain.nn.model import Model
from asynctrain.optim.transforms import Optimizer
from asynctrain.train.events import EpochEnd, Event, EventLog, Reason, RunEnd, RunStart, SampleSkipped, StepEnd
from asynctrain.train.history import History
from asynctrain.train.run_folder import RunFolder
from asynctrain.train.state import TrainState
from asynctrain.train.step import TrainStep
from asynctrain.types import Batch, BatchIterator, BatchStream, Sums


@dataclass(frozen=True, slots=True)
class Job:
    """What a run is asked to do; see ``Trainer.start`` for the meaning of each."""

    model: Model
    optimizer: Optimizer
    executor: Executor
    microbatch: int
    loader: BatchStream
    epochs: int
    validation: BatchStream | None
    folder: RunFolder | None


class Run:
    """A training run under way, made by ``Trainer.start``.

    ``async for event in run`` yields its events from the first on and may be done by any number of listeners; a slow
    one never slows the training.
    """

    task: asyncio.Task[None]  # the one that trains; its owner sets it

    def __init__(self, job: Job, state: TrainState) -> None:
        self._job = job
        self._state = state
        self._events = EventLog()
        self._epochs: list[EpochEnd] = []
        self._epoch = state.cursor.epoch
        self._samples = 0
        self._told = 0  # samples that were left out
        self._started = self._epoch_started = time.perf_counter()
        self._seconds = 0.0
        self._stop_asked = False
        self._reason: Reason = "cancelled"
        self._error: Exception | None = None
        self._ended = asyncio.Event()

    @property
    def state(self) -> TrainState:
        """The state after the last step, in read-only arrays of the caller's own."""
        return self._state.copy()

    def __aiter__(self) -> AsyncIterator[Event]:
        return self.events()

    async def events(self, number: int = 0) -> AsyncIterator[Event]:
        """Yield the events from ``number`` on; where the run failed, raise its error after the last one."""
        async for event in self._events.follow(number):
            yield event
        self.raise_error()

    async def result(self) -> History:
        """Wait for the end and return the history; cancelling the wait leaves the run alone.

        Raises the run's error if it failed, ``CancelledError`` if it was cancelled.
        """
        await self._ended.wait()
        return self.history()

    async def stop(self) -> History:
        """Let the run end, normally, after the step it is in, and return its history."""
        self._stop_asked = True
        return await self.result()

    def history(self) -> History:
        """Return what was reached, once the run has ended; raises like ``result``."""
        self.raise_error()
        if self._reason == "cancelled":
            raise asyncio.CancelledError
        return History(self.state, tuple(self._epochs), self._reason, self._samples, self._seconds)

    def raise_error(self) -> None:
        """Raise what the run failed of, if it did."""
        if self._error is not None:
            raise self._error

    async def main(self) -> None:
        """Train to the end: the body of the run's task. Errors are kept for the listeners, a cancellation passes."""
        try:
            self._reason = await self._train()
        except Exception as error:
            self._reason, self._error = "failed", error
        finally:
            self._seconds = time.perf_counter() - self._started
            told = None if self._error is None else str(self._error)
            self._publish(RunEnd(self._reason, self._state.step, self._seconds, told))
            try:
                await self._save()
            except Exception as error:
                self._error = self._error or error
            finally:
                self._events.close()
                self._ended.set()

    async def _train(self) -> Reason:
        job, state = self._job, self._state
        async with (
            thread_pool(None, "update") as threads,
            job.executor.open(state.program) as session,
            job.loader.open(state.cursor, epochs=job.epochs) as batches,
        ):
            step = TrainStep(job.model, session, job.optimizer, job.microbatch, threads)
            self._state = await step.begin(state)
            self._publish(self._start_event())
            async for batch in batches:
                if batch.epoch != self._epoch:
                    self._tell_skipped(batches)
                    await self._end_epoch(session)
                    self._epoch = batch.epoch
                self._tell_skipped(batches)
                await self._apply(step, batch)
                if batch.last:
                    await self._end_epoch(session)
                if self._stop_asked:
                    return "stopped"
            self._tell_skipped(batches)
            await self._end_epoch(session)
        return "finished"

    async def _apply(self, step: TrainStep, batch: Batch) -> None:
        state, sums = await step(self._state, batch)
        self._state = replace(state, sums=state.sums + sums)
        self._samples += sums.samples
        rate = self._samples / (time.perf_counter() - self._started)
        self._publish(StepEnd(self._epoch + 1, state.step, sums.mean_loss, sums.accuracy, sums.samples, rate))

    def _tell_skipped(self, batches: BatchIterator) -> None:
        """Tell the samples that were left out and belong to the epoch, or one before it."""
        for skipped in batches.skipped[self._told :]:
            if skipped.epoch <= self._epoch:
                self._told += 1
                self._publish(SampleSkipped(skipped.epoch + 1, skipped.position, skipped.source, skipped.reason))

    async def _end_epoch(self, session: Session) -> None:
        """Tell the end of the epoch, once: its last batch may not be known as such when samples are skipped."""
        if not self._state.sums.samples:
            return
        validation = await self._validate(session)
        state, now = self._state, time.perf_counter()
        event = EpochEnd(
            epoch=self._epoch + 1,
            step=state.step,
            loss=state.sums.mean_loss,
            accuracy=state.sums.accuracy,
            samples=state.sums.samples,
            seconds=now - self._epoch_started,
            validation=validation,
        )
        self._epoch_started = now
        self._state = replace(state, sums=Sums())
        self._epochs.append(event)
        self._publish(event)
        if self._job.folder:
            await self._job.folder.flush()

    async def _validate(self, session: Session) -> Evaluation | None:
        if self._job.validation is None:
            return None
        return await evaluate(session, self._state.step, self._job.validation, self._job.microbatch)

    async def _save(self) -> None:
        job = self._job
        if job.folder:
            await job.folder.flush()
        if job.folder and self._state.step:
            await job.folder.save(Classifier.from_state(job.model, self._state, classes=job.loader.classes))

    def _publish(self, event: Event) -> None:
        number = self._events.publish(event)
        if self._job.folder:
            self._job.folder.record(number, event)

    def _start_event(self) -> RunStart:
        job = self._job
        per_epoch = job.loader.batches_per_epoch
        return RunStart(
            epochs=job.epochs,
            step=self._state.step,
            steps=None if per_epoch is None else job.epochs * per_epoch,
            steps_per_epoch=per_epoch,
            samples_per_epoch=job.loader.samples_per_epoch,
            parameters=sum(array.size for array in self._state.params.values()),
        )

    def __repr__(self) -> str:
        told = self._reason if self._ended.is_set() else "running"
        return f"<Run {told}, step {self._state.step}, epoch {self._state.cursor.epoch + 1} of {self._job.epochs}>"
