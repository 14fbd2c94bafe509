"""What a client's Start asks for, checked, and held against the limits before anything is allocated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, NoReturn

from google.protobuf.message import DecodeError
from grpc import StatusCode

from asynctrain.arena import Array
from asynctrain.data.datasets import ArrayDataset, Subset
from asynctrain.data.images import ImageSettings
from asynctrain.data.loader import Loader
from asynctrain.executors.base import Executor
from asynctrain.nn import models
from asynctrain.nn.model import Model
from asynctrain.optim.transforms import Optimizer
from asynctrain.optim.transforms import from_json as optimizer_from_json
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve.limits import Limits
from asynctrain.serve.refusal import Refused, invalid, require_at_most, unfit
from asynctrain.train.saving import Saving
from asynctrain.train.trainer import Trainer
from asynctrain.types import LARGEST

VERSION = 1  # of the protocol
KEY_LENGTH, CLASS_LENGTH = 128, 256  # characters
OPTIMIZER = '{"name": "adamw", "learning_rate": 0.001}'
BATCH_SIZE = 64
COUNT = 2**31 - 1  # what fits into every language's integers


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be trained, and how.

    Attributes:
        model: that is trained.
        optimizer: by which.
        classes: the names of the labels 0, 1, ...
        epochs: passes over the data.
        batch_size: images in a step.
        microbatch: the most images that one worker takes at once; None for the library's choice.
        seed: of initial weights, order and dropout.
        holdout: the share of each class that is tested with.
        checkpoint_steps: steps between two checkpoints; None for the library's choice.
        settings: how an encoded image is decoded.
    """

    model: Model
    optimizer: Optimizer
    classes: tuple[str, ...]
    epochs: int
    batch_size: int
    microbatch: int | None
    seed: int
    holdout: float
    checkpoint_steps: int | None
    settings: ImageSettings

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the model's images."""
        return self.settings.shape

    @property
    def image_bytes(self) -> int:
        """Of the pixels of one image."""
        return prod(self.image_shape)

    def split(self, images: Array, labels: Array) -> tuple[ArrayDataset | Subset, Subset | None]:
        """Return what is trained on and what is tested with.

        Raises:
            Refused: there is nothing to train on, or nothing to test with where there should be.
        """
        if not len(labels):
            raise unfit("a run must have at least one image")
        data = ArrayDataset(images, labels, self.classes)
        if not self.holdout:
            return data, None
        train, test = data.split(1 - self.holdout, self.seed)
        if not len(train) or not len(test):
            raise unfit(f"{len(labels)} images cannot be divided by a holdout of {self.holdout:g}")
        return train, test

    def loader(self, data: ArrayDataset | Subset) -> Loader:
        """Return what delivers the batches."""
        height, width, channels = self.image_shape
        return Loader(data, batch_size=self.batch_size, image_size=(height, width), channels=channels, seed=self.seed)

    def trainer(self, executor: Executor) -> Trainer:
        """Return what trains."""
        return Trainer(
            self.model, optimizer=self.optimizer, executor=executor, microbatch=self.microbatch, seed=self.seed
        )

    def saving(self) -> Saving:
        """Return when the run is saved."""
        return Saving() if self.checkpoint_steps is None else Saving(steps=self.checkpoint_steps)


def parse_start(start: pb.Start, limits: Limits) -> Plan:
    """Return what ``start`` asks for. Blocks for some milliseconds where a model has many layers.

    Raises:
        Refused: it asks for what does not exist, is out of range, or beyond a limit.
    """
    if start.version not in (0, VERSION):
        raise unfit(f"this server speaks version {VERSION} of the protocol, the client {start.version}")
    classes = _classes(start.classes, limits)
    settings = _settings(start, limits)
    model = _model(start, len(classes), settings, limits)
    batch_size = start.batch_size or BATCH_SIZE
    for name, value in (("epochs", start.epochs), ("batch_size", batch_size), ("microbatch", start.microbatch)):
        require_at_most(COUNT, value, name)
    if start.epochs < 1:
        raise invalid("epochs must be at least 1, got 0")
    require_at_most(limits.epoch_samples, start.epochs, "epochs")
    require_at_most(limits.batch_bytes, batch_size * prod(settings.shape), "bytes of pixels in a batch")
    if not 0 <= start.holdout < 1:  # which refuses NaN, too
        raise invalid(f"holdout must be at least 0 and below 1, got {start.holdout}")
    _require_affordable(model, start.microbatch or None, batch_size, limits)
    return Plan(
        model=model,
        optimizer=_optimizer(start.optimizer or OPTIMIZER, limits),
        classes=classes,
        epochs=start.epochs,
        batch_size=batch_size,
        microbatch=start.microbatch or None,
        seed=start.seed,
        holdout=start.holdout,
        checkpoint_steps=start.checkpoint_steps or None,
        settings=settings,
    )


def require_key(start: pb.Start) -> str:
    """Return the idempotency key, or nothing where there is none; raises ``Refused`` where it is too long."""
    if len(start.idempotency_key) > KEY_LENGTH:
        raise invalid(f"idempotency_key must have at most {KEY_LENGTH} characters, got {len(start.idempotency_key)}")
    return start.idempotency_key


def canonical(start: pb.Start) -> bytes:
    """Return the bytes by which two Starts are compared: what they ask for, wherever their events begin."""
    same = pb.Start()
    same.CopyFrom(start)
    same.version = VERSION
    same.ClearField("from_event")
    return same.SerializeToString(deterministic=True)


def restored(content: bytes, limits: Limits) -> Plan:
    """Return the plan of a Start that was accepted before; raises ``Refused`` where it would not be accepted now."""
    try:
        return parse_start(pb.Start.FromString(content), limits)
    except DecodeError as error:
        raise Refused(StatusCode.DATA_LOSS, "the run's Start cannot be read any more") from error


def _classes(classes: Sequence[str], limits: Limits) -> tuple[str, ...]:
    require_at_most(limits.classes, len(classes), "classes")
    if len(classes) < 2:
        raise invalid(f"classes must be at least two names, got {len(classes)}")
    if len(set(classes)) < len(classes):
        raise invalid("classes must all be different")
    if any(not 0 < len(name) <= CLASS_LENGTH for name in classes):
        raise invalid(f"classes must have names of 1 to {CLASS_LENGTH} characters")
    return tuple(classes)


def _settings(start: pb.Start, limits: Limits) -> ImageSettings:
    """Return what every image becomes, once it is known which images the model takes."""
    if start.WhichOneof("model") == "ready_model":
        shape: Sequence[Any] = tuple(start.ready_model.image_shape)
    elif start.WhichOneof("model") == "architecture":
        shape = _object("architecture", start.architecture, limits).get("input_shape", ())
    else:
        raise invalid("a Start must have a model: an architecture or a ready_model")
    if not isinstance(shape, list | tuple) or len(shape) != 3 or not all(type(length) is int for length in shape):
        raise invalid(f"the model's images must have a height, a width and channels, got {_short(shape)}")
    height, width, channels = shape
    require_at_most(limits.side, max(height, width), "pixels of height or width")
    if min(height, width) < 1 or channels not in (1, 3):
        raise invalid(f"the model's images must have a height, a width and 1 or 3 channels, got {_short(shape)}")
    return ImageSettings((height, width), channels, max_pixels=limits.image_pixels)


def _model(start: pb.Start, classes: int, settings: ImageSettings, limits: Limits) -> Model:
    try:
        if start.WhichOneof("model") == "architecture":
            architecture = _object("architecture", start.architecture, limits)
            require_at_most(limits.layers, start.architecture.count('"layer"'), "layers")
            model = Model.from_json(architecture)
        else:
            model = _ready_model(start.ready_model, classes, settings.shape, limits)
    except Refused:
        raise
    except Exception as error:  # the values are a stranger's: layers raise nearly anything
        raise invalid(f"the model cannot be made: {_short(error)}") from error
    require_at_most(limits.layers, len(model.leaves), "layers")
    if len(model.output_shape) != 1 or model.output_shape[0] < classes:
        raise invalid(f"the model has outputs of shape {model.output_shape} for {classes} classes")
    return model


def _ready_model(ready: pb.ReadyModel, classes: int, image_shape: tuple[int, int, int], limits: Limits) -> Model:
    arguments = _object("arguments", ready.arguments, limits) if ready.arguments else {}
    if reserved := arguments.keys() & {"num_classes", "image_shape"}:
        raise invalid(f"arguments must not have {', '.join(sorted(reserved))}, which are told otherwise")
    for value in arguments.values():
        require_at_most(limits.layers, len(value) if isinstance(value, list) else 0, "layers")
    return models.get(ready.name)(num_classes=classes, image_shape=image_shape, **arguments)


def _require_affordable(model: Model, microbatch: int | None, batch_size: int, limits: Limits) -> None:
    """Hold what the model costs, worked out from its shapes alone, against the limits."""
    require_at_most(limits.parameters, model.costs().parameters, "parameters")
    require_at_most(limits.flops, model.costs().flops, "operations for one image")
    largest = min(batch_size, microbatch or LARGEST)
    require_at_most(limits.activation_bytes, model.costs(largest).activation_bytes, "bytes of activations")


def _optimizer(text: str, limits: Limits) -> Optimizer:
    described = _object("optimizer", text, limits)
    try:
        optimizer = optimizer_from_json(described)
    except Exception as error:  # as for models
        raise invalid(f"the optimizer cannot be made: {_short(error)}") from error
    require_at_most(limits.optimizer_slots, len(optimizer.slots), "slots of the optimizer")
    return optimizer


def _object(name: str, text: str, limits: Limits) -> dict[str, Any]:
    """Return the JSON object that ``text`` holds; its numbers are finite."""
    require_at_most(limits.json_bytes, len(text), f"bytes of {name}")
    try:
        value = json.loads(text, parse_constant=_not_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise invalid(f"{name} must be JSON: {_short(error)}") from error
    if not isinstance(value, dict):
        raise invalid(f"{name} must be a JSON object, got {_short(value)}")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        _not_finite(text)
    return number


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"numbers must be finite, got {text}")


def _short(value: object, length: int = 200) -> str:
    text = str(value) or type(value).__name__
    return text if len(text) <= length else f"{text[:length]} ..."
