"""The images and labels of one run on disk: sent once, read in every epoch."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from struct import Struct

import numpy as np

from asynctrain.arena import Array, Shape
from asynctrain.serve.refusal import exhausted
from asynctrain.serve.samples import Samples

_ENTRY = Struct("<QQ")  # of a message in the index: images up to and with it, whether it is the last


@dataclass(frozen=True, slots=True)
class Contents:
    """What a spool holds. messages: stored, whole. images: in them. complete: whether the last one is among them."""

    messages: int = 0
    images: int = 0
    complete: bool = False


class Spool:
    """A folder of three files to which messages are appended; a message is there when the index says so.

    A crash in the middle of a message leaves bytes behind what the index tells of, and these are cut off when the spool
    is opened again. Every function blocks.

    Args:
        path: the folder; made if it is not there.
        image_shape: (H, W, C).
        free_bytes: that are left free on the disk.

    Attributes:
        contents: what is there.
    """

    def __init__(self, path: Path, image_shape: Shape, free_bytes: int = 0) -> None:
        self._path = path
        self._shape = image_shape
        self._free_bytes = free_bytes
        path.mkdir(parents=True, exist_ok=True)
        self.contents = self._read()
        self._cut_off()

    @property
    def bytes(self) -> int:
        """Of the pixels."""
        return self.contents.images * prod(self._shape)

    def append(self, samples: Samples, last: bool) -> None:
        """Store a message.

        Raises:
            Refused: the disk is full, or would be too full.
            OSError: it cannot be written otherwise.
        """
        if shutil.disk_usage(self._path).free - samples.images.nbytes < self._free_bytes:
            raise exhausted("the server's disk has no room for more images")
        before = self.contents
        after = Contents(before.messages + 1, before.images + len(samples.labels), last)
        try:
            self._write("images", np.ascontiguousarray(samples.images).reshape(-1).view(np.uint8))
            self._write("labels", samples.labels.astype("<i8"))
            self._write("index", np.frombuffer(_ENTRY.pack(after.images, last), np.uint8))
        except OSError:
            self._cut_off()
            raise
        self.contents = after

    def sync(self) -> None:
        """Let what is stored outlast a power cut."""
        for name in ("images", "labels", "index"):
            with (self._path / name).open("rb") as file:
                os.fsync(file.fileno())

    def arrays(self) -> Samples:
        """Return all that is stored; the images are read from the disk as they are looked at."""
        count = self.contents.images
        if not count:
            return Samples(np.empty((0, *self._shape), np.uint8), np.empty(0, np.int64))
        images = np.memmap(self._path / "images", np.uint8, "r", shape=(count, *self._shape))
        labels = np.fromfile(self._path / "labels", "<i8", count)
        return Samples(images, labels.astype(np.int64))

    def delete(self) -> None:
        """Remove the folder; arrays that were handed out stay readable."""
        shutil.rmtree(self._path, ignore_errors=True)

    def _write(self, name: str, content: Array) -> None:
        with (self._path / name).open("ab", buffering=0) as file:
            rest = content.data.cast("B")
            while rest:
                rest = rest[file.write(rest) :]

    def _read(self) -> Contents:
        index = self._path / "index"
        content = index.read_bytes() if index.exists() else b""
        messages = len(content) // _ENTRY.size
        if not messages:
            return Contents()
        images, last = _ENTRY.unpack_from(content, (messages - 1) * _ENTRY.size)
        return Contents(messages, images, bool(last))

    def _cut_off(self) -> None:
        """Remove what is behind the last whole message."""
        known = self.contents
        sizes = {"images": self.bytes, "labels": known.images * 8, "index": known.messages * _ENTRY.size}
        for name, size in sizes.items():
            with (self._path / name).open("ab") as file:
                file.truncate(size)
