"""When a run saves its state, and who writes it, beside the training."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, perf_counter

from asynctrain.train.checkpoint import Checkpoint
from asynctrain.train.events import CheckpointSaved
from asynctrain.train.run_folder import RunFolder
from asynctrain.train.state import TrainState

SHARE = 0.02  # of a run's time, at most, that checkpoints after epochs and by the clock may cost


@dataclass(frozen=True, slots=True)
class Saving:
    """When a run with a ``run_dir`` saves its state; whatever this says, it does so at its end, errors included.

    What is saved after epochs and by the clock costs at most 2 % of the run's time, the first of an attempt aside, by
    which the cost is found: while one more would cost more than that, it waits for the first step after which it does
    not.

    Attributes:
        steps: after every so many steps, whatever that costs. The training goes on while the file is written, but for
            one step at most, so that a crash costs no more than ``steps`` + 1 of them.
        seconds: whenever so many have passed since the last one.
        epochs: whether after each epoch.
        keep: how many checkpoints stay, the latest ones, at least 1.
    """

    steps: int | None = None
    seconds: float | None = 60.0
    epochs: bool = True
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "seconds", "keep"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")


class Saver:
    """Writes checkpoints in a thread while the training goes on, one at a time.

    Args:
        saving: when.
        folder: where.
        state: at the beginning.
        describe: makes a checkpoint of a state.
        tasks: owns the writing.
        threads: where it is done.
        tell: publishes that a file is whole.
    """

    def __init__(
        self,
        saving: Saving,
        folder: RunFolder,
        state: TrainState,
        describe: Callable[[TrainState], Checkpoint],
        tasks: asyncio.TaskGroup,
        threads: ThreadPoolExecutor,
        tell: Callable[[CheckpointSaved], object],
    ) -> None:
        self._saving = saving
        self._folder = folder
        self._describe = describe
        self._tasks = tasks
        self._threads = threads
        self._tell = tell
        self._writing: asyncio.Task[None] | None = None
        self._error: Exception | None = None
        self._abandoned = threading.Event()
        self._saved: tuple[int, int] | None = None
        self._begun_epoch, self._begun_step = state.cursor.epoch, state.step
        self._started = self._last = monotonic()
        self._cost = self._spent = 0.0  # seconds of writing: the last one, and all

    def raise_error(self) -> None:
        """Raise why the last checkpoint could not be written, if it could not."""
        if self._error is not None:
            raise self._error

    def path_of(self, state: TrainState) -> Path:
        """Return where the checkpoint of ``state`` is, or would be."""
        return self._folder.checkpoint_path(state.step)

    def is_due(self, state: TrainState) -> bool:
        """Return whether ``state`` is to be saved now; not while another is being written."""
        if self._writing is not None and not self._writing.done():
            return False
        every = self._saving.steps
        if every is not None and state.step // every > self._begun_step // every:
            return True
        now = monotonic()
        by_epoch = self._saving.epochs and state.cursor.epoch > self._begun_epoch
        by_clock = self._saving.seconds is not None and now - self._last >= self._saving.seconds
        return (by_epoch or by_clock) and self._spent + self._cost <= SHARE * (now - self._started)

    async def keep_pace(self) -> None:
        """Wait for what is being written, where checkpoints are asked for by steps."""
        if self._saving.steps is not None and self._writing is not None:
            await asyncio.wait([self._writing])

    def begin(self, state: TrainState, waiting: Sequence[asyncio.Future[Path]] = ()) -> None:
        """Save ``state``, in arrays that nobody writes, after what is being written; tell those who wait."""
        self._begun_epoch, self._begun_step = state.cursor.epoch, state.step
        self._writing = self._tasks.create_task(self._save(state, waiting, self._writing), name="save-checkpoint")

    async def finish(self, state: TrainState) -> None:
        """Save the last state, unless it is saved; when cancelled, abandon the file, the earlier one stays."""
        try:
            await self._save(state, (), self._writing)
        except asyncio.CancelledError:
            self._abandoned.set()
            raise
        self.raise_error()

    async def _save(
        self, state: TrainState, waiting: Sequence[asyncio.Future[Path]], before: asyncio.Task[None] | None
    ) -> None:
        if before is not None:
            await asyncio.wait([before])
        try:
            path = await self._written(state)
        except Exception as error:  # the disk's, or of a state that JSON cannot hold; it is the run's
            self._error = error
            for future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        for future in waiting:
            if not future.done():
                future.set_result(path)

    async def _written(self, state: TrainState) -> Path:
        """Return the checkpoint of ``state``, written unless it is there."""
        start = perf_counter()
        path = self.path_of(state)
        moment = state.step, len(state.history)  # amid an evaluation there may be one of this step already
        if moment != self._saved:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._write, state)
            self._saved = moment
            self._cost = perf_counter() - start
            self._spent += self._cost
            self._last = monotonic()
            self._tell(CheckpointSaved(state.step, str(path), self._cost))
        return path

    def _write(self, state: TrainState) -> None:
        self._folder.save(self._describe(state), self._saving.keep, self._abandoned.is_set)
