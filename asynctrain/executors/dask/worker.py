"""What runs on a Dask worker: functions that Dask calls there, and the values that it carries.

What is beside this is the client's side. Dask itself moves the values, with pickle, between processes that
have the same packages; arrays travel beside the pickle, uncopied, and may arrive at any offset of a larger buffer.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from distributed import get_worker

from asynctrain._aio import in_thread
from asynctrain.arena import ALIGNMENT, Arena, Array, Layout, Shape, aligned_empty
from asynctrain.errors import FingerprintError
from asynctrain.executors import remote
from asynctrain.executors.blas import Library, find_blas, one_blas_thread
from asynctrain.executors.fingerprint import numeric_fingerprint, require_same
from asynctrain.executors.worker import GradientWorker, Sheet, StopFlag, Stopped
from asynctrain.nn.model import Model
from asynctrain.types import JSON, ForwardResult, ForwardWork, GradientWork, Program, Sums

Work = TypeVar("Work", bound=GradientWork | ForwardWork)

KEPT = 4  # programs whose arrays a worker keeps at hand
REMEMBERED = 64  # sessions that were left
PAUSE = 0.005  # seconds between two looks at whether computing has ended


def aligned(vector: Array) -> Array:
    """Return the one-dimensional ``vector``, copied where it does not begin at a multiple of 64 bytes."""
    if vector.ctypes.data % ALIGNMENT == 0 and vector.flags.c_contiguous:
        return vector
    copy = aligned_empty(vector.shape, vector.dtype)
    np.copyto(copy, vector)
    return copy


@dataclass(frozen=True, slots=True)
class Packed:
    """An arena as it travels: names and shapes, and the vector, which pickle hands on without a copy."""

    shapes: Mapping[str, Shape]
    vector: Array

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Packed:
        """Return ``arrays`` packed; an arena is not copied."""
        arena = arrays if isinstance(arrays, Arena) else Arena.of(arrays)
        return cls(dict(arena.layout.shapes), arena.vector)

    def unpacked(self) -> Arena:
        """Return the arena, over memory that begins at a multiple of 64 bytes."""
        return Arena(Layout(self.shapes, self.vector.dtype), aligned(self.vector))


class Edition:
    """The parameters of one version and all that a worker must know to compute with them.

    Args:
        session: the name of the session that it belongs to.
        program: as JSON text.
        fingerprint: the numeric one that every worker of the session has.
        params: the parameters.
        model_state: the running statistics.
    """

    def __init__(
        self, session: str, program: str, fingerprint: Mapping[str, str], params: Packed, model_state: Packed
    ) -> None:
        self.session = session
        self.program = program
        self.fingerprint = fingerprint
        self._packed = params, model_state
        self.params = params.unpacked()
        self.model_state = model_state.unpacked()

    def __reduce__(self) -> tuple[type[Edition], tuple[Any, ...]]:
        return Edition, (self.session, self.program, self.fingerprint, *self._packed)

    def __sizeof__(self) -> int:  # by which Dask weighs moving it against waiting
        return sum(packed.vector.nbytes for packed in self._packed) + len(self.program)


@dataclass(frozen=True, slots=True)
class Summed:
    """What was computed of a ``GradientWork``: the vectors of its arenas, whose layouts the program tells."""

    gradients: Array
    statistics: Array
    sums: Sums

    def __sizeof__(self) -> int:
        return int(self.gradients.nbytes + self.statistics.nbytes)


@dataclass(frozen=True, slots=True)
class Foreign:
    """Nothing was computed: this worker would not give the bits of the others."""

    error: FingerprintError


@dataclass(frozen=True, slots=True)
class Failed:
    """The work raised an error; ``telling`` is what ``remote.rebuilt`` makes it from."""

    telling: JSON


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a piece of work at the worker ``address``; None where its session was closed meanwhile."""

    address: str
    value: Summed | ForwardResult | Foreign | Failed | None


@dataclass(frozen=True, slots=True)
class Introduction:
    """What a worker tells of itself: how much it computes at once, and its numeric fingerprint."""

    slots: int
    fingerprint: Mapping[str, str]


@dataclass(eq=False)
class _Place:
    """What this process keeps for one program, for which sessions, and what it computes for each at the moment."""

    worker: GradientWorker
    layouts: tuple[Layout, Layout]  # of gradients and statistics
    fingerprint: Mapping[str, str]
    libraries: list[Library]
    sessions: set[str] = field(default_factory=set)
    running: dict[StopFlag, str] = field(default_factory=dict)

    @classmethod
    def ready(cls, text: str) -> _Place:
        """Return a place whose first work finds everything imported and compiled; this may take seconds.

        The text is JSON: the program, and the modules that register layers of its own.
        """
        told = json.loads(text)
        for module in told["modules"]:
            import_module(module)
        program = Program.from_json(told["program"])
        worker = GradientWorker(program)
        worker.warm_up()
        model = Model.from_json(program.architecture)
        layouts = model.layout(program.dtype), model.statistics_layout
        return cls(worker, layouts, numeric_fingerprint(program.kernels), find_blas())


# Of the process, because that is all a task that is pinned to no worker finds when it comes there. Bounded, for a
# driver that was killed cannot say that it needs a program no more.
_places: OrderedDict[str, _Place] = OrderedDict()
_left: OrderedDict[str, None] = OrderedDict()  # sessions; what Dask still has of their work is not begun
_places_lock = Lock()


def _place_for(program: str, session: str) -> _Place:
    with _places_lock:
        if session in _left:
            raise Stopped
        if program not in _places:
            _places[program] = _Place.ready(program)
        _places.move_to_end(program)
        while len(_places) > KEPT:
            _places.popitem(last=False)
        _places[program].sessions.add(session)
        return _places[program]


def compute(edition: Edition, work: GradientWork | ForwardWork) -> Outcome:
    """Compute ``work`` with the parameters of ``edition``, on one BLAS thread. The task of each microbatch."""
    return Outcome(get_worker().address, _attempted(edition, work))


def _attempted(edition: Edition, work: GradientWork | ForwardWork) -> Summed | ForwardResult | Foreign | Failed | None:
    stop = StopFlag()
    try:
        place = _place_for(edition.program, edition.session)
        require_same(edition.fingerprint, place.fingerprint)
        place.running[stop] = edition.session
        try:
            with one_blas_thread(place.libraries):
                return _computed(place, edition, _in_place(work), stop)
        finally:
            del place.running[stop]
    except Stopped:
        return None
    except FingerprintError as error:
        return Foreign(error)
    except Exception as error:
        return Failed(remote.told(error))


def _computed(
    place: _Place, edition: Edition, work: GradientWork | ForwardWork, stop: StopFlag
) -> Summed | ForwardResult:
    if isinstance(work, ForwardWork):
        return place.worker.forward(edition.params, edition.model_state, work, stop)
    into = Sheet(*(layout.empty() for layout in place.layouts))  # new ones: Dask keeps them until they are fetched
    result = place.worker.gradients(edition.params, work, stop, into=into)
    return Summed(into.gradients.vector, into.statistics.vector, result.sums)


def _in_place(work: Work) -> Work:
    """Return ``work`` with arrays that are copied where their elements do not begin at multiples of their size."""
    arrays = {name: getattr(work, name) for name in ("images", "labels", "weights")}
    aligned = {name: np.require(array, requirements=["C", "A"]) for name, array in arrays.items() if array is not None}
    return replace(work, **aligned)


async def introduce(session: str, program: str, dask_worker: Any) -> Introduction:
    """Make this worker ready for ``program``; ``dask_worker`` is handed in by Dask."""
    place = await in_thread(_place_for, program, session)
    return Introduction(dask_worker.state.nthreads, place.fingerprint)


def _forget(session: str, program: str) -> _Place | None:
    """Begin no more work of ``session``, and return where it was computed, kept no longer unless for others."""
    with _places_lock:
        _left[session] = None
        while len(_left) > REMEMBERED:
            _left.popitem(last=False)
        place = _places.get(program)
        if place is not None:
            place.sessions.discard(session)
            if not place.sessions:
                del _places[program]
        return place


async def ping() -> None:
    """Answer: a worker that does is not frozen, however busy its kernels are."""


async def leave(session: str, program: str, grace: float) -> None:
    """Stop what is computed for ``session`` and wait for that, at most ``grace`` seconds; let go of the arrays."""
    place = await in_thread(_forget, session, program)  # the lock is held while kernels are compiled
    if place is None:
        return
    for stop in _of(place, session):
        stop.set()
    loop = asyncio.get_running_loop()
    end = loop.time() + grace
    while _of(place, session) and loop.time() < end:  # noqa: ASYNC110 - it ends in a thread, which knows no event
        await asyncio.sleep(PAUSE)


def _of(place: _Place, session: str) -> list[StopFlag]:
    return [stop for stop, owner in list(place.running.items()) if owner == session]
