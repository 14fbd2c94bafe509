"""What is run by a worker of somebody's ``concurrent.futures`` pool: module-level functions on plain values.

The parameters that a session has sent are kept here, by session and edition, so that they need not travel with every
microbatch. A worker that has not got them says so, and is sent them along with the work.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache

from asynctrain.arena import Arena, Array
from asynctrain.errors import FingerprintError
from asynctrain.executors import remote
from asynctrain.executors.blas import find_blas, one_blas_thread
from asynctrain.executors.fingerprint import numeric_fingerprint, require_same
from asynctrain.executors.worker import GradientWorker, StopFlag, Stopped
from asynctrain.types import JSON, ForwardResult, ForwardWork, GradientResult, GradientWork, Params, Program, Sums

KEPT = 4  # sessions whose parameters a worker keeps; a pool does not tell it when one has ended


@dataclass(frozen=True, slots=True)
class Kept:
    """What a worker has of a session.

    pid: of the process it was made in, for forks inherit what is not theirs. lends: whether that is the session's own
    process, where results need not be copied and errors arrive as they are.
    """

    worker: GradientWorker
    edition: int
    params: Params
    model_state: Params
    pid: int
    lends: bool


@dataclass(frozen=True, slots=True)
class Sent:
    """All that a worker must have to compute for a session, as it travels."""

    program: Program
    params: Mapping[str, Array]
    model_state: Mapping[str, Array]
    fingerprint: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Lacking:
    """The worker has not got the parameters that it was to compute with."""


@dataclass(frozen=True, slots=True)
class Summed:
    """A gradient result as it travels: the vectors of its arenas."""

    gradients: Array
    statistics: Array
    sums: Sums


@dataclass(frozen=True, slots=True)
class Failed:
    """The work raised an error; ``telling`` is what ``remote.rebuilt`` makes it from."""

    telling: JSON


@dataclass(frozen=True, slots=True)
class Foreign:
    """The worker would not give the bits of the others."""

    error: FingerprintError


Reply = GradientResult | ForwardResult | Summed | Lacking | Failed | Foreign

_kept: OrderedDict[str, Kept] = OrderedDict()  # of this process, like the pool's worker that it is


def keep(session: str, kept: Kept) -> None:
    """Have the parameters of ``session`` at hand in this process."""
    _kept[session] = kept
    while len(_kept) > KEPT and not next(iter(_kept.values())).lends:
        _kept.popitem(last=False)


def forget(session: str) -> None:
    """Let go of what this process has of ``session``."""
    _kept.pop(session, None)


def introduce(kernels: str) -> dict[str, str]:
    """Return the numeric fingerprint of the process that this runs in."""
    return numeric_fingerprint(kernels)


def compute(
    session: str, edition: int, work: GradientWork | ForwardWork, stop: StopFlag, sent: Sent | None = None
) -> Reply:
    """Compute ``work`` with the parameters of ``edition``, those just ``sent`` or those kept here."""
    kept = _kept.get(session)
    if kept is not None and kept.pid != os.getpid():
        kept = None
    if kept is not None and kept.lends:
        return _computed(kept, work, stop) if kept.edition == edition else Lacking()
    try:
        if sent is not None:
            kept = _unpacked(sent, edition, kept)
            keep(session, kept)
        if kept is None or kept.edition != edition:
            return Lacking()
        return _copied(_computed(kept, work, stop))
    except FingerprintError as error:
        return Foreign(error)
    except Stopped:  # told to stop before it was sent here
        raise
    except Exception as error:
        return Failed(remote.told(error))


def _computed(kept: Kept, work: GradientWork | ForwardWork, stop: StopFlag) -> GradientResult | ForwardResult:
    if isinstance(work, ForwardWork):
        return kept.worker.forward(kept.params, kept.model_state, work, stop)
    return kept.worker.gradients(kept.params, work, stop)


def _copied(result: GradientResult | ForwardResult) -> Summed | ForwardResult:
    """Return what may be pickled while the arrays of ``result`` are used again."""
    if isinstance(result, ForwardResult):
        return result
    summed = Summed(result.gradients.vector.copy(), result.statistics.vector.copy(), result.sums)
    result.release()
    return summed


def _unpacked(sent: Sent, edition: int, before: Kept | None) -> Kept:
    """Return what ``sent`` says, in aligned arrays; the worker of the edition ``before`` goes on working."""
    if before is None:
        require_same(sent.fingerprint, numeric_fingerprint(sent.program.kernels))
        _hold_blas()
    worker = GradientWorker(sent.program) if before is None else before.worker
    return Kept(worker, edition, Arena.of(sent.params), Arena.of(sent.model_state), os.getpid(), lends=False)


@cache
def _hold_blas() -> ExitStack:
    """Keep BLAS on one thread for the rest of this process's life."""
    stack = ExitStack()
    stack.enter_context(one_blas_thread(find_blas()))
    return stack
