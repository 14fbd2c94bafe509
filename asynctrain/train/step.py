"""One step of training: cut the batch, compute, reduce in microbatch order, update."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TypeVar

import numpy as np

from asynctrain._aio import in_thread
from asynctrain.arena import Arena
from asynctrain.errors import DivergenceError, ExecutorError, WeightlessBatchError
from asynctrain.executors.base import Session
from asynctrain.nn.model import Model
from asynctrain.optim.apply import BLOCK, bound, measured, update_into
from asynctrain.optim.transforms import Optimizer, rescaled
from asynctrain.train.state import TrainState
from asynctrain.types import Batch, GradientResult, GradientWork, Params, Sums, cut

T = TypeVar("T")

_quiet = np.errstate(over="ignore", invalid="ignore")  # what is not finite is told by an error of its own

PART = 2**20  # elements, at least, that are worth a job of their own: threads in short numpy calls wait for each other
QUICK = 2**20  # elements: up to here a pass over them takes half a millisecond, and handing parts to threads no less
PASSES = 4  # over the parameters that an update is counted as


@dataclass(frozen=True, slots=True)
class _Part:
    """Layers that are reduced and updated by one job: their names, and their stretch of the vector."""

    names: tuple[str, ...]
    stretch: slice

    def blocks(self) -> Iterator[_Part]:
        """Yield stretches that stay in the cache; of no use to those who need names."""
        for start in range(self.stretch.start, self.stretch.stop, BLOCK):
            yield _Part((), slice(start, min(start + BLOCK, self.stretch.stop)))


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


class _Gathered:
    """The results of a step's microbatches, taken in their order.

    They are added up in the arrays of the first; the last one waits to be added when the update passes over them.
    """

    def __init__(self) -> None:
        self.sums = Sums()
        self.last: GradientResult | None = None
        self._first: GradientResult | None = None

    def take(self, result: GradientResult) -> None:
        """Take the next result; the one that was the last has been added by then."""
        self.sums += result.sums
        if self._first is None:
            self._first = result
            return
        if self.last is not None:
            self.last.release()
        self.last = result

    @property
    def total(self) -> Arena:
        """The sum, which lacks the last result where that is not yet added."""
        assert self._first is not None  # noqa: S101 - a batch has a microbatch
        return self._first.gradients

    def add_last(self, part: _Part) -> None:
        """Add a part of the result that was taken last."""
        if self.last is not None:
            total = self.total.vector[part.stretch]
            np.add(total, self.last.gradients.vector[part.stretch], out=total)

    def complete(self, part: _Part) -> float:
        """Add the same, and return the sum of squares of the part's gradients."""
        self.add_last(part)
        total = self.total.vector[part.stretch]
        return float(np.dot(total, total))

    def release(self) -> None:
        """Give the arrays back to the session they came from."""
        for result in (self._first, self.last):
            if result is not None:
                result.release()


class TrainStep:
    """Applies batches to a state.

    There are two sets of arrays: a step reads the one and writes the other. So a state stays as it is while the next
    one is made, and a step that fails or is cancelled has changed nothing.

    Args:
        model: that is trained.
        session: where gradients are computed.
        optimizer: a pair of pure functions.
        microbatch: the largest number of samples in one piece of work, at least 1; None for the default of ``cut``.
        threads: where the layers of a large model are reduced and updated, each part a job.
    """

    def __init__(
        self, model: Model, session: Session, optimizer: Optimizer, microbatch: int | None, threads: ThreadPoolExecutor
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
        self._size = state.params.layout.size
        self._statistics = self._model.statistics_layout.empty()
        self._spare, state = await in_thread(lambda: (state.writable_like(), state.writable_copy()))
        await self._session.broadcast(state.params, state.model_state, state.step)
        return state

    async def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        """Return the state after ``batch``, broadcast, and the batch's sums.

        ``state`` is the one that was returned last; its arrays are written again by the step after this one.

        Raises:
            DivergenceError: the loss or a gradient is not finite.
            ExecutorError: the session failed, or its results are not those of all samples of the batch.
            WeightlessBatchError: the samples' weights sum to 0.
        """
        gathered = _Gathered()
        try:
            await self._gather(state, batch, gathered)
            sums = gathered.sums
            if sums.samples != batch.samples:
                told = f"returned the gradients of {sums.samples} samples for a batch of {batch.samples}"
                raise ExecutorError("the session", told)
            squares = await self._update(state, gathered)
        finally:
            gathered.release()
        if not math.isfinite(sums.loss) or not math.isfinite(squares):
            raise DivergenceError(state.step + 1, sums.mean_loss, batch.sources)
        if not sums.weight:
            raise WeightlessBatchError(state.step + 1)
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

    async def _gather(self, state: TrainState, batch: Batch, gathered: _Gathered) -> None:
        """Have ``gathered`` take the gradients of the batch's microbatches, and add up its statistics in an array here.

        Each microbatch waits for its turn to be added, so the order of additions is the order of microbatches whichever
        is computed first. The tasks are gathered because cancelling a gather cancels all of them in the same call.
        """
        pieces = cut(len(batch.images), self._microbatch)
        turns = [asyncio.Event() for _ in range(len(pieces) + 1)]
        turns[0].set()
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._microbatch_gradients(work, gathered, *turns[i : i + 2]), name=f"microbatch-{i}")
                for i, piece in enumerate(pieces)
                for work in [_work(state.step, i, len(pieces), batch, piece)]
            ]
            await asyncio.gather(*tasks)

    async def _microbatch_gradients(
        self, work: GradientWork, gathered: _Gathered, turn: asyncio.Event, following: asyncio.Event
    ) -> None:
        result = await self._session.compute(work, version=work.step)
        try:
            await turn.wait()
            if gathered.last:
                await self._for_each_part(gathered.add_last)
        except BaseException:
            result.release()
            raise
        if work.microbatch == 0:
            self._statistics.assign(result.statistics)
        else:
            self._statistics.vector += result.statistics.vector
        gathered.take(result)
        following.set()

    async def _for_each_part(self, function: Callable[[_Part], T], passes: int = 1) -> list[T]:
        """Gather ``function`` of each part, in threads where that many passes over the parameters take a while."""
        if passes * self._size <= QUICK:
            return [function(part) for part in self._parts]
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(self._threads, function, part) for part in self._parts))

    async def _update(self, state: TrainState, gathered: _Gathered) -> float:
        """Write parameters and optimizer state after the mean gradients into ``self._spare``.

        Returns the sum of their squares: where that is not finite, what was written means nothing.
        """
        optimizer = self._optimizer_at(state.learning_rate_scale)
        scale = 1.0 / gathered.sums.weight if gathered.sums.weight else 0.0
        if optimizer.reduction is None:  # all in one go, while the gradients are in the cache
            return sum(await self._for_each_part(partial(self._finish_part, optimizer, state, gathered, scale), PASSES))
        measures = await self._for_each_part(partial(self._measure_part, optimizer, state, gathered, scale), PASSES)
        given = bound(optimizer, chain.from_iterable(of_part for _, of_part in measures))
        await self._for_each_part(partial(self._update_part, given, state, gathered.total, scale), PASSES)
        return sum(squares for squares, _ in measures)

    def _optimizer_at(self, learning_rate_scale: float) -> Optimizer:
        if self._rescaled is None or self._rescaled[0] != learning_rate_scale:
            plain = learning_rate_scale == 1.0
            optimizer = self._optimizer if plain else rescaled(self._optimizer, learning_rate_scale)
            self._rescaled = learning_rate_scale, optimizer
        return self._rescaled[1]

    @_quiet
    def _finish_part(
        self, optimizer: Optimizer, state: TrainState, gathered: _Gathered, scale: float, part: _Part
    ) -> float:
        squares = 0.0
        for piece in part.blocks() if optimizer.uniform else [part]:
            squares += gathered.complete(piece)
            self._update_part(optimizer, state, gathered.total, scale, piece)
        return squares

    @_quiet
    def _measure_part(
        self, optimizer: Optimizer, state: TrainState, gathered: _Gathered, scale: float, part: _Part
    ) -> tuple[float, list[Sequence[float]]]:
        squares = gathered.complete(part)
        slots = state.optimizer_state
        return squares, measured(optimizer, part.names, state.params, gathered.total, slots, state.step, scale)

    @_quiet
    def _update_part(self, optimizer: Optimizer, state: TrainState, total: Arena, scale: float, part: _Part) -> None:
        after = self._spare
        names: tuple[str, ...] = part.names
        params: list[Params] = [state.params, total, after.params]
        slots: list[Mapping[str, Params]] = [state.optimizer_state, after.optimizer_state]
        if optimizer.uniform:  # then the part is as good as one array, and there is one call where there were many
            names = ("all",)
            params = [_as_one(arena, part) for arena in (state.params, total, after.params)]
            slots = [
                {slot: _as_one(arena, part) for slot, arena in arenas.items()}
                for arenas in (state.optimizer_state, after.optimizer_state)
            ]
        before, gradients, params_after = params
        update_into(optimizer, names, before, gradients, slots[0], state.step, params_after, slots[1], scale=scale)
