"""The folder of a run: its configuration, its events as JSON lines, its checkpoints, its model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from asynctrain._files import hold, write_whole
from asynctrain.errors import CheckpointError
from asynctrain.train import checkpoint
from asynctrain.train.checkpoint import Checkpoint
from asynctrain.train.log import EventFile

log = logging.getLogger("asynctrain")

CONFIG, EVENTS, MODEL = "config.toml", "history.jsonl", "model.safetensors"
DESCRIBED = ("program", "optimizer", "data")  # the sections of a configuration that decide about the bits, and
MICROBATCH = "microbatch"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The files of one run. Every function blocks."""

    path: Path

    @property
    def events(self) -> EventFile:
        """The events of all attempts."""
        return EventFile(self.path / EVENTS)

    @property
    def model(self) -> Path:
        """Where the trained model is."""
        return self.path / MODEL

    def holds_run(self) -> bool:
        """Return whether a run was begun here."""
        return (self.path / CONFIG).exists()

    def create(self, config: Mapping[str, Any]) -> None:
        """Make the folder and write the configuration. Raises ``FileExistsError`` if it holds a run already."""
        if self.holds_run():
            raise FileExistsError(f"run_dir must be a folder without a run in it, and {self.path} holds one")
        (self.path / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
        write_whole(self.path / CONFIG, tomli_w.dumps(_without_none(config)).encode())

    def hold(self) -> ExitStack:
        """Keep other runs out, of other processes too, until what is returned is closed, or this process has ended.

        Raises:
            CheckpointError: there is one in the folder.
        """
        try:
            return hold(self.path / CONFIG)
        except BlockingIOError as error:
            raise CheckpointError(self.path, "another run is under way in this folder") from error

    def require(self, config: Mapping[str, Any]) -> None:
        """Raise ``CheckpointError``, naming the first difference, unless the run was begun as ``config`` describes."""
        import tomllib

        file = self.path / CONFIG
        try:
            there = tomllib.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(file, f"this is no TOML file: {error}") from error
        here = _without_none(config)
        for section in DESCRIBED:
            checkpoint.require_same(file, section, there.get(section), here[section])
        of_run, own = there.get("run", {}), here["run"]
        checkpoint.require_same(file, MICROBATCH, of_run.get(MICROBATCH), own.get(MICROBATCH))

    def latest(self) -> tuple[Path, Checkpoint] | None:
        """Return the latest checkpoint that is whole; remove what a crash has left half-written.

        One that was damaged since is passed over with a warning, as if the run had ended before it.

        Raises:
            CheckpointError: there are checkpoints and none is one that asynctrain wrote as it stands.
        """
        for leftover in (self.path / checkpoint.FOLDER).glob(".*.safetensors.*"):
            leftover.unlink()
        damage: CheckpointError | None = None
        for path in checkpoint.find(self.path):
            try:
                return path, checkpoint.load(path)
            except CheckpointError as error:
                log.warning("a checkpoint is passed over: %s", error)
                damage = damage or error
        if damage is not None:
            raise damage
        return None

    def checkpoint_path(self, step: int) -> Path:
        """Return where the checkpoint after ``step`` is, or will be."""
        return self.path / checkpoint.FOLDER / checkpoint.name_of(step)

    def save(self, saved: Checkpoint, keep: int, stopped: checkpoint.Stopped) -> None:
        """Write a checkpoint, and when it is whole remove all but the ``keep`` latest. Raises ``OSError``."""
        path = self.checkpoint_path(saved.state.step)
        checkpoint.save(path, saved, stopped)
        for old in checkpoint.find(self.path)[keep:]:
            if old != path:  # which is not the latest where the run went on from an earlier checkpoint
                old.unlink()


class FoundRun(NamedTuple):
    """What there is to go on with.

    folder: None where a checkpoint file is in none. file, saved: None where the run has no checkpoint yet.
    """

    folder: RunFolder | None
    file: Path | None
    saved: Checkpoint | None


def open_run(path: Path) -> FoundRun:
    """Return what ``path`` names: a checkpoint file, or a run folder with its latest checkpoint, if it has one.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        CheckpointError: it holds no run, or a checkpoint that cannot be used.
    """
    if not path.is_dir():
        folder = RunFolder(path.parent.parent)
        return FoundRun(folder if folder.holds_run() else None, path, checkpoint.load(path))
    folder = RunFolder(path)
    found = folder.latest()
    if found is None and not folder.holds_run():
        raise CheckpointError(path, "this folder holds no run to go on with")
    return FoundRun(folder, *(found or (None, None)))


def _without_none(value: Any) -> Any:
    """Return ``value`` as TOML can hold it, which knows no null: what is None is left out."""
    if isinstance(value, Mapping):
        return {str(key): _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value if item is not None]
    return value
