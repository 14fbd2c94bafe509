"""Layers for tests of worker processes, which import this module: what they do shows in files of a folder."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asynctrain import nn
from asynctrain.arena import Array
from asynctrain.types import Params

PATIENCE = 20  # seconds that a gate waits before it fails the test


def wait_for(path: Path) -> None:
    """Block until there is a file at ``path``."""
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.002)


@nn.register_layer("test_process_gate")
@dataclass(frozen=True)
class Gate(nn.ReLU):
    """Tells that it was entered, by whom, and goes on when it may."""

    folder: str = ""

    def forward(self, params: Params, x: Array, scope: nn.Scope) -> tuple[Array, Any]:
        folder = Path(self.folder)
        (folder / f"entered-{os.getpid()}").touch()
        wait_for(folder / "open")
        return super().forward(params, x, scope)


@nn.register_layer("test_process_counting")
@dataclass(frozen=True)
class Counting(nn.ReLU):
    """Counts, in a file, how often its forward pass runs."""

    folder: str = ""

    def forward(self, params: Params, x: Array, scope: nn.Scope) -> tuple[Array, Any]:
        with (Path(self.folder) / "count").open("a") as file:
            file.write(".")
        return super().forward(params, x, scope)


@nn.register_layer("test_process_end")
@dataclass(frozen=True)
class End(nn.ReLU):
    """Ends its process in the middle of the chain of input gradients, once for each file ``die-...`` of its folder."""

    folder: str = ""
    by: int = signal.SIGKILL

    def backward_input(self, params: Params, saved: Any, dy: Array, scope: nn.Scope) -> Array:
        for order in sorted(Path(self.folder).glob("die-*")):
            try:
                order.unlink()
            except FileNotFoundError:  # another worker took it
                continue
            os.kill(os.getpid(), self.by)
        return super().backward_input(params, saved, dy, scope)


@nn.register_layer("test_process_loud")
@dataclass(frozen=True)
class Loud(nn.ReLU):
    """Prints, as somebody who looks for an error would."""

    def forward(self, params: Params, x: Array, scope: nn.Scope) -> tuple[Array, Any]:
        print("a layer was here", flush=True)  # noqa: T201 - it is what the layer is for
        return super().forward(params, x, scope)


class OddError(Exception):
    """One that is not rebuilt where the work is awaited."""


@nn.register_layer("test_process_failing")
@dataclass(frozen=True)
class Failing(nn.ReLU):
    """Raises in its forward pass."""

    error: str = "odd"

    def forward(self, params: Params, x: Array, scope: nn.Scope) -> tuple[Array, Any]:
        raise {"odd": OddError, "value": ValueError, "stop": StopIteration}[self.error]("no such luck")
