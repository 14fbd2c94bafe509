"""What the service must not forget: a folder for each run, on one disk, in the hands of one server."""

from __future__ import annotations

import base64
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from asynctrain._files import hold, write_whole
from asynctrain.train.run_folder import RunFolder

RECORD, SPOOL, RUN, LOCK = "record.json", "data", "run", "lock"

_logger = logging.getLogger(__name__)

Phase = Literal["receiving", "ready", "ended"]
End = Literal["finished", "stopped", "cancelled", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run has ended.

    Attributes:
        end: in which way.
        step: steps that were done.
        seconds: of the last attempt.
        digest: of the weights, where the run came to its end.
        metrics: of the last epoch, by name.
        code: the status, as gRPC counts, where it did not.
        detail: what went wrong then.
        time: when it ended, in seconds since 1970.
        events: how many it has, the one that tells this included.
    """

    end: End
    step: int = 0
    seconds: float = 0.0
    digest: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    code: int = 0
    detail: str = ""
    time: float = 0.0
    events: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a run, whatever happens to the server.

    Attributes:
        run_id: its name.
        client: whose it is.
        key: by which that client finds it again, or nothing.
        start: the Start, in its canonical bytes; nothing once it has ended.
        digest: of these bytes, SHA-256: another Start with the same key is told by it.
        epochs: that it asks for.
        created: when, in seconds since 1970.
        phase: whether its data is still to come, is all there, or the run has ended.
        order: of those whose data is all there, the place in the queue.
        paused: whether it is to wait.
        images: how many it has, once that is known.
        messages: in how many they came.
        outcome: how it has ended.
    """

    run_id: str
    client: str
    key: str
    start: bytes
    digest: str
    epochs: int
    created: float
    phase: Phase = "receiving"
    order: int = 0
    paused: bool = False
    images: int = 0
    messages: int = 0
    outcome: Outcome | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return asdict(self) | {"start": base64.b64encode(self.start).decode()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """Return the record that ``to_json`` described; raises ``ValueError`` or ``KeyError`` where that is none."""
        known = {field.name: value[field.name] for field in fields(cls)}
        outcome = known["outcome"] and Outcome(**known["outcome"])
        return cls(**{**known, "start": base64.b64decode(known["start"]), "outcome": outcome})


class Records:
    """The folder of a server. Every function blocks.

    Args:
        path: the folder; made if it is not there.

    Raises:
        OSError: it cannot be used.
        BlockingIOError: another server uses it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs = path / "runs"
        self._runs.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = hold(path / LOCK)
        except BlockingIOError as error:
            raise BlockingIOError(error.errno, "another server uses this folder", str(path)) from error

    def close(self) -> None:
        """Let another server have the folder."""
        self._lock.close()

    def load(self) -> Iterator[Record]:
        """Yield the records of all runs; what a crash has left half-made or half-removed is removed."""
        for folder in sorted(self._runs.iterdir()):
            try:
                content = (folder / RECORD).read_text(encoding="utf-8")
            except (FileNotFoundError, NotADirectoryError):
                shutil.rmtree(folder, ignore_errors=True)
                continue
            for leftover in (*folder.glob(".*"), *(folder / RUN).glob(".*")):
                leftover.unlink()  # a file that was being written
            try:
                yield Record.from_json(json.loads(content))
            except (ValueError, KeyError, TypeError) as error:  # somebody may want to mend it
                _logger.error("%s cannot be read and is left alone", folder / RECORD, exc_info=error)

    def save(self, record: Record) -> None:
        """Write the record of a run, whole. Raises ``OSError``."""
        folder = self._runs / record.run_id
        folder.mkdir(exist_ok=True)
        write_whole(folder / RECORD, json.dumps(record.to_json()).encode())

    def remove(self, run_id: str) -> None:
        """Remove a run and all that is known of it; the record first, so that half a removal is none."""
        folder = self._runs / run_id
        (folder / RECORD).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def spool_path(self, run_id: str) -> Path:
        """Return where the images of a run are."""
        return self._runs / run_id / SPOOL

    def run_folder(self, run_id: str) -> RunFolder:
        """Return the run's own folder."""
        return RunFolder(self._runs / run_id / RUN)
