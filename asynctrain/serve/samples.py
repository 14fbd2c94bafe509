"""Images and labels of a message as arrays, every byte of them checked."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from grpc import StatusCode

from asynctrain.arena import Array
from asynctrain.data.images import ImageSettings, decode, quiet_pillow
from asynctrain.errors import DecodeError
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve.limits import Limits
from asynctrain.serve.refusal import Refused, invalid, require_at_most

DTYPES: dict[int, np.dtype[Any]] = {pb.Tensor.UINT8: np.dtype(np.uint8), pb.Tensor.FLOAT32: np.dtype("<f4")}
RANK = 4  # images, height, width, channels


class Samples(NamedTuple):
    """images: (n, H, W, C) uint8, which may be a view of the message. labels: (n,) int64."""

    images: Array
    labels: Array


Labelled: TypeAlias = pb.Batch | pb.TrainModelRequest  # messages with images and labels


def read_samples(message: Labelled, settings: ImageSettings, classes: int, limits: Limits) -> Samples:
    """Return what a message holds. Blocks while it decodes.

    Args:
        message: with images and a label for each; none of either are permitted.
        settings: what every image becomes.
        classes: how many labels there are.
        limits: the service's.

    Raises:
        Refused: what the message holds is not what it must be, or beyond a limit.
    """
    labels = _labels(message.labels, classes, limits)
    images = read_images(message, settings, limits)
    if len(images) != len(labels):
        raise invalid(f"a label must be there for each image, got {len(labels)} labels for {len(images)} images")
    return Samples(images, labels)


def read_images(message: Labelled | pb.PredictRequest, settings: ImageSettings, limits: Limits) -> Array:
    """Return the images of a message, (n, H, W, C) uint8. Blocks while it decodes; raises ``Refused``."""
    kind = message.WhichOneof("images")
    if kind == "tensor":
        return _tensor(message.tensor, settings.shape, limits)
    if kind == "encoded":
        return _decoded(message.encoded.images, settings, limits)
    return np.empty((0, *settings.shape), np.uint8)


def _labels(labels: Sequence[int], classes: int, limits: Limits) -> Array:
    require_at_most(limits.message_images, len(labels), "labels in a message")
    array = np.fromiter(labels, np.int64, len(labels))
    wrong = (array < 0) | (array >= classes)
    if wrong.any():
        raise Refused(
            StatusCode.OUT_OF_RANGE, f"labels must be 0 to {classes - 1}, as there are classes; got {array[wrong][0]}"
        )
    return array


def _tensor(tensor: pb.Tensor, image_shape: tuple[int, int, int], limits: Limits) -> Array:
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise invalid(f"the tensor's dtype must be UINT8 or FLOAT32, got {_dtype_name(tensor.dtype)}")
    if len(tensor.shape) != RANK:
        raise invalid(f"the tensor must have the {RANK} axes images, height, width, channels; got {len(tensor.shape)}")
    shape = tuple(tensor.shape)
    if shape[1:] != image_shape:
        raise invalid(f"the model takes images of shape {image_shape}, got {shape[1:]}")
    require_at_most(limits.message_images, shape[0], "images in a message")
    length = prod(shape) * dtype.itemsize
    data = tensor.data
    if len(data) != length:
        raise invalid(f"a tensor of shape {shape} and {dtype} must have {length:,} bytes, got {len(data):,}")
    array = np.frombuffer(data, dtype).reshape(shape)
    return array if dtype == np.uint8 else _eight_bits(array)


def _eight_bits(images: Array) -> Array:
    """Return numbers from 0 to 1 as 0 to 255."""
    if not np.isfinite(images).all():
        raise invalid("pixels must be finite")
    if images.size and not 0 <= images.min() <= images.max() <= 1:
        raise invalid(f"pixels of FLOAT32 must be 0 to 1, got {images.min():g} to {images.max():g}")
    return np.rint(images * np.float32(255)).astype(np.uint8)


def _decoded(encoded: Sequence[bytes], settings: ImageSettings, limits: Limits) -> Array:
    require_at_most(limits.message_images, len(encoded), "images in a message")
    images = np.empty((len(encoded), *settings.shape), np.uint8)
    with quiet_pillow():
        for number, (content, out) in enumerate(zip(encoded, images, strict=True)):
            try:
                decode(content, settings, f"image {number} of the message", out)
            except DecodeError as error:
                raise invalid(str(error)) from error
    return images


def _dtype_name(number: pb.Tensor.DType.ValueType) -> str:
    return pb.Tensor.DType.Name(number) if number in pb.Tensor.DType.values() else str(number)
