"""What of a run's events is on disk, for those who read them there and those who count them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from asynctrain.train.events import RunEnd

PIECE = 256 * 2**10  # bytes of the file of events that are read in one go
_END = json.dumps({"event": RunEnd.__name__})[1:-1].encode()  # of a line; within a text its quotes would be escaped


class Told(NamedTuple):
    """events: how many there are. has_end: whether the last of them is the end of an attempt."""

    events: int = 0
    has_end: bool = False


def told_in(path: Path) -> Told:
    """Return what a file of events holds. Blocks."""
    told, offset = Told(), 0
    while lines := lines_of(path, offset):
        told, offset = after(told, lines), offset + size_of(lines)
    return told


def after(told: Told, lines: Sequence[bytes]) -> Told:
    """Return what there is with some more lines."""
    return Told(told.events + len(lines), _END in lines[-1])


def size_of(lines: Sequence[bytes]) -> int:
    """Return how many bytes of the file these lines are."""
    return sum(map(len, lines)) + len(lines)


def lines_of(path: Path, offset: int) -> list[bytes]:
    """Return some whole lines of the file from ``offset`` on, without their ends; none where there are no more."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(PIECE)
            if b"\n" not in content:
                content += file.readline()
    except FileNotFoundError:
        return []
    return content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
