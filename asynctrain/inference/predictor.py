"""What answers for a trained model: images are decoded and computed in a thread, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from os import PathLike, fspath
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image

from asynctrain._aio import Failure, step_back
from asynctrain.arena import Array
from asynctrain.data.images import ImageSettings, decode
from asynctrain.errors import ReadError
from asynctrain.executors.blas import Library, find_blas, one_blas_thread
from asynctrain.executors.worker import GradientWorker, StopFlag
from asynctrain.inference.gathering import Gathering
from asynctrain.types import ForwardWork, Params, Program

MICRO_BATCH = 64  # images that one thread answers before it lets others have their turn

ImageLike: TypeAlias = str | PathLike[str] | bytes | Image.Image | Array
Images: TypeAlias = Sequence[ImageLike]  # a list or a tuple: bytes and strings, sequences too, are one image


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """Images, and the weights with which they are to be seen."""

    images: Images
    params: Params
    model_state: Params


class Predictor:
    """Computes what a program says of images, with whatever weights come with them.

    It has what takes a while to make, the model and its buffers, so that classifiers which differ in their weights
    alone share one: those of a run's steps are made and asked many times a second.

    Args:
        program: architecture, input normalisation and dtype.
        settings: how an image is decoded and resized.
    """

    def __init__(self, program: Program, settings: ImageSettings) -> None:
        self.program = program
        self.settings = settings
        self._requests: Gathering[_Request, Array] = Gathering(self._answers, MICRO_BATCH)

    async def logits(self, images: Images, params: Params, model_state: Params) -> Array:
        """Return the logits (n, outputs) of the images, computed in a thread together with what others ask."""
        return await self._requests.ask(_Request(images, params, model_state), len(images))

    def decoded(self, images: Images) -> Array:
        """Return the images as uint8 (n, H, W, C). Blocks."""
        height, width = self.settings.size
        batch = np.empty((len(images), height, width, self.settings.channels), np.uint8)
        for image, out in zip(images, batch, strict=True):
            encoded, name = _encoded(image)
            decode(encoded, self.settings, name, out)
        return batch

    @cached_property
    def _worker(self) -> GradientWorker:  # not made before it is needed: a classifier costs next to nothing
        return GradientWorker(self.program)

    @cached_property
    def _blas(self) -> list[Library]:
        return find_blas()

    def _answers(self, requests: Sequence[_Request], stop: StopFlag) -> list[Array | Failure]:
        """Return the logits of each request; in a thread of its own."""
        step_back()
        with one_blas_thread(self._blas):
            return [self._answer(request, stop) for request in requests]

    def _answer(self, request: _Request, stop: StopFlag) -> Array | Failure:
        try:
            batch = self.decoded(request.images)
        except Exception as error:
            return Failure(error)
        compute = partial(self._worker.forward, request.params, request.model_state, stop=stop)
        return np.concatenate([compute(work).outputs for work in one_by_one(batch)])


def one_by_one(images: Array) -> list[ForwardWork]:
    """Return each image of (n, H, W, C) as work of its own."""
    return [ForwardWork(images[i : i + 1]) for i in range(len(images))]


def _encoded(image: ImageLike) -> tuple[bytes | Image.Image | Array, str]:
    """Return what is to be decoded, and its name for messages."""
    if isinstance(image, str | PathLike):
        try:
            return Path(image).read_bytes(), fspath(image)
        except OSError as error:
            raise ReadError(image, error.strerror or str(error)) from error
    return image, f"<{type(image).__name__}>"
