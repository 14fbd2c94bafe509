"""What a run does: step after step, and what is due in between. ``Run`` is how others see it and ask things of it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from asynctrain._aio import ServingGroup, first_of_several, thread_pool
from asynctrain.errors import ClosedError, ExecutorError
from asynctrain.executors.base import Executor, Session, threads_of
from asynctrain.inference import evaluate
from asynctrain.inference.classifier import Classifier
from asynctrain.nn.model import Model
from asynctrain.optim.transforms import Optimizer
from asynctrain.train.checkpoint import Checkpoint
from asynctrain.train.control import Gap, Limits, Requests, lasting_repr
from asynctrain.train.controllers import Controller, Decision
from asynctrain.train.events import (
    Callback,
    EpochEnd,
    Evaluation,
    Event,
    Paused,
    Reason,
    Resumed,
    RunEnd,
    RunStart,
    SampleSkipped,
    StepEnd,
    of_worker,
)
from asynctrain.train.log import EventLog
from asynctrain.train.notebook import Curve
from asynctrain.train.progress import Clock
from asynctrain.train.run_folder import RunFolder
from asynctrain.train.saving import Saver, Saving
from asynctrain.train.state import Kept, TrainState
from asynctrain.train.step import TrainStep
from asynctrain.types import Batch, BatchIterator, BatchStream, Notice, Skipped, Sums


@dataclass(frozen=True, slots=True)
class Job:
    """What a run is asked to do; see ``Trainer.start`` for the meaning of each."""

    model: Model
    optimizer: Optimizer
    executor: Executor
    microbatch: int | None
    loader: BatchStream
    limits: Limits
    validation: BatchStream | None
    validate_every: int | None
    metrics: Sequence[evaluate.Metric]
    callbacks: Sequence[Callback]
    controllers: Sequence[Controller]
    saving: Saving
    folder: RunFolder | None
    describe: Callable[[TrainState], Checkpoint]

    def classifier(self, state: TrainState) -> Classifier:
        """Return a classifier with the weights of ``state``."""
        settings = getattr(self.loader, "settings", None)  # a loader of the user's own may have none
        return Classifier.from_state(self.model, state, classes=self.loader.classes, settings=settings)

    def steps_from(self, first: int) -> int | None:
        """Return how many steps there will be in all for a run that begins after ``first``; None: the end will tell."""
        per_epoch = self.loader.batches_per_epoch
        ends = [self.limits.steps] if self.limits.steps is not None else []
        if self.limits.epochs is not None and per_epoch is not None:
            ends.append(self.limits.epochs * per_epoch)
        return max(min(ends), first) if ends else None


class Training:
    """What a run does, from its first step to its last.

    Args:
        job: what it is asked to do.
        state: from which it begins.
        earlier: the events of the attempts before this one.
        differences: what is not as it was then, in words.

    Attributes:
        state: after the last step, in arrays that the next one changes; ``hand_out()`` gives those that stay.
        log: of its events.
        requests: what others ask of it.
        ended: set once nothing more will happen.
        reason: why it has ended; before that it means nothing.
        error: what it failed of.
        listener: the task that does what is asked between two batches, and calls callbacks too.
        batches: of the loader, while it trains.
        epoch: from 0.
        first_step: how many steps were done before this attempt.
        samples: of this attempt.
        last: the sums of the last step.
        losses: of all steps of this attempt, thinned out.
        clock: of this attempt.
    """

    def __init__(self, job: Job, state: TrainState, earlier: Sequence[Event], differences: Sequence[str]) -> None:
        self._job = job
        self._differences = tuple(differences)
        self.state = state
        self.log = EventLog(job.folder.events if job.folder else None, earlier)
        self.requests = Requests()
        self.ended = asyncio.Event()
        self.reason: Reason = "cancelled"
        self.error: Exception | None = None
        self.listener: asyncio.Task[None] | None = None
        self.batches: BatchIterator | None = None
        self.epoch = state.cursor.epoch - _is_epoch_over(state)
        self.first_step = state.step
        self.samples = 0
        self.last = Sums()
        self.losses = Curve()
        self.clock = Clock()
        self._epoch_began = 0.0  # by the clock
        self._step: TrainStep | None = None
        self._saver: Saver | None = None
        self._unheard: list[Event] = []  # told amid a step; the callbacks hear of it after that
        self._noticed: list[Notice] = []  # before the run's first event
        self._resumed = bool(earlier) or state.step > 0
        attempts = [event.attempt for event in earlier if isinstance(event, Resumed)]
        self._attempt = max(state.attempt, *attempts, 0) + 1 if self._resumed else 1  # not all came to a checkpoint
        self._told = 0  # samples that were left out
        self._limit = ""  # the one that was reached

    def hand_out(self) -> TrainState:
        """Return the state after the last step, in read-only arrays that stay as they are."""
        return self._step.hand_out(self.state) if self._step else self.state.copy()

    @property
    def rate(self) -> float:
        """Samples per second since the start, pauses not counted."""
        return self.samples / max(1e-9, self.clock.active)

    @property
    def last_evaluation(self) -> Evaluation | None:
        """The one before now, of this attempt or an earlier one."""
        return next((event for event in reversed(self.state.history) if isinstance(event, Evaluation)), None)

    async def main(self) -> None:
        """Train to the end: the body of the run's task. Errors are kept for the listeners, a cancellation passes."""
        async with AsyncExitStack() as stack:
            threads = await stack.enter_async_context(thread_pool(2, "files"))
            serving = await stack.enter_async_context(ServingGroup())
            serving.create_task(self.log.write(threads), name="write-events")
            if self._job.folder is not None:
                self._saver = Saver(
                    self._job.saving,
                    self._job.folder,
                    self.state,
                    self._job.describe,
                    serving,
                    threads,
                    self._tell_amid_step,
                )
            try:
                self.reason = await self._train()
            except Exception as error:
                self.reason, self.error = "failed", error
            finally:
                await self._close(threads)

    async def _train(self) -> Reason:
        job, state = self._job, self.state
        async with (
            thread_pool(os.cpu_count() or 1, "update") as threads,
            job.executor.open(state.program, self._notice) as session,
            job.loader.open(
                state.cursor, epochs=job.limits.epochs or 2**62, threads=threads_of(job.executor)
            ) as batches,
        ):
            self.batches = batches
            step = TrainStep(job.model, session, job.optimizer, job.microbatch, threads)
            self.state = await step.begin(self._begun(state))
            self._step = step
            self.clock = Clock()
            deadline = latest = None
            if job.limits.seconds is not None:
                deadline = time.monotonic() + job.limits.seconds
                latest = asyncio.get_running_loop().time() + job.limits.seconds + 0.01  # two clocks may differ
            await self._tell(self._start())
            self._tell_noticed()
            if self._resumed:
                await self._tell(Resumed(state.step, self.state.attempt, self._differences))
                for difference in self._differences:
                    logging.getLogger("asynctrain").warning("this run goes on, though not as it was: %s", difference)
            await self._settle(session)
            async with ServingGroup() as serving:
                gap = Gap(self.requests, self._listen_amid_step, latest)
                self.listener = serving.create_task(gap.attend(), name="listen")
                while not self._is_over(deadline) and (batch := await gap.next(batches)) is not None:
                    await self._apply(session, step, batch, batches)
                    await self._listen()
            if gap.was_cut:
                self._is_over(deadline)
            if self.requests.stop or self.state.stopped_by:
                return "stopped"
            if self._limit:
                return "finished"
            await self._tell_skipped(batches)
            await self._end_epoch(session)
        return "finished"

    def _start(self) -> RunStart:
        job = self._job
        return RunStart(
            epochs=job.limits.epochs,
            step=self.state.step,
            steps=job.steps_from(self.first_step),
            steps_per_epoch=job.loader.batches_per_epoch,
            samples_per_epoch=job.loader.samples_per_epoch,
            parameters=sum(array.size for array in self.state.params.values()),
        )

    def _is_over(self, deadline: float | None) -> bool:
        self._limit = self._job.limits.reached(self.state.step, self.state.samples, deadline)
        return self.requests.stop or bool(self._limit or self.state.stopped_by)

    def _begun(self, state: TrainState) -> TrainState:
        controllers = {controller.name: controller.begin() for controller in self._job.controllers}
        if state.stopper not in map(lasting_repr, self._job.controllers):
            state = replace(state, stopped_by="", stopper="", restore="")
        return replace(
            state,
            attempt=self._attempt,
            controllers={name: state.controllers.get(name, fresh) for name, fresh in controllers.items()},
        )

    async def _apply(self, session: Session, step: TrainStep, batch: Batch, batches: BatchIterator) -> None:
        """Train on ``batch``, and do what is due before and after it."""
        if batch.epoch != self.epoch:
            await self._tell_skipped(batches)
            await self._end_epoch(session)
            self.epoch = batch.epoch
        await self._tell_skipped(batches)
        with first_of_several():
            state, sums = await step(self.state, batch)
        self.state = replace(state, sums=state.sums + sums, samples=state.samples + sums.samples)
        self.samples += sums.samples
        self.last = sums
        self.losses.add(state.step, sums.mean_loss)
        told = sums.mean_loss, sums.accuracy, sums.samples, self.rate, state.attempt
        await self._tell(StepEnd(self.epoch + 1, state.step, *told))
        await self._settle(session)

    async def _settle(self, session: Session) -> None:
        """Do what is due after a step; after a resume too, where the run was left before it was done."""
        every = self._job.validate_every
        if every and self.state.step and self.state.step % every == 0 and self._evaluated_here() is None:
            await self._validate(session)
        if _is_epoch_over(self.state):
            await self._end_epoch(session)

    def _evaluated_here(self) -> evaluate.EvaluationResult | None:
        """Return what the evaluation after the last step has found, if there was one."""
        last = self.last_evaluation
        return last.result if last is not None and last.step == self.state.step else None

    async def _listen(self) -> None:
        """Do what was asked meanwhile; the moment between two steps."""
        if self.log.error is not None:
            raise self.log.error
        if self._saver is not None:
            await self._saver.keep_pace()
            self._saver.raise_error()
            self._save_if_asked()
            if self._saver.is_due(self.state):
                self._save()
        await self._attend_unheard()
        await self._listen_amid_step()

    async def _listen_amid_step(self) -> None:
        """Save and pause where that was asked; the moment between two batches of an evaluation too.

        The state is that after the last step, to which the evaluation belongs: resumed from there it is done again.
        """
        self._save_if_asked()
        while self.requests.holds():  # it may be asked for another while the end of one is told
            await self._pause()
            self._save_if_asked()

    async def _pause(self) -> None:
        self.clock.hold()
        await self._tell(Paused(self.state.step))
        while self.requests.holds():
            self.requests.news.clear()
            self.requests.tell_paused()  # once more to who resumes and pauses in one turn: then this pause goes on
            self._save_if_asked()
            await self.requests.news.wait()
        self.clock.go_on()
        await self._tell(Resumed(self.state.step, self.state.attempt))

    def _save_if_asked(self) -> None:
        if waiting := self.requests.take_checkpoints():
            self._save(waiting)

    def _save(self, waiting: Sequence[asyncio.Future[Path]] = ()) -> None:
        if self._saver is not None and self._step is not None:
            self._saver.begin(self._step.hand_out(self.state), waiting)

    async def _end_epoch(self, session: Session) -> None:
        """Tell the end of the epoch, once: its last batch may not be known as such when samples are skipped."""
        if not self.state.sums.samples:
            return
        if not self._job.validate_every and self._evaluated_here() is None:
            await self._validate(session)
        validation = self.last_evaluation
        state, now = self.state, self.clock.active
        event = EpochEnd(
            epoch=self.epoch + 1,
            step=state.step,
            loss=state.sums.mean_loss,
            accuracy=state.sums.accuracy,
            samples=state.sums.samples,
            seconds=now - self._epoch_began,
            validation=None if validation is None else validation.result,
        )
        self._epoch_began = now
        self.state = replace(state, sums=Sums())
        await self._remember(event)

    async def _validate(self, session: Session) -> None:
        job = self._job
        if job.validation is None:
            return
        state, started = self.state, self.clock.active
        averaged = "average" in state.optimizer_state
        version = -1 - state.step if averaged else state.step  # the weights that are trained have the others
        if averaged:
            await session.broadcast(state.averaged().params, state.model_state, version)
        result = await evaluate.evaluate(
            session,
            version,
            job.validation,
            job.microbatch,
            job.metrics,
            self._listen_amid_step,
            threads_of(job.executor),
        )
        if averaged:
            await session.broadcast(state.params, state.model_state, state.step)
        seconds = self.clock.active - started
        for skipped in result.skipped:
            await self._tell(_skipping(self.epoch, skipped))
        found = replace(result, skipped=())  # told already; a history that kept them would grow with every evaluation
        await self._remember(Evaluation(self.epoch + 1, state.step, found, seconds))

    async def _remember(self, event: EpochEnd | Evaluation) -> None:
        numbered = self.log.publish(event)
        self.state = replace(self.state, history=(*self.state.history, numbered))
        await self._attend(numbered)

    async def _tell(self, event: Event) -> None:
        await self._attend(self.log.publish(event))

    async def _attend(self, event: Event) -> None:
        """Let controllers and callbacks see an event, in their order."""
        for controller in self._job.controllers:
            own, decision = controller.update(self.state.controllers[controller.name], event)
            self.state = replace(self.state, controllers={**self.state.controllers, controller.name: own})
            self._obey(controller, decision)
        await self._call_back(event)

    def _tell_amid_step(self, event: Event) -> None:
        self._unheard.append(self.log.publish(event))

    def _notice(self, notice: Notice) -> None:
        """Hear of a worker, at any time from the opening of the session on."""
        self._noticed.append(notice)
        if self._step is not None:
            self._tell_noticed()

    def _tell_noticed(self) -> None:
        while self._noticed:
            self._tell_amid_step(of_worker(self._noticed.pop(0)))

    async def _attend_unheard(self) -> None:
        """Let callbacks hear of checkpoints and workers; controllers must not, as the moment is a chance."""
        while self._unheard:
            await self._call_back(self._unheard.pop(0))

    async def _call_back(self, event: Event) -> None:
        for callback in self._job.callbacks:
            waiting = callback(event)
            if inspect.isawaitable(waiting):
                await waiting

    def _obey(self, controller: Controller, decision: Decision) -> None:
        state, name = self.state, controller.name
        if decision.scale_learning_rate != 1.0:
            scale = state.learning_rate_scale * decision.scale_learning_rate
            self.state = state = replace(state, learning_rate_scale=scale)
        if decision.keep_best and self._step is not None:
            best = self._step.hand_out(state)
            kept = Kept(state.step, best.params, best.model_state)
            self.state = state = replace(state, kept={**state.kept, name: kept})
        if decision.stop and not state.stopped_by:
            restore = name if decision.restore_best and name in state.kept else ""
            self.state = replace(state, stopped_by=decision.stop, stopper=lasting_repr(controller), restore=restore)

    async def _tell_skipped(self, batches: BatchIterator) -> None:
        """Tell the samples that were left out and belong to the epoch, or one before it."""
        for skipped in batches.skipped[self._told :]:
            if skipped.epoch <= self.epoch:
                self._told += 1
                await self._tell(_skipping(skipped.epoch, skipped))

    async def _close(self, threads: ThreadPoolExecutor) -> None:
        """Save what was reached, and tell the end; cancelled once more, leave the earlier files as they are."""
        try:
            if self._saver is not None and self.state.step:
                await self._saver.finish(self.hand_out())
                if isinstance(self.error, ExecutorError):
                    self.error.add_note(f"the last checkpoint is {self._saver.path_of(self.state)}")
            if self._job.folder is not None and self.state.step:
                save = partial(self._job.classifier(self.outcome()).save, self._job.folder.model)
                await asyncio.get_running_loop().run_in_executor(threads, save)
        except Exception as error:
            self.error = self.error or error
            self.reason = "failed" if self.reason != "cancelled" else self.reason
        finally:
            self.clock.stop()
            told = None if self.error is None else str(self.error)
            why = self.state.stopped_by or self._limit or None
            await self._tell_end(RunEnd(self.reason, self.state.step, self.clock.elapsed, told, why), threads)

    def outcome(self) -> TrainState:
        """Return what the run has come to: its last state, or the best one where a controller wants that."""
        state = self.hand_out()
        if self.reason not in ("finished", "stopped") or not state.restore:
            return state
        kept = state.kept[state.restore]
        return replace(state, params=kept.params, model_state=kept.model_state)

    async def _tell_end(self, end: RunEnd, threads: ThreadPoolExecutor) -> None:
        try:
            await self._attend_unheard()
            await self._tell(end)
        except Exception as error:  # a callback's
            self.error = self.error or error
        finally:
            await self.log.close(threads)

    def end(self) -> None:
        """Let nobody wait any longer, whatever happened."""
        self.log.end()
        self.requests.tell_paused()
        for future in self.requests.take_checkpoints():
            future.set_exception(ClosedError("the run has ended, and its last state is saved already"))
        self.clock.stop()
        self.ended.set()


def _skipping(epoch: int, skipped: Skipped) -> SampleSkipped:
    return SampleSkipped(epoch + 1, skipped.position, skipped.source, skipped.reason)


def _is_epoch_over(state: TrainState) -> bool:
    """Return whether the epoch before the cursor's is done and its end not yet told."""
    return state.cursor.position == 0 and state.sums.samples > 0
