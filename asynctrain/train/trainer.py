"""The trainer: a model, an optimizer and a home for gradients, put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, Unpack

from asynctrain._aio import ServingGroup, in_thread
from asynctrain._version import __version__
from asynctrain.executors.base import Executor, threads_of
from asynctrain.executors.fingerprint import numeric_fingerprint
from asynctrain.inference.classifier import Trained
from asynctrain.inference.evaluate import EvaluationResult, Metric, evaluate
from asynctrain.nn import losses
from asynctrain.nn.kernels.choice import require_kernels
from asynctrain.nn.losses import LossFunction
from asynctrain.nn.model import Model
from asynctrain.optim.apply import initial_state
from asynctrain.optim.transforms import Optimizer
from asynctrain.randomness import require_seed
from asynctrain.train.checkpoint import Checkpoint
from asynctrain.train.control import Limits, lasting_repr
from asynctrain.train.controllers import Controller
from asynctrain.train.events import Callback, Event
from asynctrain.train.history import History
from asynctrain.train.run import Run
from asynctrain.train.run_folder import RunFolder, open_run
from asynctrain.train.saving import Saving
from asynctrain.train.state import TrainState
from asynctrain.train.training import Job
from asynctrain.train.transfer import transfer
from asynctrain.types import JSON, BatchStream, Normalization, Program


class Options(TypedDict, total=False):
    """What ``fit``, ``start`` and ``resume`` can be asked for.

    Attributes:
        epochs: how many passes over the data there are in all, above 0.
        steps: how many steps in all, those before a resume included.
        samples: how many samples in all; the step that reaches it is the last.
        seconds: how long this attempt may take; the step in which they pass is the last.
        validate: a dataset, or a loader of its own, to be evaluated after each epoch.
        validate_every: evaluate after every so many steps instead.
        metrics: what evaluations tell besides loss and accuracy, see ``asynctrain.metrics``.
        callbacks: functions or coroutine functions of an event, called in their order before the training goes on; an
            error in one is the run's.
        controllers: what decides about the run, such as ``EarlyStopping`` and ``ReduceOnPlateau``.
        run_dir: a new folder for configuration, events, checkpoints and model.
        saving: when the state is saved to ``run_dir``; by default after each epoch and every minute.
        resume: a run folder or checkpoint file to go on from; the run stays in its folder unless ``run_dir`` is given.
            True: go on with the run in ``run_dir``, or begin it where there is none yet.
        bits: ``"same"`` refuses to resume where another machine's bits would come out, ``"close"`` does not.
        state: where to go on, for example ``trainer.state`` after a cancellation; by default the initial state.
        config: what else is to be written into the run's ``config.toml``.
    """

    epochs: int | None
    steps: int | None
    samples: int | None
    seconds: float | None
    validate: Any
    validate_every: int | None
    metrics: Sequence[Metric]
    callbacks: Sequence[Callback]
    controllers: Sequence[Controller]
    run_dir: str | PathLike[str] | None
    saving: Saving
    resume: str | PathLike[str] | bool | None
    bits: Literal["same", "close"]
    state: TrainState | None
    config: Mapping[str, Any]


class _Beginning(NamedTuple):
    """Where a run begins.

    state: what it goes on from. folder: its own, if it has one. is_new: whether the folder is to be made. earlier: what
    was told there before. differences: what is not as it was, though the run can go on.
    """

    state: TrainState
    folder: RunFolder | None
    is_new: bool = True
    earlier: Sequence[Event] = ()
    differences: Sequence[str] = ()


class Trainer:
    """Trains ``model`` on ``executor``.

    Args:
        model: the architecture.
        optimizer: a pair of pure functions, for example ``optim.adamw(3e-3)``.
        executor: where gradients are computed; it stays the caller's to close.
        microbatch: the largest number of samples in one piece of work, at least 1; by default half of the batch, but at
            least 32 and at most 64 (see ``types.cut``). It belongs to the optimisation (it decides the order of
            additions), the number of workers does not; with more than two workers on small batches ask for less.
        seed: of the initial parameters and of dropout, 0 to 2**64 - 1.
        loss: a loss of ``nn.losses``, or its name: ``nn.losses.softmax_cross_entropy(label_smoothing=0.1)``.
        normalization: how pixels become numbers.
        dtype: of parameters and arithmetic, ``float32`` or ``float64``.
        kernels: what computes: ``"numpy"``, or ``"numba"`` (extra ``numba``), which is faster. Each gives the same bits
            wherever it runs, but not those of the other.
    """

    def __init__(
        self,
        model: Model,
        *,
        optimizer: Optimizer,
        executor: Executor,
        microbatch: int | None = None,
        seed: int = 0,
        loss: str | LossFunction = "softmax_cross_entropy",
        normalization: Normalization | None = None,
        dtype: str = "float32",
        kernels: str = "numpy",
    ) -> None:
        if microbatch is not None and microbatch < 1:
            raise ValueError(f"microbatch must be at least 1, got {microbatch}")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
        require_kernels(kernels)
        self._model = model
        self._optimizer = optimizer
        self._executor = executor
        self._microbatch = microbatch
        described = loss if isinstance(loss, str) else loss.to_json()
        losses.from_json(described)
        require_seed(seed)
        self._program = Program(model.to_json(), described, normalization or Normalization(), dtype, seed, kernels)
        self._run: Run | None = None
        self._running = False

    @property
    def state(self) -> TrainState:
        """The last state of the last run, or else the initial one, in read-only arrays of the caller's own."""
        return self._run.state if self._run else self.initial_state()

    @property
    def history(self) -> History | None:
        """What the last run has come to so far, also if it was cancelled or has failed; None before the first.

        So a cell of a notebook that is interrupted loses nothing: ``trainer.history`` has its epochs, and its ``state``
        the weights.
        """
        return self._run.so_far() if self._run else None

    def initial_state(self, weights: Trained | None = None, only: str | Sequence[str] = "*") -> TrainState:
        """Return the state before the first step.

            >>> state = trainer.initial_state(at.Classifier.load("birds.safetensors"), only=["conv*", "norm*"])

        Args:
            weights: a classifier or a state whose parameters and running statistics this one begins with.
            only: a pattern, or several, for the names of those that are taken (``*`` any characters, ``?`` one); the
                others are drawn anew, as the seed has it.

        Raises:
            ValueError: a pattern fits nothing here, or what it fits is not there in ``weights``, or of another shape.
        """
        params, model_state = self._model.init(self._program.seed, self._program.dtype), self._model.init_state()
        if weights is not None:
            transfer(weights, [only] if isinstance(only, str) else only, params, model_state)
        return TrainState(self._program, params, initial_state(self._optimizer, params), model_state)

    async def fit(self, loader: BatchStream, **options: Unpack[Options]) -> History:
        """Train to the end and return the history; the arguments are those of ``start``.

        Cancelling it stops the computing and leaves the last state on ``trainer.state`` (and, with ``run_dir``, in a
        checkpoint); ``asyncio.timeout`` around it works.
        """
        async with self.start(loader, **options) as run:
            await run.task  # directly, so that a cancellation reaches the kernels in the same call
            return run.history()

    async def resume(self, path: str | PathLike[str], loader: BatchStream, **options: Unpack[Options]) -> History:
        """Go on from a checkpoint, in mid-epoch too, to the end: ``fit`` with ``resume=path``.

        With the same loader and options the run ends with the bits of one that was never stopped.
        """
        options["resume"] = path
        return await self.fit(loader, **options)

    @asynccontextmanager
    async def start(self, loader: BatchStream, **options: Unpack[Options]) -> AsyncIterator[Run]:
        """Start a run: ``async with trainer.start(loader, epochs=10) as run: async for event in run: ...``.

        Leaving the block before the run's end cancels it. A failure is raised where the run is listened to or awaited,
        or else when the block is left.

        Args:
            loader: the batches to train on.
            options: see ``Options``; at least one of ``epochs``, ``steps``, ``samples`` and ``seconds``.

        Raises:
            ValueError: an argument is out of range, or model and loader do not fit.
            FileExistsError: ``run_dir`` holds a run already, and it is not the one to resume.
            FileNotFoundError: there is nothing at ``resume``.
            CheckpointError: what is at ``resume`` cannot be used here; the message says what differs. Or another run,
                maybe of another process, is under way in the folder.
            FingerprintError: this machine would give other bits, and ``bits`` is not ``"close"``.
            TypeError: there is no option of that name.
            RuntimeError: this trainer has a run under way.
        """
        if self._running:
            raise RuntimeError("this trainer has a run under way; start another with a Trainer of its own")
        self._require_fit(loader)
        _require_known(options)
        job, beginning = await self._begin(loader, options)
        held = nullcontext() if beginning.folder is None else beginning.folder.hold()  # takes microseconds
        run = self._run = Run(job, beginning.state, beginning.earlier, beginning.differences)
        self._running = True
        try:
            with held:
                async with ServingGroup() as group:
                    run.begin(group)
                    yield run
        finally:
            self._running = False
        run.raise_error()

    async def _begin(self, loader: BatchStream, options: Options) -> tuple[Job, _Beginning]:
        """Return what is to be done, and from where; make the run's folder, if it is to have a new one."""
        job = self._job(loader, options)
        state, resume = options.get("state") or self.initial_state(), options.get("resume")
        if resume is True:
            resume = await in_thread(_run_there, job.folder)
        if resume is None or resume is False:
            beginning = _Beginning(state, job.folder)
        else:
            beginning = await in_thread(self._found, Path(resume), job, options)
            job = replace(job, folder=beginning.folder)
        if beginning.folder is not None and beginning.is_new:
            await in_thread(self._create, beginning.folder, job, options)
        return job, beginning

    def _create(self, folder: RunFolder, job: Job, options: Options) -> None:
        folder.create(self._config(job, options))

    def _job(self, loader: BatchStream, options: Options) -> Job:
        run_dir, validate_every = options.get("run_dir"), options.get("validate_every")
        validation = self._validation_stream(loader, options.get("validate"))
        metrics = tuple(options.get("metrics", ()))
        controllers = _checked(options.get("controllers", ()), options.get("validate") is not None)
        beside = partial(_beside, validation, validate_every, metrics, controllers)
        return Job(
            model=self._model,
            optimizer=self._optimizer,
            executor=self._executor,
            microbatch=self._microbatch,
            loader=loader,
            limits=Limits(options.get("epochs"), options.get("steps"), options.get("samples"), options.get("seconds")),
            validation=validation,
            validate_every=validate_every,
            metrics=metrics,
            callbacks=tuple(options.get("callbacks", ())),
            controllers=controllers,
            saving=options.get("saving", Saving()),
            folder=None if run_dir is None else RunFolder(Path(run_dir)),
            describe=partial(self._described, loader, beside),
        )

    def _found(self, path: Path, job: Job, options: Options) -> _Beginning:
        """Return what is at ``path``, checked against this trainer, to go on in the job's folder. Blocks."""
        folder, file, saved = open_run(path)
        wanted = job.folder or folder
        goes_on = folder is not None and wanted is not None and wanted.path.resolve() == folder.path.resolve()
        state, differences = self.initial_state(), tuple[str, ...]()
        if saved is not None and file is not None:
            here = job.describe(state)
            saved.require(file, here, options.get("bits", "same"))
            state, differences = saved.state, saved.differences(here)
        elif folder is not None:  # it ended before its first checkpoint, so it begins anew
            folder.require(self._config(job, options))
        if folder is None or not goes_on:
            return _Beginning(state, wanted, differences=differences)
        return _Beginning(state, folder, is_new=False, earlier=folder.events.read(), differences=differences)

    def _described(self, loader: BatchStream, beside: Callable[[], JSON], state: TrainState) -> Checkpoint:
        """Return ``state`` as a checkpoint; called in threads, as what a loader says of itself may take a while."""
        decoding = getattr(loader, "fingerprint", {})  # a loader of the user's own may have none
        fingerprint = numeric_fingerprint(self._program.kernels) | decoding
        return Checkpoint(
            state, self._optimizer_json(), self._microbatch, loader.description, fingerprint, __version__, beside()
        )

    def _optimizer_json(self) -> JSON:
        try:
            return self._optimizer.to_json()
        except TypeError:  # a function of the user's own, which can only be told
            return {"repr": lasting_repr(self._optimizer)}

    async def evaluate(
        self, data: BatchStream, state: TrainState | None = None, *, metrics: Sequence[Metric] = ()
    ) -> EvaluationResult:
        """Return loss, accuracy and ``metrics`` of ``state`` (by default ``trainer.state``) over an epoch of ``data``.

        ``data`` is a loader.
        """
        self._require_fit(data)
        state = state or self.state
        async with self._executor.open(state.program) as session:
            await session.broadcast(state.params, state.model_state, state.step)
            threads = threads_of(self._executor)
            return await evaluate(session, state.step, data, self._microbatch, metrics, threads=threads)

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

    def _config(self, job: Job, options: Options) -> dict[str, Any]:
        """Return what the run was asked to do, as plain values."""
        return dict(options.get("config", {})) | {
            "run": {
                "asynctrain": __version__,
                **asdict(job.limits),
                "microbatch": self._microbatch,
                "validate_every": job.validate_every,
                "saving": asdict(job.saving),
                "controllers": [repr(controller) for controller in job.controllers],
                "executor": repr(self._executor),
            },
            "optimizer": self._optimizer_json(),
            "data": job.loader.description,
            "program": self._program.to_json(),
            "fingerprint": numeric_fingerprint(self._program.kernels) | getattr(job.loader, "fingerprint", {}),
        }

    def __repr__(self) -> str:
        return f"<Trainer of {self._model!r} on {self._executor!r}>"


def _run_there(folder: RunFolder | None) -> Path | None:
    """Return the folder if a run was begun in it. Blocks."""
    if folder is None:
        raise ValueError("run_dir must be given where resume is True")
    return folder.path if folder.holds_run() else None


def _require_known(options: Options) -> None:
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(f"options must be among {', '.join(Options.__annotations__)}; got {', '.join(sorted(unknown))}")


def _beside(
    validation: BatchStream | None, every: int | None, metrics: Sequence[Metric], controllers: Sequence[Controller]
) -> JSON:
    """Return what a run may go on with another of, as far as it can be told."""
    return {
        "validate": None if validation is None else validation.description,
        "validate_every": every,
        "metrics": [lasting_repr(metric) for metric in metrics],
        "controllers": {controller.name: lasting_repr(controller) for controller in controllers},
    }


def _checked(controllers: Sequence[Controller], validates: bool) -> tuple[Controller, ...]:
    names = [controller.name for controller in controllers]
    if len(set(names)) < len(names):
        raise ValueError(f"controllers must have names of their own, got {', '.join(names)}")
    for controller in controllers:
        monitor = getattr(controller, "monitor", "")
        if monitor.startswith("validation.") and not validates:
            raise ValueError(f"validate must be given to a run whose {controller.name} monitors {monitor}")
    return tuple(controllers)
