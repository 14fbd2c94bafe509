"""Training steps and predictions of every side, one a process: ``python -m benchmarks.steps JOB``, the job as JSON.

Runs in asynctrain's environment and in the peers', so what only one of them has is imported where it is used. All sides
take the same uint8 batches, each in the order of axes that it likes best, and normalise them inside what is timed as
``(pixel / 255 - 0.5) / 0.25``; all train in float32 by SGD with momentum, from the same network described in JSON.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 10
BATCHES = 4  # that are drawn beforehand and taken in turn
LEARNING_RATE, MOMENTUM = 0.01, 0.9
MEAN, STD = 0.5, 0.25

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Job:
    """What one process is to measure.

    Attributes:
        side: a key of ``SIDES``.
        model: whose ``<model>.json``, ``<model>.npz`` and, for ONNX Runtime, ``<model>.onnx`` are in ``folder``.
        folder: see ``model``.
        task: ``"train"`` or ``"predict"``.
        batches: the batch sizes to measure, one after the other; one where it is to train.
        steps: how many steps or calls of each are timed.
        warm_up: how many come before.
        threads: workers of asynctrain, threads of a peer.
        microbatch: the largest number of samples in one piece of asynctrain's work; None: the Trainer's default.
        split: of asynctrain's ThreadExecutor.
        kernels: of asynctrain, ``"numpy"`` or ``"numba"``.
    """

    side: str
    model: str
    folder: str = ""
    task: str = "train"
    batches: tuple[int, ...] = (128,)
    steps: int = 10
    warm_up: int = 3
    threads: int = 2
    microbatch: int | None = None
    split: str = "auto"
    kernels: str = "numpy"

    def to_json(self) -> str:
        """Return the job as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Return the job that ``to_json`` described."""
        value = json.loads(text)
        return cls(**{**value, "batches": tuple(value["batches"])})

    @property
    def architecture(self) -> Mapping[str, Any]:
        """What ``Model.to_json`` gave."""
        described: Mapping[str, Any] = json.loads((Path(self.folder) / f"{self.model}.json").read_text())
        return described

    def weights(self, part: str) -> dict[str, np.ndarray]:
        """Return the arrays of one part (``params``, ``state``, ``check``) of the model's .npz, in their order."""
        with np.load(Path(self.folder) / f"{self.model}.npz") as arrays:
            return {name.removeprefix(f"{part}:"): arrays[name] for name in arrays.files if name.startswith(f"{part}:")}

    def data(self, batch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return ``BATCHES`` of images (batch, H, W, C) uint8 and labels (batch,) int64."""
        rng = np.random.default_rng(0)
        shape = (batch, *self.architecture["input_shape"])
        return [(rng.integers(0, 256, shape, np.uint8), rng.integers(0, CLASSES, batch)) for _ in range(BATCHES)]


def timed(job: Job, step: Callable[[int], object]) -> float:
    """Call ``step`` with 0, 1, ... and return the median of the timed calls in seconds."""
    seconds = []
    for number in range(job.warm_up + job.steps):
        start = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[job.warm_up :])


def of_each_batch(job: Job, step: Callable[[int], Callable[[int], object]]) -> Result:
    """Return the seconds of ``step(batch)`` for each of the job's batch sizes."""
    return {"seconds": {str(batch): timed(job, step(batch)) for batch in job.batches}}


# asynctrain


def run_in_loop(main: Any) -> Result:
    """Run a coroutine on uvloop, as the command line does."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        result: Result = runner.run(main)
        return result


class Prepared:
    """Batches in memory, as a stream that a Trainer takes; the first is taken again after the last."""

    def __init__(self, job: Job) -> None:
        self._data = job.data(job.batches[0])
        self.image_shape = self._data[0][0].shape[1:]
        self.classes = tuple(map(str, range(CLASSES)))
        self.batches_per_epoch = job.warm_up + job.steps
        self.samples_per_epoch = job.batches[0] * self.batches_per_epoch
        self.skipped = ()

    @asynccontextmanager
    async def open(
        self, cursor: Any = None, *, epochs: int | None = None, threads: object = None
    ) -> AsyncIterator[Any]:
        self._batches = self._cut()
        yield self

    def __aiter__(self) -> Prepared:
        return self

    async def __anext__(self) -> Any:
        try:
            return next(self._batches)
        except StopIteration:
            raise StopAsyncIteration from None

    def _cut(self) -> Iterator[Any]:
        from asynctrain import Batch, Cursor

        for number in range(1, self.batches_per_epoch + 1):
            images, labels = self._data[(number - 1) % BATCHES]
            last = number == self.batches_per_epoch
            samples = number * len(images)
            cursor = Cursor(epoch=1) if last else Cursor(0, samples, samples, number)
            yield Batch(images, labels, (), cursor, last)


def trainer_of(job: Job, executor: Any) -> Any:
    """Return a Trainer at its defaults, but for what the job names."""
    import asynctrain as at

    options: dict[str, Any] = {} if job.kernels == "numpy" else {"kernels": job.kernels}
    if job.microbatch is not None:
        options["microbatch"] = job.microbatch
    optimizer = at.optim.sgd(LEARNING_RATE, momentum=MOMENTUM)
    return at.Trainer(at.Model.from_json(job.architecture), optimizer=optimizer, executor=executor, **options)


def largest_piece(batch: int, microbatch: int | None) -> int:
    """Return how many samples the largest part has that asynctrain cuts a batch into."""
    from asynctrain.types import cut

    return int(max(piece.stop - piece.start for piece in cut(batch, microbatch)))


def train_asynctrain(job: Job) -> Result:
    """Be a Trainer on a ThreadExecutor: what lies between the StepEnd events that a listener gets."""
    return run_in_loop(_train_asynctrain(job))


async def _train_asynctrain(job: Job) -> Result:
    import asynctrain as at

    async with at.ThreadExecutor(job.threads, split=job.split) as executor:  # type: ignore[arg-type]  # it checks
        trainer = trainer_of(job, executor)
        async with trainer.start(Prepared(job), epochs=1) as run:
            ends = [time.perf_counter() async for event in run if isinstance(event, at.events.StepEnd)]
        seconds = statistics.median(np.diff(ends[job.warm_up - 1 :]).tolist())
        return {"seconds": {str(job.batches[0]): seconds}, "digest": trainer.state.digest()}


def train_bare_threads(job: Job) -> Result:
    """Be the same work without a loop: a ThreadPoolExecutor computes the microbatches, this thread adds and updates."""
    from asynctrain import InlineExecutor, Model
    from asynctrain.executors.blas import find_blas, one_blas_thread
    from asynctrain.executors.worker import GradientWorker, StopFlag
    from asynctrain.optim import sgd
    from asynctrain.optim.apply import update_into
    from asynctrain.types import GradientWork, cut

    state = trainer_of(job, InlineExecutor()).initial_state()
    if Model.from_json(job.architecture).state:
        raise ValueError(f"{job.model} keeps running statistics, which the bare threads do not fold")
    optimizer, worker = sgd(LEARNING_RATE, momentum=MOMENTUM), GradientWorker(state.program)
    current, spare = state.writable_copy(), state.writable_copy()
    total = current.params.layout.empty()
    data, pieces = job.data(job.batches[0]), cut(job.batches[0], job.microbatch)

    def step(number: int) -> None:
        nonlocal current, spare
        images, labels = data[number % BATCHES]
        works = [GradientWork(number, i, len(pieces), images[at], labels[at]) for i, at in enumerate(pieces)]
        futures = [pool.submit(worker.gradients, current.params, work, StopFlag()) for work in works]
        weight = 0.0
        for index, future in enumerate(futures):
            result = future.result()
            if index == 0:
                np.copyto(total.vector, result.gradients.vector)
            else:
                np.add(total.vector, result.gradients.vector, out=total.vector)
            weight += result.sums.weight
            result.release()
        np.multiply(total.vector, 1.0 / weight, out=total.vector)
        before, after = (current.params, current.optimizer_state), (spare.params, spare.optimizer_state)
        update_into(optimizer, tuple(total), before[0], total, before[1], number, *after)
        current, spare = spare, current

    with one_blas_thread(find_blas()), ThreadPoolExecutor(job.threads) as pool:
        result = of_each_batch(job, lambda batch: step)
    return {**result, "digest": current.digest()}


def predict_on_threads(job: Job) -> Result:
    """Be a session on a ThreadExecutor; what is larger than a microbatch is cut into such, computed side by side."""
    import asynctrain as at

    return run_in_loop(_predict(job, at.ThreadExecutor(job.threads), job.microbatch))


def predict_inline(job: Job) -> Result:
    """Be a session on the InlineExecutor, which blocks its loop as every peer blocks its caller."""
    import asynctrain as at

    return run_in_loop(_predict(job, at.InlineExecutor(), max(job.batches)))


async def _predict(job: Job, executor: Any, microbatch: int | None) -> Result:
    from asynctrain.types import ForwardWork, cut

    async with executor:
        trainer = trainer_of(job, executor)
        state = trainer.initial_state()
        async with executor.open(state.program) as session:
            await session.broadcast(state.params, state.model_state, 0)
            result: Result = {"seconds": {}}
            for batch in job.batches:
                data, seconds = job.data(batch), []
                for number in range(job.warm_up + job.steps):
                    start = time.perf_counter()
                    images = data[number % BATCHES][0]
                    works = [ForwardWork(images[piece]) for piece in cut(batch, microbatch)]
                    if len(works) == 1:
                        await session.compute(works[0], 0)
                    else:
                        await asyncio.gather(*(session.compute(work, 0) for work in works))
                    seconds.append(time.perf_counter() - start)
                result["seconds"][str(batch)] = statistics.median(seconds[job.warm_up :])
    return result


# PyTorch


class Torch:
    """A network in PyTorch as one of the variants: eager NCHW, eager channels last, or compiled (channels last)."""

    def __init__(self, job: Job) -> None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(job.folder) / "inductor"))
        import torch

        from benchmarks import networks

        torch.set_num_threads(job.threads)
        self._job, self._torch = job, torch
        self._compiled = "compiled" in job.side
        self._last = job.side != "PyTorch" and '"conv2d"' in json.dumps(job.architecture)
        self._layout = {"memory_format": torch.channels_last} if self._last else {}
        self.model = networks.load(networks.twin(job.architecture), job.weights("params"), job.weights("state"))
        self.model.to(**self._layout)

    def data(self, batch: int) -> list[tuple[Any, Any]]:
        """Return the batches as uint8 tensors that lie as this variant likes it."""
        return [(self.images(images), self._torch.from_numpy(labels)) for images, labels in self._job.data(batch)]

    def images(self, images: np.ndarray) -> Any:
        """(N, H, W, C) -> (N, C, H, W), in memory as this variant likes it."""
        return self._torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(**self._layout)

    def forward(self, images: Any) -> Any:
        """Return the logits of uint8 images."""
        return self.model(images.float().mul_(1 / (255 * STD)).sub_(MEAN / STD))

    def loss(self, images: Any, labels: Any) -> Any:
        """Return the mean loss of uint8 images."""
        return self._torch.nn.functional.cross_entropy(self.forward(images), labels)

    def made(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``function``, compiled where this variant is."""
        return self._torch.compile(function, dynamic=False) if self._compiled else function


def train_torch(job: Job) -> Result:
    """Be PyTorch's usual loop, with its fused SGD, the fastest of its three."""
    import torch

    side = Torch(job)
    loss = side.made(side.loss)
    optimizer = torch.optim.SGD(side.model.parameters(), LEARNING_RATE, MOMENTUM, fused=True)
    data = side.data(job.batches[0])

    def step(number: int) -> float:
        optimizer.zero_grad()
        value = loss(*data[number % BATCHES])
        value.backward()
        optimizer.step()
        return float(value.item())

    return of_each_batch(job, lambda batch: step)


def predict_torch(job: Job) -> Result:
    """Be PyTorch in its inference mode."""
    import torch

    side = Torch(job)
    side.model.eval()

    def of(batch: int) -> Callable[[int], object]:
        forward, data = side.made(side.forward), side.data(batch)
        return lambda number: forward(data[number % BATCHES][0])

    with torch.inference_mode():
        return of_each_batch(job, of)


def prepare_twin(job: Job) -> Result:
    """Return how far PyTorch's outputs are from asynctrain's and how many parameters it has; write the ONNX file."""
    import torch

    from benchmarks import networks

    side = Torch(job)
    side.model.eval()
    check = job.weights("check")

    class Whole(torch.nn.Module):  # type: ignore[misc]  # torch is not there to check
        def __init__(self) -> None:
            super().__init__()
            self.model = side.model

        def forward(self, images: Any) -> Any:
            return side.forward(images)

    with torch.inference_mode():
        ours, theirs = check["outputs"], side.forward(side.images(check["images"])).numpy()
    difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
    result = {"difference": difference, "parameters": networks.count_parameters(side.model)}
    if not missing("ONNX Runtime"):
        _export(Whole().eval(), side.images(check["images"]), Path(job.folder) / f"{job.model}.onnx")
    return result


def _export(model: Any, images: Any, path: Path) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is a newer exporter, which needs a package more
        torch.onnx.export(
            model,
            (images,),
            str(path),
            dynamo=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "n"}, "logits": {0: "n"}},
        )


# Others


def train_jax(job: Job) -> Result:
    """Be JAX: the whole step compiled, its state donated. XLA takes all CPUs."""
    import jax  # type: ignore[import-not-found]
    import jax.numpy as jnp  # type: ignore[import-not-found]

    params = [jnp.asarray(array) for array in _dense_weights(job)]
    traces = [jnp.zeros_like(p) for p in params]

    def loss(params: list[Any], images: Any, labels: Any) -> Any:
        x = images.reshape(len(images), -1).astype(jnp.float32) * (1 / (255 * STD)) - MEAN / STD
        for weight, bias in zip(params[:-2:2], params[1:-2:2], strict=True):
            x = jax.nn.relu(x @ weight + bias)
        logarithms = jax.nn.log_softmax(x @ params[-2] + params[-1])
        return -jnp.take_along_axis(logarithms, labels[:, None], axis=1).mean()

    def update(params: list[Any], traces: list[Any], images: Any, labels: Any) -> tuple[list[Any], list[Any], Any]:
        value, gradients = jax.value_and_grad(loss)(params, images, labels)
        traces = [g + MOMENTUM * m for g, m in zip(gradients, traces, strict=True)]
        return [p - LEARNING_RATE * m for p, m in zip(params, traces, strict=True)], traces, value

    compiled = jax.jit(update, donate_argnums=(0, 1))
    data = [(jnp.asarray(images), jnp.asarray(labels)) for images, labels in job.data(job.batches[0])]

    def step(number: int) -> float:
        nonlocal params, traces
        params, traces, value = compiled(params, traces, *data[number % BATCHES])
        jax.block_until_ready(params)
        return float(value)

    return of_each_batch(job, lambda batch: step)


def train_sklearn(job: Job) -> Result:
    """Be scikit-learn's MLPClassifier, a batch at a time."""
    from sklearn.neural_network import MLPClassifier

    hidden = tuple(len(bias) for bias in _dense_weights(job)[1:-2:2])
    model = MLPClassifier(
        hidden,
        solver="sgd",
        alpha=0.0,
        batch_size=job.batches[0],
        learning_rate_init=LEARNING_RATE,
        momentum=MOMENTUM,
        nesterovs_momentum=False,
    )
    data, classes = job.data(job.batches[0]), np.arange(CLASSES)

    def step(number: int) -> None:
        images, labels = data[number % BATCHES]
        x = images.reshape(len(images), -1).astype(np.float32)
        x *= np.float32(1 / (255 * STD))
        x -= np.float32(MEAN / STD)
        model.partial_fit(x, labels, classes=classes)

    result = of_each_batch(job, lambda batch: step)
    if sum(array.size for array in (*model.coefs_, *model.intercepts_)) != sum(a.size for a in _dense_weights(job)):
        raise ValueError("scikit-learn's network has another number of parameters")
    return result


def _dense_weights(job: Job) -> list[np.ndarray]:
    """Return weight, bias, weight, bias, ... of a network of dense layers with ReLUs between them."""
    kinds = [layer["layer"] for layer in job.architecture["layers"]]
    hidden = len(kinds) // 2 - 1
    if kinds != ["flatten", *["dense", "relu"] * hidden, "dense"]:
        raise ValueError(f"{job.model} is no multilayer perceptron with ReLUs: {', '.join(kinds)}")
    return list(job.weights("params").values())


def predict_onnxruntime(job: Job) -> Result:
    """Be ONNX Runtime with the network that PyTorch exported."""
    import onnxruntime  # type: ignore[import-not-found]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    path = str(Path(job.folder) / f"{job.model}.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def of(batch: int) -> Callable[[int], object]:
        data = [np.ascontiguousarray(images.transpose(0, 3, 1, 2)) for images, _ in job.data(batch)]
        return lambda number: session.run(None, {"images": data[number % BATCHES]})

    return of_each_batch(job, of)


SIDES: dict[str, dict[str, Callable[[Job], Result]]] = {
    "asynctrain": {"train": train_asynctrain, "predict": predict_on_threads},
    "asynctrain inline": {"predict": predict_inline},
    "bare threads": {"train": train_bare_threads},
    "PyTorch": {"train": train_torch, "predict": predict_torch, "prepare": prepare_twin},
    "PyTorch channels last": {"train": train_torch, "predict": predict_torch},
    "PyTorch compiled": {"train": train_torch, "predict": predict_torch},
    "JAX": {"train": train_jax},
    "scikit-learn": {"train": train_sklearn},
    "ONNX Runtime": {"predict": predict_onnxruntime},
}
OURS = ("asynctrain", "asynctrain inline", "bare threads")  # the sides that run in asynctrain's own environment
PEERS = tuple(side for side in SIDES if side not in OURS)
PACKAGES = (
    *("asynctrain", "numpy", "uvloop", "numba", "torch", "jax", "scikit-learn", "onnxruntime"),
    *("fastapi", "uvicorn"),
)


def versions() -> dict[str, str]:
    """Return the versions of what is installed here, and which BLAS numpy found for this CPU."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "asynctrain" in found:
        from asynctrain import numeric_fingerprint

        found["BLAS of asynctrain"] = numeric_fingerprint()["blas"]
    return found


def missing(side: str) -> str:
    """Return why ``side`` cannot be run here, or nothing."""
    try:
        if side.startswith("PyTorch"):
            import torch

            if "compiled" in side:
                torch.compile(lambda x: x + 1)(torch.zeros(2))
        elif side == "JAX":
            import jax  # noqa: F401
        elif side == "scikit-learn":
            import sklearn  # noqa: F401
        elif side == "ONNX Runtime":
            import onnx  # noqa: F401  # the exporter needs it
            import onnxruntime  # noqa: F401
    except Exception as error:  # of many kinds where a compiler is missing
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


def missing_numba() -> str:
    """Return why asynctrain cannot use numba here, or nothing."""
    import asynctrain as at

    if "kernels" not in inspect.signature(at.Trainer).parameters:
        return "the Trainer has no argument kernels"
    try:
        import numba  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
    except ImportError as error:
        return f"ImportError: {error}"
    return ""


def main() -> None:
    """Run one job, or tell about this environment."""
    if sys.argv[1] == "--about":
        sides = OURS if sys.argv[2] == "ours" else PEERS
        print(json.dumps({"versions": versions(), "missing": {side: missing(side) for side in sides}}))
        return
    job = Job.from_json(sys.argv[1])
    print(json.dumps(SIDES[job.side][job.task](job)))


if __name__ == "__main__":
    main()
