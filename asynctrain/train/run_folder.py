"""The folder of a run: its configuration, its history as JSON lines, its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from asynctrain._aio import in_thread
from asynctrain._files import write_whole
from asynctrain.inference.classifier import Classifier
from asynctrain.train.events import Event, to_json

CONFIG, HISTORY, MODEL = "config.json", "history.jsonl", "model.safetensors"


class RunFolder:
    """Writes the files of one run, off the loop.

    Events are collected and written at the end of each epoch and of the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[str] = []

    async def create(self, config: dict[str, Any]) -> None:
        """Make the folder and write the configuration. Raises ``FileExistsError`` if it holds a run already."""
        await in_thread(self._create, json.dumps(config, indent=2) + "\n")

    def record(self, number: int, event: Event) -> None:
        """Keep ``event`` for the next flush."""
        self._lines.append(json.dumps(to_json(number, event)) + "\n")

    async def flush(self) -> None:
        """Append the events recorded since the last flush to the history."""
        lines, self._lines = self._lines, []
        await in_thread(self._append, "".join(lines))

    async def save(self, classifier: Classifier) -> None:
        """Write the model, whole or not at all."""
        await in_thread(classifier.save, self.path / MODEL)

    def _create(self, config: str) -> None:
        if (self.path / CONFIG).exists():
            raise FileExistsError(f"run_dir must be a folder without a run in it, and {self.path} holds one")
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / CONFIG, config.encode())

    def _append(self, text: str) -> None:
        with (self.path / HISTORY).open("a", encoding="utf-8") as file:
            file.write(text)
