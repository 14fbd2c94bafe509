"""A run under way: await it, iterate over its events, pause it, take its weights, stop it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
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
from asynctrain.train.history import SHOWN, History
from asynctrain.train.log import EventLog
from asynctrain.train.notebook import REDRAWN, Curve, Outputs, html_of
from asynctrain.train.progress import Heartbeat, Progress
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


class Run:
    """A training run under way, made by ``Trainer.start``.

    ``async for event in run`` yields its events from the first on and may be done by any number of listeners; a slow
    one never slows the training. What is asked of a run from other tasks (``pause``, ``checkpoint``, ``stop``) happens
    at the end of the step it is in.
    """

    task: asyncio.Task[None]  # the one that trains
    first_event: int  # the number of the first event of this attempt, from which on all is new

    def __init__(
        self, job: Job, state: TrainState, earlier: Sequence[Event] = (), differences: Sequence[str] = ()
    ) -> None:
        self._job = job
        self._differences = tuple(differences)
        self._state = state
        self._step: TrainStep | None = None
        self._batches: BatchIterator | None = None
        self._listener: asyncio.Task[None] | None = None  # calls callbacks too
        self._log = EventLog(job.folder.events if job.folder else None, earlier)
        self._requests = Requests()
        self._saver: Saver | None = None
        self._unheard: list[Event] = []  # told amid a step; the callbacks hear of it after that
        self._noticed: list[Notice] = []  # before the run's first event
        self._latest: Classifier | None = None  # of the snapshots, which share what they compute in
        self._heartbeat = Heartbeat()
        self._losses = Curve()
        self._outputs = Outputs()
        self.first_event = earlier[-1].number + 1 if earlier else 0
        self._first_step = state.step
        self._epoch = state.cursor.epoch - _is_epoch_over(state)
        self._resumed = bool(earlier) or state.step > 0
        attempts = [event.attempt for event in earlier if isinstance(event, Resumed)]
        self._attempt = max(state.attempt, *attempts, 0) + 1 if self._resumed else 1  # not all came to a checkpoint
        self._told = 0  # samples that were left out
        self._samples = 0  # of this attempt
        self._last = Sums()
        self._started = self._epoch_started = time.perf_counter()
        self._waited = 0.0  # seconds in pauses
        self._paused = False
        self._limit = ""  # the one that was reached
        self._seconds = 0.0
        self._reason: Reason = "cancelled"
        self._error: Exception | None = None
        self._ended = asyncio.Event()

    # What others see

    @property
    def state(self) -> TrainState:
        """The state after the last step, in read-only arrays that stay as they are."""
        return self._step.hand_out(self._state) if self._step else self._state.copy()

    @property
    def next_event(self) -> int:
        """The number that the next event will have."""
        return self._log.count

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        rate, steps = self._rate(), self._steps_in_all()
        per_step = self._samples / max(1, self._state.step - self._first_step)
        metrics = {"accuracy": self._last.accuracy}
        if (last := self._last_evaluation()) is not None:
            metrics |= {"validation.loss": last.result.loss, "validation.accuracy": last.result.accuracy}
        return Progress(
            epoch=self._epoch + 1,
            step=self._state.step,
            steps=steps,
            loss=self._last.mean_loss,
            metrics=metrics,
            samples_per_second=rate,
            eta=None if steps is None or not rate else (steps - self._state.step) * per_step / rate,
            loop_lag=self._heartbeat.lag,
            paused=self._paused,
            bottleneck=self._bottleneck(),
        )

    def _bottleneck(self) -> str | None:
        statistics = getattr(self._batches, "statistics", None)  # a loader of the user's own may have none
        return None if statistics is None else statistics().bottleneck

    def snapshot(self) -> Classifier:
        """Return a classifier with the weights after the last step: never half-updated, not copied, good for ever."""
        state = self.state
        if self._latest is None:
            self._latest = self._classifier(state)
        else:
            self._latest = self._latest.with_weights(state.params, state.model_state)
        return self._latest

    def _classifier(self, state: TrainState) -> Classifier:
        loader = self._job.loader
        settings = getattr(loader, "settings", None)  # a loader of the user's own may have none
        return Classifier.from_state(self._job.model, state, classes=loader.classes, settings=settings)

    def __aiter__(self) -> AsyncIterator[Event]:
        return self.events()

    async def events(self, number: int = 0) -> AsyncIterator[Event]:
        """Yield the events from ``number`` on, those of earlier attempts included; raise the run's error, if any, last.

        A listener that falls behind by more than 65,536 events gets ``Missed`` for those that are no longer kept.
        """
        async for event in self._log.follow(number):
            yield event
        self.raise_error()

    # What others ask

    async def pause(self) -> int:
        """Let the run wait after the step it is in; return how many steps are done, once it does, or has ended."""
        self._require_elsewhere()
        if not self._ended.is_set():
            await self._requests.ask_to_pause().wait()
        return self._state.step

    def resume(self) -> None:
        """Let a paused run go on."""
        self._requests.ask_to_resume()

    async def checkpoint(self) -> Path:
        """Save the state after the step the run is in, and return the file, once it is whole.

        Raises:
            ValueError: the run has no ``run_dir``.
            ClosedError: it has ended; its last state is saved already.
            OSError: the file cannot be written.
        """
        if self._job.folder is None:
            raise ValueError("run_dir must be given to a run that is to be checkpointed")
        if self._ended.is_set():
            raise ClosedError("the run has ended, and its last state is saved already")
        self._require_elsewhere()
        return await self._requests.ask_for_checkpoint()

    async def stop(self) -> History:
        """Let the run end, normally, after the step it is in, and return its history, as of one that was cancelled.

        Raises the run's error if it failed.
        """
        self._require_elsewhere()
        self._requests.ask_to_stop()
        await self._ended.wait()
        self.raise_error()
        return self.so_far()

    async def cancel(self) -> None:
        """Stop the computing at once, as cancelling the task that awaits ``fit`` does, and wait for the end."""
        self.task.cancel()
        await self._ended.wait()

    async def result(self) -> History:
        """Wait for the end and return the history; cancelling the wait leaves the run alone.

        Raises the run's error if it failed, ``CancelledError`` if it was cancelled.
        """
        self._require_elsewhere()
        await self._ended.wait()
        return self.history()

    def _require_elsewhere(self) -> None:
        if asyncio.current_task() in (self.task, self._listener):
            raise RuntimeError(
                "a callback cannot wait for the run, which waits for the callback; a controller can decide to stop, "
                "and a task of the program's own can ask for anything"
            )

    def history(self) -> History:
        """Return what was reached, once the run has ended; raises like ``result``, ``RuntimeError`` before the end."""
        if not self._ended.is_set():
            raise RuntimeError("a run has its history at its end; await run.result() waits for it")
        self.raise_error()
        if self._reason == "cancelled":
            raise asyncio.CancelledError
        return self.so_far()

    def so_far(self) -> History:
        """Return the history up to the last step: of a run under way, and of one that was cancelled or has failed."""
        state, seconds = self._result(), self._elapsed()
        reason = self._reason if self._ended.is_set() else None
        return History(state, state.history, reason, state.samples, seconds, self._samples / max(1e-9, seconds))

    def raise_error(self) -> None:
        """Raise what the run failed of, if it did."""
        if self._error is not None:
            raise self._error

    # What it does

    def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Start the run's task, a cancellation of which may come before it has done anything."""
        self.task = tasks.create_task(self.main(), name="train")
        self.task.add_done_callback(lambda task: self._end())

    async def main(self) -> None:
        """Train to the end: the body of the run's task. Errors are kept for the listeners, a cancellation passes."""
        async with AsyncExitStack() as stack:
            threads = await stack.enter_async_context(thread_pool(2, "files"))
            serving = await stack.enter_async_context(ServingGroup())
            serving.create_task(self._log.write(threads), name="write-events")
            serving.create_task(self._heartbeat.beat(), name="heartbeat")
            serving.create_task(self._show(), name="show")
            if self._job.folder is not None:
                self._saver = Saver(
                    self._job.saving,
                    self._job.folder,
                    self._state,
                    self._job.describe,
                    serving,
                    threads,
                    self._tell_amid_step,
                )
            try:
                self._reason = await self._train()
            except Exception as error:
                self._reason, self._error = "failed", error
            finally:
                await self._close(threads)

    async def _train(self) -> Reason:
        job, state = self._job, self._state
        async with (
            thread_pool(os.cpu_count() or 1, "update") as threads,
            job.executor.open(state.program, self._notice) as session,
            job.loader.open(
                state.cursor, epochs=job.limits.epochs or 2**62, threads=threads_of(job.executor)
            ) as batches,
        ):
            self._batches = batches
            step = TrainStep(job.model, session, job.optimizer, job.microbatch, threads)
            self._state = await step.begin(self._begun(state))
            self._step = step
            self._started = self._epoch_started = time.perf_counter()
            deadline = latest = None
            if job.limits.seconds is not None:
                deadline = time.monotonic() + job.limits.seconds
                latest = asyncio.get_running_loop().time() + job.limits.seconds + 0.01  # two clocks may differ
            await self._tell(self._start_event())
            self._tell_noticed()
            if self._resumed:
                await self._tell(Resumed(state.step, self._state.attempt, self._differences))
                for difference in self._differences:
                    logging.getLogger("asynctrain").warning("this run goes on, though not as it was: %s", difference)
            await self._settle(session)
            async with ServingGroup() as serving:
                gap = Gap(self._requests, self._listen_amid_step, latest)
                self._listener = serving.create_task(gap.attend(), name="listen")
                while not self._is_over(deadline) and (batch := await gap.next(batches)) is not None:
                    await self._apply(session, step, batch, batches)
                    await self._listen()
            if gap.was_cut:
                self._is_over(deadline)
            if self._requests.stop or self._state.stopped_by:
                return "stopped"
            if self._limit:
                return "finished"
            await self._tell_skipped(batches)
            await self._end_epoch(session)
        return "finished"

    def _is_over(self, deadline: float | None) -> bool:
        self._limit = self._job.limits.reached(self._state.step, self._state.samples, deadline)
        return self._requests.stop or bool(self._limit or self._state.stopped_by)

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
        if batch.epoch != self._epoch:
            await self._tell_skipped(batches)
            await self._end_epoch(session)
            self._epoch = batch.epoch
        await self._tell_skipped(batches)
        with first_of_several():
            state, sums = await step(self._state, batch)
        self._state = replace(state, sums=state.sums + sums, samples=state.samples + sums.samples)
        self._samples += sums.samples
        self._last = sums
        self._losses.add(state.step, sums.mean_loss)
        await self._tell(
            StepEnd(
                self._epoch + 1, state.step, sums.mean_loss, sums.accuracy, sums.samples, self._rate(), state.attempt
            )
        )
        await self._settle(session)

    async def _settle(self, session: Session) -> None:
        """Do what is due after a step; after a resume too, where the run was left before it was done."""
        every = self._job.validate_every
        if every and self._state.step and self._state.step % every == 0 and self._evaluated_here() is None:
            await self._validate(session)
        if _is_epoch_over(self._state):
            await self._end_epoch(session)

    def _evaluated_here(self) -> evaluate.EvaluationResult | None:
        """Return what the evaluation after the last step has found, if there was one."""
        last = self._last_evaluation()
        return last.result if last is not None and last.step == self._state.step else None

    def _last_evaluation(self) -> Evaluation | None:
        return next((event for event in reversed(self._state.history) if isinstance(event, Evaluation)), None)

    async def _listen(self) -> None:
        """Do what was asked meanwhile; the moment between two steps."""
        if self._log.error is not None:
            raise self._log.error
        if self._saver is not None:
            await self._saver.keep_pace()
            self._saver.raise_error()
            self._save_if_asked()
            if self._saver.is_due(self._state):
                self._save()
        await self._attend_unheard()
        await self._listen_amid_step()

    async def _listen_amid_step(self) -> None:
        """Save and pause where that was asked; the moment between two batches of an evaluation too.

        The state is that after the last step, to which the evaluation belongs: resumed from there it is done again.
        """
        self._save_if_asked()
        while self._requests.holds():  # it may be asked for another while the end of one is told
            await self._pause()
            self._save_if_asked()

    async def _pause(self) -> None:
        started = time.perf_counter()
        self._paused = True
        await self._tell(Paused(self._state.step))
        while self._requests.holds():
            self._requests.news.clear()
            self._requests.tell_paused()  # once more to who resumes and pauses in one turn: then this pause goes on
            self._save_if_asked()
            await self._requests.news.wait()
        self._paused = False
        waited = time.perf_counter() - started
        self._waited += waited
        self._epoch_started += waited
        await self._tell(Resumed(self._state.step, self._state.attempt))

    def _save_if_asked(self) -> None:
        if waiting := self._requests.take_checkpoints():
            self._save(waiting)

    def _save(self, waiting: Sequence[asyncio.Future[Path]] = ()) -> None:
        if self._saver is not None and self._step is not None:
            self._saver.begin(self._step.hand_out(self._state), waiting)

    async def _end_epoch(self, session: Session) -> None:
        """Tell the end of the epoch, once: its last batch may not be known as such when samples are skipped."""
        if not self._state.sums.samples:
            return
        if not self._job.validate_every and self._evaluated_here() is None:
            await self._validate(session)
        validation = self._last_evaluation()
        state, now = self._state, time.perf_counter()
        event = EpochEnd(
            epoch=self._epoch + 1,
            step=state.step,
            loss=state.sums.mean_loss,
            accuracy=state.sums.accuracy,
            samples=state.sums.samples,
            seconds=now - self._epoch_started,
            validation=None if validation is None else validation.result,
        )
        self._epoch_started = now
        self._state = replace(state, sums=Sums())
        await self._remember(event)

    async def _validate(self, session: Session) -> None:
        job = self._job
        if job.validation is None:
            return
        started = time.perf_counter()
        state = self._state
        averaged = "average" in state.optimizer_state
        version = -1 - state.step if averaged else state.step  # the weights that are trained have the others
        if averaged:
            await session.broadcast(state.averaged().params, state.model_state, version)
        waited = self._waited
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
        seconds = time.perf_counter() - started - (self._waited - waited)
        for skipped in result.skipped:
            await self._tell(_skipping(self._epoch, skipped))
        found = replace(result, skipped=())  # told already; a history that kept them would grow with every evaluation
        await self._remember(Evaluation(self._epoch + 1, state.step, found, seconds))

    async def _remember(self, event: EpochEnd | Evaluation) -> None:
        numbered = self._log.publish(event)
        self._state = replace(self._state, history=(*self._state.history, numbered))
        await self._attend(numbered)

    async def _tell(self, event: Event) -> None:
        await self._attend(self._log.publish(event))

    async def _attend(self, event: Event) -> None:
        """Let controllers and callbacks see an event, in their order."""
        for controller in self._job.controllers:
            own, decision = controller.update(self._state.controllers[controller.name], event)
            self._state = replace(self._state, controllers={**self._state.controllers, controller.name: own})
            self._obey(controller, decision)
        await self._call_back(event)

    def _tell_amid_step(self, event: Event) -> None:
        self._unheard.append(self._log.publish(event))

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
        state, name = self._state, controller.name
        if decision.scale_learning_rate != 1.0:
            scale = state.learning_rate_scale * decision.scale_learning_rate
            self._state = state = replace(state, learning_rate_scale=scale)
        if decision.keep_best and self._step is not None:
            best = self._step.hand_out(state)
            kept = Kept(state.step, best.params, best.model_state)
            self._state = state = replace(state, kept={**state.kept, name: kept})
        if decision.stop and not state.stopped_by:
            restore = name if decision.restore_best and name in state.kept else ""
            self._state = replace(state, stopped_by=decision.stop, stopper=lasting_repr(controller), restore=restore)

    async def _tell_skipped(self, batches: BatchIterator) -> None:
        """Tell the samples that were left out and belong to the epoch, or one before it."""
        for skipped in batches.skipped[self._told :]:
            if skipped.epoch <= self._epoch:
                self._told += 1
                await self._tell(_skipping(skipped.epoch, skipped))

    async def _close(self, threads: ThreadPoolExecutor) -> None:
        """Save what was reached, and tell the end; cancelled once more, leave the earlier files as they are."""
        try:
            if self._saver is not None and self._state.step:
                await self._saver.finish(self.state)
                if isinstance(self._error, ExecutorError):
                    self._error.add_note(f"the last checkpoint is {self._saver.path_of(self._state)}")
            if self._job.folder is not None and self._state.step:
                save = partial(self._classifier(self._result()).save, self._job.folder.model)
                await asyncio.get_running_loop().run_in_executor(threads, save)
        except Exception as error:
            self._error = self._error or error
            self._reason = "failed" if self._reason != "cancelled" else self._reason
        finally:
            self._seconds = time.perf_counter() - self._started
            told = None if self._error is None else str(self._error)
            why = self._state.stopped_by or self._limit or None
            await self._tell_end(RunEnd(self._reason, self._state.step, self._seconds, told, why), threads)

    def _result(self) -> TrainState:
        """Return what the run has come to: its last state, or the best one where a controller wants that."""
        state = self.state
        if self._reason not in ("finished", "stopped") or not state.restore:
            return state
        kept = state.kept[state.restore]
        return replace(state, params=kept.params, model_state=kept.model_state)

    async def _tell_end(self, end: RunEnd, threads: ThreadPoolExecutor) -> None:
        try:
            await self._attend_unheard()
            await self._tell(end)
        except Exception as error:  # a callback's
            self._error = self._error or error
        finally:
            await self._log.close(threads)

    def _end(self) -> None:
        """Let nobody wait any longer, whatever happened."""
        self._log.end()
        self._requests.tell_paused()
        for future in self._requests.take_checkpoints():
            future.set_exception(ClosedError("the run has ended, and its last state is saved already"))
        self._ended.set()
        self._redraw()

    def _rate(self) -> float:
        return self._samples / max(1e-9, self._elapsed() - self._waited)

    def _elapsed(self) -> float:
        """Return the seconds since the start, and from the end on those until the end."""
        return self._seconds if self._ended.is_set() else time.perf_counter() - self._started

    def _steps_in_all(self) -> int | None:
        job = self._job
        per_epoch = job.loader.batches_per_epoch
        ends = [job.limits.steps] if job.limits.steps is not None else []
        if job.limits.epochs is not None and per_epoch is not None:
            ends.append(job.limits.epochs * per_epoch)
        return max(min(ends), self._first_step) if ends else None

    def _start_event(self) -> RunStart:
        job = self._job
        return RunStart(
            epochs=job.limits.epochs,
            step=self._state.step,
            steps=self._steps_in_all(),
            steps_per_epoch=job.loader.batches_per_epoch,
            samples_per_epoch=job.loader.samples_per_epoch,
            parameters=sum(array.size for array in self._state.params.values()),
        )

    async def _show(self) -> None:
        """Let the outputs of a notebook keep up; the body of a task."""
        while True:
            await asyncio.sleep(REDRAWN)
            self._redraw()

    def _redraw(self) -> None:
        if self._outputs:
            self._outputs.update(self._repr_mimebundle_())

    def _ipython_display_(self) -> None:
        self._outputs.add(self._repr_mimebundle_())

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Mapping[str, str]:
        """Show itself in a notebook: how far it is, the losses as a curve, the last epochs as a table."""
        told = self._state.history
        epochs = [event for event in told if isinstance(event, EpochEnd)]
        evaluations = [event for event in told if isinstance(event, Evaluation)]
        progress = None if self._ended.is_set() else self.progress
        shown = html_of(repr(self)[1:-1], epochs[-SHOWN:], evaluations, self._losses.points, progress)
        return {"text/plain": repr(self), "text/html": shown}

    def __repr__(self) -> str:
        told = self._reason if self._ended.is_set() else "paused" if self._paused else "running"
        epochs = "" if self._job.limits.epochs is None else f" of {self._job.limits.epochs}"
        return f"<Run {told}, step {self._state.step}, epoch {self._state.cursor.epoch + 1}{epochs}>"


def _skipping(epoch: int, skipped: Skipped) -> SampleSkipped:
    return SampleSkipped(epoch + 1, skipped.position, skipped.source, skipped.reason)


def _is_epoch_over(state: TrainState) -> bool:
    """Return whether the epoch before the cursor's is done and its end not yet told."""
    return state.cursor.position == 0 and state.sums.samples > 0
