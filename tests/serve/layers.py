"""Layers for tests of the service, by which one sees from outside whether it computes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

from asynctrain import nn
from asynctrain.arena import Array
from asynctrain.types import Params

SECONDS = 0.2


@nn.register_layer("test_served_slow")
@dataclass(frozen=True)
class Slow(nn.ReLU):
    """Takes its time in each forward pass. passes: when each of them was done."""

    passes: ClassVar[list[float]] = []

    def forward(self, params: Params, x: Array, scope: nn.Scope) -> tuple[Array, Any]:
        time.sleep(SECONDS)
        self.passes.append(time.monotonic())
        return super().forward(params, x, scope)
