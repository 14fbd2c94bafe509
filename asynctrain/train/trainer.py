"""The trainer: a model, an optimizer and a home for gradients, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from asynctrain._aio import ServingGroup, in_thread
from asynctrain._version import __version__
from asynctrain.executors.base import Executor
from asynctrain.executors.fingerprint import numeric_fingerprint
from asynctrain.inference.evaluate import Evaluation, evaluate
from asynctrain.nn import losses
from asynctrain.nn.model import Model
from asynctrain.optim.apply import initial_state
from asynctrain.optim.transforms import Optimizer
from asynctrain.randomness import require_seed
from asynctrain.train.history import History
from asynctrain.train.run import Job, Run
from asynctrain.train.run_folder import RunFolder
from asynctrain.train.state import TrainState
from asynctrain.types import BatchStream, Normalization, Program


class Trainer:
    """Trains ``model`` on ``executor``.

    Args:
        model: the architecture.
        optimizer: a pair of pure functions, for example ``optim.adamw(3e-3)``.
        executor: where gradients are computed; it stays the caller's to close.
        microbatch: the largest number of samples in one piece of work, at least 1. It belongs to the optimisation (it
            decides the order of additions), the number of workers does not.
        seed: of the initial parameters and of dropout, 0 to 2**64 - 1.
        loss: the name of a function in ``nn.losses``.
        normalization: how pixels become numbers.
        dtype: of parameters and arithmetic, ``float32`` or ``float64``.
    """

    def __init__(
        self,
        model: Model,
        *,
        optimizer: Optimizer,
        executor: Executor,
        microbatch: int = 32,
        seed: int = 0,
        loss: str = "softmax_cross_entropy",
        normalization: Normalization | None = None,
        dtype: str = "float32",
    ) -> None:
        if microbatch < 1:
            raise ValueError(f"microbatch must be at least 1, got {microbatch}")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
        self._model = model
        self._optimizer = optimizer
        self._executor = executor
        self._microbatch = microbatch
        losses.get(loss)
        require_seed(seed)
        self._program = Program(model.to_json(), loss, normalization or Normalization(), dtype, seed)
        self._run: Run | None = None
        self._running = False

    @property
    def state(self) -> TrainState:
        """The last state of the last run, or else the initial one, in read-only arrays of the caller's own."""
        return self._run.state if self._run else self.initial_state()

    def initial_state(self) -> TrainState:
        """Return the state before the first step."""
        params = self._model.init(self._program.seed, self._program.dtype)
        return TrainState(self._program, params, initial_state(self._optimizer, params), self._model.init_state())

    async def fit(
        self,
        loader: BatchStream,
        *,
        epochs: int,
        validate: Any = None,
        run_dir: str | PathLike[str] | None = None,
        state: TrainState | None = None,
    ) -> History:
        """Train to the end and return the history; the arguments are those of ``start``.

        Cancelling it stops the computing and leaves the last state on ``trainer.state`` (and, with ``run_dir``, in a
        file); ``asyncio.timeout`` around it works.
        """
        async with self.start(loader, epochs=epochs, validate=validate, run_dir=run_dir, state=state) as run:
            await run.task  # directly, so that a cancellation reaches the kernels in the same call
            return run.history()

    @asynccontextmanager
    async def start(
        self,
        loader: BatchStream,
        *,
        epochs: int,
        validate: Any = None,
        run_dir: str | PathLike[str] | None = None,
        state: TrainState | None = None,
    ) -> AsyncIterator[Run]:
        """Start a run: ``async with trainer.start(loader, epochs=10) as run: async for event in run: ...``.

        Leaving the block before the run's end cancels it. A failure is raised where the run is listened to or awaited,
        or else when the block is left.

        Args:
            loader: the batches to train on.
            epochs: how many there are in all, at least 1.
            validate: a dataset, or a loader of its own, to be evaluated after each epoch.
            run_dir: a new folder for configuration, history and model.
            state: where to go on, for example ``trainer.state`` after a cancellation; by default the initial state.

        Raises:
            ValueError: an argument is out of range, or model and loader do not fit.
            FileExistsError: ``run_dir`` holds a run already.
            RuntimeError: this trainer has a run under way.
        """
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        self._require_fit(loader)
        if self._running:
            raise RuntimeError("this trainer has a run under way; start another with a Trainer of its own")
        job = Job(
            model=self._model,
            optimizer=self._optimizer,
            executor=self._executor,
            microbatch=self._microbatch,
            loader=loader,
            epochs=epochs,
            validation=self._validation_stream(loader, validate),
            folder=RunFolder(Path(run_dir)) if run_dir is not None else None,
        )
        if job.folder:
            await job.folder.create(await in_thread(self._config, job))
        run = self._run = Run(job, state or self.initial_state())
        self._running = True
        try:
            async with ServingGroup() as group:
                run.task = group.create_task(run.main(), name="train")
                yield run
        finally:
            self._running = False
        run.raise_error()

    async def evaluate(self, data: BatchStream, state: TrainState | None = None) -> Evaluation:
        """Return loss and accuracy of ``state`` (by default ``trainer.state``) over one epoch of ``data``, a loader."""
        self._require_fit(data)
        state = state or self.state
        async with self._executor.open(state.program) as session:
            await session.broadcast(state.params, state.model_state, state.step)
            return await evaluate(session, state.step, data, self._microbatch)

    def _validation_stream(self, loader: BatchStream, validate: Any) -> BatchStream | None:
        if validate is None:
            return None
        stream: BatchStream = validate if hasattr(validate, "open") else loader.evaluating(validate)
        self._require_fit(stream)
        return stream

    def _require_fit(self, loader: BatchStream) -> None:
        if loader.image_shape != self._model.input_shape:
            raise ValueError(
                f"the model takes images of shape {self._model.input_shape}, the loader delivers {loader.image_shape}; "
                "give Loader the model's image_size and channels"
            )
        outputs = self._model.output_shape
        if len(outputs) != 1 or outputs[0] < len(loader.classes):
            raise ValueError(
                f"the model has outputs of shape {outputs} for the {len(loader.classes)} classes of the data"
            )

    def _config(self, job: Job) -> dict[str, Any]:
        return {
            "asynctrain": __version__,
            "program": self._program.to_json(),
            "optimizer": repr(self._optimizer),
            "executor": repr(self._executor),
            "microbatch": self._microbatch,
            "epochs": job.epochs,
            "image_shape": job.loader.image_shape,
            "classes": job.loader.classes,
            "samples_per_epoch": job.loader.samples_per_epoch,
            "batches_per_epoch": job.loader.batches_per_epoch,
            "fingerprint": numeric_fingerprint(),
        }

    def __repr__(self) -> str:
        return f"<Trainer of {self._model!r} on {self._executor!r}>"
