"""A trained model for use: preprocessing, architecture, weights and classes, in one object and one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Protocol, cast, overload

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from asynctrain._aio import in_thread
from asynctrain._files import write_whole
from asynctrain._safetensors import parts_of
from asynctrain.arena import Arena, Array
from asynctrain.data.images import ImageSettings
from asynctrain.errors import CheckpointError
from asynctrain.executors.base import Executor, threads_of
from asynctrain.inference.evaluate import EvaluationResult, Metric, evaluate, forward
from asynctrain.inference.predictor import MICRO_BATCH, ImageLike, Images, Predictor, one_by_one
from asynctrain.nn.kernels.activations import softmax
from asynctrain.nn.model import Model
from asynctrain.types import BatchStream, Params, Program

FORMAT = "asynctrain.classifier/1"


class Trained(Protocol):
    """What a classifier needs of a training state."""

    @property
    def program(self) -> Program: ...  # noqa: D102
    @property
    def params(self) -> Params: ...  # noqa: D102
    @property
    def model_state(self) -> Params: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Prediction:
    """label: the likeliest class. probability: its share, 0 to 1. top: the likeliest classes, best first."""

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]


class Classifier:
    """Tells what is on an image.

    Each image goes through the model by itself, for BLAS rounds otherwise for other numbers of rows: so what it is told
    to be does not depend, to the last bit, on what else is asked at the time, or where it is computed.

    Args:
        program: architecture, input normalisation and dtype.
        params: of the program's model; copied, but for a read-only ``Arena``, whose values must stay as they are.
        model_state: the running statistics of its layers, float64; copied likewise.
        classes: the names of the outputs 0, 1, ...
        settings: how an image is decoded and resized.
    """

    def __init__(
        self, program: Program, params: Params, model_state: Params, classes: Sequence[str], settings: ImageSettings
    ) -> None:
        self._predictor = Predictor(program, settings)
        self.classes = tuple(classes)
        self._set_weights(params, model_state)

    @classmethod
    def from_state(
        cls, model: Model, state: Trained, *, classes: Sequence[str], settings: ImageSettings | None = None
    ) -> Classifier:
        """Return a classifier with the weights of ``state``.

        Args:
            model: the architecture that was trained.
            state: for example ``history.state``; its arrays are copied unless they are read-only.
            classes: the names of the labels 0, 1, ...; at most as many as the model has outputs.
            settings: how images were decoded; by default squashed to the model's input shape.
        """
        if not 1 <= len(classes) <= model.output_shape[0]:
            raise ValueError(
                f"classes must be 1 to {model.output_shape[0]} names, as the model has outputs; got {len(classes)}"
            )
        height, width, channels = model.input_shape
        settings = settings or ImageSettings((height, width), channels)
        return cls(state.program, state.params, state.model_state, classes, settings)

    def with_weights(self, params: Params, model_state: Params) -> Classifier:
        """Return a classifier with other weights of the same model; the two share the buffers that they compute in."""
        other = copy(self)
        other._set_weights(params, model_state)
        return other

    def _set_weights(self, params: Params, model_state: Params) -> None:
        self._params = _lasting(params, self.program.dtype)
        self._model_state = _lasting(model_state, np.float64)

    @property
    def program(self) -> Program:
        """Architecture, input normalisation and dtype."""
        return self._predictor.program

    @property
    def params(self) -> Params:
        """The weights by name, read-only."""
        return self._params

    @property
    def model_state(self) -> Params:
        """The running statistics of the layers by name, read-only."""
        return self._model_state

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what the model sees."""
        return (*self._predictor.settings.size, self._predictor.settings.channels)

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to one safetensors file, whole or not at all. Blocks while it writes; raises ``OSError``."""
        write_whole(Path(path), self._parts())

    def to_bytes(self) -> bytes:
        """Return what ``save`` writes. Takes as long as copying the weights."""
        return b"".join(self._parts())

    def _parts(self) -> list[bytes | memoryview]:
        about = {
            "format": FORMAT,
            "program": self.program.to_json(),
            "classes": self.classes,
            "images": asdict(self._predictor.settings),
        }
        return parts_of({**self._params, **self._model_state}, {"asynctrain": json.dumps(about)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Classifier:
        """Read a file that ``save`` wrote; runs no code from it. Blocks while it reads.

        Raises ``FileNotFoundError``, or ``CheckpointError`` if the file is torn or something else.
        """
        path = fspath(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such model file")
        try:
            with safe_open(path, framework="numpy") as file:
                about = json.loads((file.metadata() or {}).get("asynctrain", "{}"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(path, "this is no whole safetensors file") from error
        if about.get("format") != FORMAT:
            raise CheckpointError(path, f"this is no model file of asynctrain ({FORMAT})")
        return cls._restored(path, about, arrays)

    @classmethod
    def _restored(cls, path: str, about: dict[str, Any], arrays: Params) -> Classifier:
        try:
            program = Program.from_json(about["program"])
            model = Model.from_json(program.architecture)
            settings = ImageSettings(**{**about["images"], "size": tuple(about["images"]["size"])})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(path, f"the model's description cannot be used: {error}") from error
        params, state = model.layout(program.dtype).shapes, model.state_layout.shapes
        found, wanted = {name: array.shape for name, array in arrays.items()}, {**params, **state}
        if found != wanted:
            differing = sorted({*found.items()} ^ {*wanted.items()})
            raise CheckpointError(path, f"the weights do not fit the architecture: {differing[:4]}")
        own_params, own_state = ({name: arrays[name] for name in names} for names in (params, state))
        return cls(program, own_params, own_state, about["classes"], settings)

    @overload
    async def predict(  # type: ignore[overload-overlap] # see Images
        self, images: ImageLike, *, top_k: int = ..., executor: Executor | None = ...
    ) -> Prediction: ...
    @overload
    async def predict(
        self, images: Images, *, top_k: int = ..., executor: Executor | None = ...
    ) -> list[Prediction]: ...
    async def predict(
        self, images: ImageLike | Images, *, top_k: int = 5, executor: Executor | None = None
    ) -> Prediction | list[Prediction]:
        """Predict one image, or several at once.

        Args:
            images: a path, encoded bytes, a Pillow image, or a uint8 array (H, W) or (H, W, C); or a list of these.
            top_k: how many classes to list, at least 1.
            executor: where to compute; by default in a thread, on one CPU, together with what other tasks ask of this
                classifier at the time, at most 64 images before others have their turn.

        Raises:
            ReadError: a file cannot be read.
            DecodeError: an image cannot be decoded.

        Errors reach only the call whose images they are about. Cancelling it stops the computing before the next layer,
        or waits for the images that are computed in the same thread for others, at most 64.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if isinstance(images, list | tuple):
            return await self._predictions(images, top_k, executor)
        return (await self._predictions([cast("ImageLike", images)], top_k, executor))[0]

    async def evaluate(
        self, data: BatchStream, *, executor: Executor, microbatch: int | None = None, metrics: Sequence[Metric] = ()
    ) -> EvaluationResult:
        """Return loss, accuracy and ``metrics`` over one epoch of ``data``, a loader with the labels of ``classes``."""
        if data.image_shape != self.image_shape:
            raise ValueError(
                f"the model takes images of shape {self.image_shape}, the loader delivers {data.image_shape}"
            )
        if tuple(data.classes) != self.classes:
            raise ValueError(f"the model knows the classes {self.classes}, the data has {tuple(data.classes)}")
        async with executor.open(self.program) as session:
            await session.broadcast(self._params, self._model_state, 0)
            return await evaluate(session, 0, data, microbatch, metrics, threads=threads_of(executor))

    async def _predictions(self, images: Images, top_k: int, executor: Executor | None) -> list[Prediction]:
        return [
            self._prediction(row, top_k)
            for start in range(0, len(images), MICRO_BATCH)
            for row in await self._probabilities(images[start : start + MICRO_BATCH], executor)
        ]

    async def _probabilities(self, images: Images, executor: Executor | None) -> Array:
        """Return (n, classes) float64, each row adding up to 1."""
        if executor is None:
            logits = await self._predictor.logits(images, self._params, self._model_state)
        else:
            logits = await self._computed(await in_thread(self._predictor.decoded, images), executor)
        return softmax(logits[:, : len(self.classes)].astype(np.float64))

    async def _computed(self, images: Array, executor: Executor) -> Array:
        """Return the logits (n, outputs), computed elsewhere."""
        async with executor.open(self.program) as session:
            await session.broadcast(self._params, self._model_state, 0)
            return np.concatenate([result.outputs for result in await forward(session, 0, one_by_one(images))])

    def _prediction(self, probabilities: Array, top_k: int) -> Prediction:
        best = np.argsort(-probabilities, kind="stable")[:top_k]
        top = tuple((self.classes[i], float(probabilities[i])) for i in best)
        return Prediction(*top[0], top)

    def __repr__(self) -> str:
        height, width, channels = self.image_shape
        return f"<Classifier of {len(self.classes)} classes, {height}x{width}x{channels} images>"


def _lasting(arrays: Params, dtype: npt.DTypeLike) -> Arena:
    """Return the arrays as they are now, in a read-only arena."""
    if isinstance(arrays, Arena) and arrays.layout.dtype == dtype and not arrays.vector.flags.writeable:
        return arrays
    return Arena.of(arrays, dtype).read_only()
