"""One step of training: cut the batch, compute, reduce in microbatch order, update."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from typing import TypeVar

import numpy as np

from asynctrain.arena import Arena
from asynctrain.errors import DivergenceError, WeightlessBatchError
from asynctrain.executors.base import Session
from asynctrain.nn.model import Model
from asynctrain.optim.apply import bound, measured, update_into
from asynctrain.optim.transforms import Optimizer, rescaled
from asynctrain.train.state import TrainState
from asynctrain.types import Batch, GradientResult, GradientWork, Params, Sums

T = TypeVar("T")

PART = 2**16  # elements, at least, that are worth a job of their own
QUICK = 2**20  # elements: up to here a pass over them takes half a millisecond, and handing parts to threads no less
PASSES = 4  # over the parameters that an update is counted as


def cut(samples: int, microbatch: int) -> list[slice]:
    """Cut a batch into ceil(samples / microbatch) parts whose sizes differ by at most one."""
    parts = -(-samples // microbatch)
    return [slice(start, stop) for start, stop in pairwise(samples * i // parts for i in range(parts + 1))]


@dataclass(frozen=True, slots=True)
class _Part:
    """Layers that are reduced and updated by one job: their names, and their stretch of the vector."""

    names: tuple[str, ...]
    stretch: slice


def _parts(params: Arena, count: int) -> list[_Part]:
    """Divide the parameters, in their order, into about ``count`` parts of at least ``PART`` elements.

    The last may be smaller. How many there are changes no bit.
    """
    least = max(PART, params.layout.size // count)
    parts: list[_Part] = []
    names: list[str] = []
    start = 0
    for name, offset in params.layout.offsets.items():
        if offset - start >= least:
            parts.append(_Part(tuple(names), slice(start, offset)))
            names, start = [], offset
        names.append(name)
    return [*parts, _Part(tuple(names), slice(start, params.layout.size))]


def _as_one(arena: Arena, part: _Part) -> Params:
    return {"all": arena.vector[part.stretch]}


def _work(step: int, microbatch: int, of: int, batch: Batch, piece: slice) -> GradientWork:
    weights = None if batch.weights is None else batch.weights[piece]
    return GradientWork(step, microbatch, of, batch.images[piece], batch.labels[piece], weights)


class TrainStep:
    """Applies batches to a state.

    There are two sets of arrays: a step reads the one and writes the other. So a state stays as it is while the next
    one is made, and a step that fails or is cancelled has changed nothing.

    Args:
        model: that is trained.
        session: where gradients are computed.
        optimizer: a pair of pure functions.
        microbatch: the largest number of samples in one piece of work, at least 1.
        threads: where the layers of a large model are reduced and updated, each part a job.
    """

    def __init__(
        self, model: Model, session: Session, optimizer: Optimizer, microbatch: int, threads: ThreadPoolExecutor
    ) -> None:
        self._model = model
        self._session = session
        self._optimizer = optimizer
        self._microbatch = microbatch
        self._threads = threads
        self._rescaled: tuple[float, Optimizer] | None = None  # and by what

    async def begin(self, state: TrainState) -> TrainState:
        """Return ``state`` in arrays of this object's own, broadcast and ready for the first step."""
        self._parts = _parts(state.params, os.cpu_count() or 1)
        self._handed_out = False
        self._gradients = state.params.layout.empty()
        self._statistics = self._model.statistics_layout.empty()
        self._spare = state.writable_copy()
        state = state.writable_copy()
        await self._session.broadcast(state.params, state.model_state, state.step)
        return state

    async def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        """Return the state after ``batch``, broadcast, and the batch's sums.

        ``state`` is the one that was returned last; its arrays are written again by the step after this one.

        Raises:
            DivergenceError: the loss or a gradient is not finite.
            WeightlessBatchError: the samples' weights sum to 0.
        """
        sums = await self._reduced_gradients(state, batch)
        squares = await self._for_each_part(self._sum_of_squares)
        if not math.isfinite(sums.loss) or not math.isfinite(sum(squares)):
            raise DivergenceError(state.step + 1, sums.mean_loss, batch.sources)
        if not sums.weight:
            raise WeightlessBatchError(state.step + 1)
        await self._update(state, 1.0 / sums.weight)
        self._model.fold(state.model_state, self._statistics, sums.samples, self._spare.model_state)
        following = replace(
            state,
            params=self._spare.params,
            model_state=self._spare.model_state,
            optimizer_state=self._spare.optimizer_state,
            step=state.step + 1,
            cursor=batch.cursor,
        )
        self._spare = state.writable_like() if self._handed_out else state
        self._handed_out = False
        await self._session.broadcast(following.params, following.model_state, following.step)
        return following, sums

    def hand_out(self, state: TrainState) -> TrainState:
        """Return ``state``, the one that was returned last, read-only and for ever: no step writes its arrays again.

        Nothing is copied: the step after the next one gets other arrays to write.
        """
        self._handed_out = True
        return state.read_only()

    async def _reduced_gradients(self, state: TrainState, batch: Batch) -> Sums:
        """Leave the batch's summed gradients and statistics in ``self._gradients`` and ``self._statistics``.

        Each microbatch waits for its turn to be added, so the order of additions is the order of microbatches whichever
        is computed first. The tasks are gathered because cancelling a gather cancels all of them in the same call.
        """
        pieces = cut(len(batch.images), self._microbatch)
        turns = [asyncio.Event() for _ in range(len(pieces) + 1)]
        turns[0].set()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._microbatch_gradients(work, turns[i], turns[i + 1]), name=f"microbatch-{i}")
                for i, piece in enumerate(pieces)
                for work in [_work(state.step, i, len(pieces), batch, piece)]
            ]
            return sum(await asyncio.gather(*tasks), start=Sums())

    async def _microbatch_gradients(self, work: GradientWork, turn: asyncio.Event, following: asyncio.Event) -> Sums:
        result = await self._session.compute(work, version=work.step)
        await turn.wait()
        await self._for_each_part(partial(self._add, result, work.microbatch == 0))
        if work.microbatch == 0:
            self._statistics.assign(result.statistics)
        else:
            self._statistics.vector += result.statistics.vector
        result.release()
        following.set()
        return result.sums

    async def _for_each_part(self, function: Callable[[_Part], T], passes: int = 1) -> list[T]:
        """Gather ``function`` of each part, in threads where that many passes over the parameters take a while."""
        if len(self._parts) == 1 or passes * self._gradients.layout.size <= QUICK:
            return [function(part) for part in self._parts]
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(self._threads, function, part) for part in self._parts))

    def _add(self, result: GradientResult, is_first: bool, part: _Part) -> None:
        total, addend = self._gradients.vector[part.stretch], result.gradients.vector[part.stretch]
        if is_first:
            np.copyto(total, addend)
        else:
            np.add(total, addend, out=total)

    @np.errstate(over="ignore", invalid="ignore")  # what is not finite is told by an error of its own
    def _sum_of_squares(self, part: _Part) -> float:
        stretch = self._gradients.vector[part.stretch]
        return float(np.dot(stretch, stretch))

    async def _update(self, state: TrainState, scale: float) -> None:
        """Write parameters and optimizer state after the gradients times ``scale`` into ``self._spare``."""
        optimizer = self._optimizer_at(state.learning_rate_scale)
        if optimizer.reduction:
            measures = await self._for_each_part(partial(self._measure_part, state, scale))
            optimizer = bound(optimizer, chain.from_iterable(measures))
        await self._for_each_part(partial(self._update_part, optimizer, state, scale), PASSES)

    def _optimizer_at(self, learning_rate_scale: float) -> Optimizer:
        if self._rescaled is None or self._rescaled[0] != learning_rate_scale:
            plain = learning_rate_scale == 1.0
            optimizer = self._optimizer if plain else rescaled(self._optimizer, learning_rate_scale)
            self._rescaled = learning_rate_scale, optimizer
        return self._rescaled[1]

    def _measure_part(self, state: TrainState, scale: float, part: _Part) -> list[Sequence[float]]:
        return measured(
            self._optimizer_at(state.learning_rate_scale),
            part.names,
            state.params,
            self._gradients,
            state.optimizer_state,
            state.step,
            scale,
        )

    def _update_part(self, optimizer: Optimizer, state: TrainState, scale: float, part: _Part) -> None:
        after = self._spare
        names: tuple[str, ...] = part.names
        params: list[Params] = [state.params, self._gradients, after.params]
        slots: list[Mapping[str, Params]] = [state.optimizer_state, after.optimizer_state]
        if optimizer.uniform:  # then the part is as good as one array, and there is one call where there were many
            names = ("all",)
            params = [_as_one(arena, part) for arena in (state.params, self._gradients, after.params)]
            slots = [
                {slot: _as_one(arena, part) for slot, arena in arenas.items()}
                for arenas in (state.optimizer_state, after.optimizer_state)
            ]
        before, gradients, params_after = params
        update_into(optimizer, names, before, gradients, slots[0], state.step, params_after, slots[1], scale=scale)
