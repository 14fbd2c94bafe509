"""The folder of a run: its configuration, its events as JSON lines, its checkpoints, its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from asynctrain._files import write_whole
from asynctrain.errors import CheckpointError
from asynctrain.train import checkpoint
from asynctrain.train.checkpoint import Checkpoint
from asynctrain.train.log import EventFile

CONFIG, EVENTS, MODEL = "config.toml", "history.jsonl", "model.safetensors"


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

    def latest(self) -> tuple[Path, Checkpoint] | None:
        """Return the latest checkpoint; remove what a crash has left half-written.

        Raises:
            CheckpointError: there are checkpoints and the latest is none that asynctrain wrote as it stands.
        """
        for leftover in (self.path / checkpoint.FOLDER).glob(".*.safetensors.*"):
            leftover.unlink()
        paths = checkpoint.find(self.path)
        return (paths[0], checkpoint.load(paths[0])) if paths else None

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


def open_run(path: Path) -> tuple[RunFolder | None, Path, Checkpoint]:
    """Return the folder, the file and the content of the checkpoint that ``path`` names: a file, or a run folder.

    There is no folder where the file is not in that of a run.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        CheckpointError: it holds no checkpoint, or one that cannot be used.
    """
    if path.is_dir():
        folder = RunFolder(path)
        found = folder.latest()
        if found is None:
            raise CheckpointError(path, "this folder holds no checkpoint to go on from")
        return folder, *found
    folder = RunFolder(path.parent.parent)
    return folder if folder.holds_run() else None, path, checkpoint.load(path)


def _without_none(value: Any) -> Any:
    """Return ``value`` as TOML can hold it, which knows no null: what is None is left out."""
    if isinstance(value, Mapping):
        return {str(key): _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value if item is not None]
    return value
