"""How much the service does for its clients."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

MESSAGE_BYTES = 4 * 2**20  # gRPC's own limit, which stays: whatever a client sends is in pieces of at most this


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may ask of the service; whatever is beyond is refused before anything is allocated for it.

    Attributes:
        classes: of one run.
        json_bytes: of a model's architecture, of its arguments, of an optimizer.
        layers: of a model.
        optimizer_slots: copies of the parameters that an optimizer keeps.
        parameters: of a model.
        activation_bytes: that the forward pass of one microbatch leaves for the backward pass, as ``Model.costs`` says.
        flops: of the forward pass of one image, as ``Model.costs`` says.
        batch_bytes: of the pixels of a step's batch; a run holds a handful of such batches.
        side: height and width of the model's images, in pixels.
        epoch_samples: epochs times images of a run.
        message_images: images in one message.
        image_pixels: of one encoded image. Decoding takes about 12 bytes per pixel for a moment.
        run_bytes: pixels of a run, on disk.
        quota_bytes: pixels of all runs that have not ended, on disk.
        free_bytes: that storing images leaves free on the disk.
        running: runs that train at once; the others wait in order of arrival.
        runs_per_client: that have not ended.
        runs: that have not ended, of all clients.
        ended_runs: that are kept; the model and the events of the one that ended first are removed.
        calls: of all clients at once.
        idle_seconds: that a client with data left to send may be silent.
        linger_seconds: that a run with an idempotency key, whose data is not complete, waits for its client.
        prediction_images: in one request to predict.
    """

    classes: int = 10_000
    json_bytes: int = 64 * 2**10
    layers: int = 1_000
    optimizer_slots: int = 8
    parameters: int = 50_000_000
    activation_bytes: int = 2 * 2**30
    flops: int = 20_000_000_000
    batch_bytes: int = 256 * 2**20
    side: int = 2_048
    epoch_samples: int = 1_000_000_000
    message_images: int = 8_192
    image_pixels: int = 2**24
    run_bytes: int = 8 * 2**30
    quota_bytes: int = 32 * 2**30
    free_bytes: int = 2**30
    running: int = 1
    runs_per_client: int = 16
    runs: int = 64
    ended_runs: int = 1_000
    calls: int = 1_000
    idle_seconds: float = 60.0
    linger_seconds: float = 3_600.0
    prediction_images: int = 1_024

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{field.name} must be a number, got {value!r}")
            if not value > 0 and field.name != "free_bytes":
                raise ValueError(f"{field.name} must be above 0, got {value}")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Limits:
        """Return the limits that a TOML file names, the others as they are by default. Blocks.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no TOML, or names what is no limit.
        """
        return cls.from_toml(tomllib.loads(Path(path).read_text(encoding="utf-8")), str(path))

    @classmethod
    def from_toml(cls, values: Mapping[str, Any], name: str = "limits") -> Limits:
        """Return the limits that are named in ``values``; see ``load``."""
        known = {field.name for field in fields(cls)}
        if unknown := values.keys() - known:
            raise ValueError(f"{name} must name none but {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}")
        return cls(**values)
