"""A run under way: await it, iterate over its events, pause it, take its weights, stop it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from asynctrain._aio import ServingGroup
from asynctrain.errors import ClosedError
from asynctrain.inference.classifier import Classifier
from asynctrain.train.events import EpochEnd, Evaluation, Event
from asynctrain.train.history import SHOWN, History
from asynctrain.train.notebook import REDRAWN, Outputs, html_of
from asynctrain.train.progress import Heartbeat, Progress
from asynctrain.train.state import TrainState
from asynctrain.train.training import Job, Training


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
        self._training = Training(job, state, earlier, differences)
        self._latest: Classifier | None = None  # of the snapshots, which share what they compute in
        self._heartbeat = Heartbeat()
        self._outputs = Outputs()
        self.first_event = earlier[-1].number + 1 if earlier else 0

    def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Start the run's task, a cancellation of which may come before it has done anything."""
        self.task = tasks.create_task(self._main(), name="train")
        self.task.add_done_callback(lambda task: self._end())

    async def _main(self) -> None:
        async with ServingGroup() as serving:
            serving.create_task(self._heartbeat.beat(), name="heartbeat")
            serving.create_task(self._show(), name="show")
            await self._training.main()

    def _end(self) -> None:
        self._training.end()
        self._redraw()

    # What others see

    @property
    def state(self) -> TrainState:
        """The state after the last step, in read-only arrays that stay as they are."""
        return self._training.hand_out()

    @property
    def next_event(self) -> int:
        """The number that the next event will have."""
        return self._training.log.count

    @property
    def progress(self) -> Progress:
        """How far the run is."""
        training = self._training
        step, rate, steps = training.state.step, training.rate, self._job.steps_from(training.first_step)
        per_step = training.samples / max(1, step - training.first_step)
        metrics = {"accuracy": training.last.accuracy}
        if (last := training.last_evaluation) is not None:
            metrics |= {"validation.loss": last.result.loss, "validation.accuracy": last.result.accuracy}
        statistics = getattr(training.batches, "statistics", None)  # a loader of the user's own may have none
        return Progress(
            epoch=training.epoch + 1,
            step=step,
            steps=steps,
            loss=training.last.mean_loss,
            metrics=metrics,
            samples_per_second=rate,
            eta=None if steps is None or not rate else (steps - step) * per_step / rate,
            loop_lag=self._heartbeat.lag,
            paused=training.clock.is_held,
            bottleneck=None if statistics is None else statistics().bottleneck,
        )

    def snapshot(self) -> Classifier:
        """Return a classifier with the weights after the last step: never half-updated, not copied, good for ever."""
        state = self.state
        if self._latest is None:
            self._latest = self._job.classifier(state)
        else:
            self._latest = self._latest.with_weights(state.params, state.model_state)
        return self._latest

    def __aiter__(self) -> AsyncIterator[Event]:
        return self.events()

    async def events(self, number: int = 0) -> AsyncIterator[Event]:
        """Yield the events from ``number`` on, those of earlier attempts included; raise the run's error, if any, last.

        A listener that falls behind by more than 65,536 events gets ``Missed`` for those that are no longer kept.
        """
        async for event in self._training.log.follow(number):
            yield event
        self.raise_error()

    # What others ask

    async def pause(self) -> int:
        """Let the run wait after the step it is in; return how many steps are done, once it does, or has ended."""
        self._require_elsewhere()
        if not self._training.ended.is_set():
            await self._training.requests.ask_to_pause().wait()
        return self._training.state.step

    def resume(self) -> None:
        """Let a paused run go on."""
        self._training.requests.ask_to_resume()

    async def checkpoint(self) -> Path:
        """Save the state after the step the run is in, and return the file, once it is whole.

        Raises:
            ValueError: the run has no ``run_dir``.
            ClosedError: it has ended; its last state is saved already.
            OSError: the file cannot be written.
        """
        if self._job.folder is None:
            raise ValueError("run_dir must be given to a run that is to be checkpointed")
        if self._training.ended.is_set():
            raise ClosedError("the run has ended, and its last state is saved already")
        self._require_elsewhere()
        return await self._training.requests.ask_for_checkpoint()

    async def stop(self) -> History:
        """Let the run end, normally, after the step it is in, and return its history, as of one that was cancelled.

        Raises the run's error if it failed.
        """
        self._require_elsewhere()
        self._training.requests.ask_to_stop()
        await self._training.ended.wait()
        self.raise_error()
        return self.so_far()

    async def cancel(self) -> None:
        """Stop the computing at once, as cancelling the task that awaits ``fit`` does, and wait for the end."""
        self.task.cancel()
        await self._training.ended.wait()

    async def result(self) -> History:
        """Wait for the end and return the history; cancelling the wait leaves the run alone.

        Raises the run's error if it failed, ``CancelledError`` if it was cancelled.
        """
        self._require_elsewhere()
        await self._training.ended.wait()
        return self.history()

    def _require_elsewhere(self) -> None:
        if asyncio.current_task() in (self.task, self._training.listener):
            raise RuntimeError(
                "a callback cannot wait for the run, which waits for the callback; a controller can decide to stop, "
                "and a task of the program's own can ask for anything"
            )

    def history(self) -> History:
        """Return what was reached, once the run has ended; raises like ``result``, ``RuntimeError`` before the end."""
        if not self._training.ended.is_set():
            raise RuntimeError("a run has its history at its end; await run.result() waits for it")
        self.raise_error()
        if self._training.reason == "cancelled":
            raise asyncio.CancelledError
        return self.so_far()

    def so_far(self) -> History:
        """Return the history up to the last step: of a run under way, and of one that was cancelled or has failed."""
        training = self._training
        state, seconds = training.outcome(), training.clock.elapsed
        reason = training.reason if training.ended.is_set() else None
        return History(state, state.history, reason, state.samples, seconds, training.samples / max(1e-9, seconds))

    def raise_error(self) -> None:
        """Raise what the run failed of, if it did."""
        if self._training.error is not None:
            raise self._training.error

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
        training = self._training
        epochs = [event for event in training.state.history if isinstance(event, EpochEnd)]
        evaluations = [event for event in training.state.history if isinstance(event, Evaluation)]
        progress = None if training.ended.is_set() else self.progress
        shown = html_of(repr(self)[1:-1], epochs[-SHOWN:], evaluations, training.losses.points, progress)
        return {"text/plain": repr(self), "text/html": shown}

    def __repr__(self) -> str:
        training, state = self._training, self._training.state
        told = training.reason if training.ended.is_set() else "paused" if training.clock.is_held else "running"
        epochs = "" if self._job.limits.epochs is None else f" of {self._job.limits.epochs}"
        return f"<Run {told}, step {state.step}, epoch {state.cursor.epoch + 1}{epochs}>"
