"""The gradient worker: ``(program, params, work) -> result``. Synchronous, pure, and stopped between two layers.

Every home runs this same code, so every home gives the same bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from asynctrain.arena import Arena, Array
from asynctrain.executors.blas import check_one_blas_thread
from asynctrain.nn import losses
from asynctrain.nn.kernels import choice
from asynctrain.nn.model import Model
from asynctrain.nn.scope import Scope, Workspace
from asynctrain.randomness import Purpose, generator
from asynctrain.types import ForwardResult, ForwardWork, GradientResult, GradientWork, Params, Program, Sums

Job = Callable[[], None]


class Stopped(Exception):  # noqa: N818 - no error: the work was told to stop, and did
    """The stop flag was found set between two layers."""


class StopFlag:
    """A flag that one thread sets and the worker asks between layers."""

    __slots__ = ("_is_set",)

    def __init__(self) -> None:
        self._is_set = False

    def set(self) -> None:
        """Ask the work to stop before its next kernel."""
        self._is_set = True

    def check(self) -> None:
        """Raise ``Stopped`` if the flag is set."""
        if self._is_set:
            raise Stopped


_quiet = np.errstate(over="ignore", invalid="ignore")  # a loss that is not finite is told by the step


def _call(job: Job) -> None:
    job()


@dataclass(frozen=True, slots=True)
class Sheet:
    """The arrays that one result is written to: gradient sums and statistics."""

    gradients: Arena
    statistics: Arena


class GradientWorker:
    """Computes work for one program; may be used by several threads at once.

    What a pass scribbles on and what its result is written to are kept for reuse, as many of each as were ever needed
    at the same time, so that a steady step allocates nothing. Where the work failed or was stopped they are left to the
    garbage collector: a job of its own may still be writing to them.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._model = Model.from_json(program.architecture)
        self._layout = self._model.layout(program.dtype)
        self._loss = losses.from_json(program.loss)
        self._kernels = choice.get(program.kernels)
        self._workspaces: deque[Workspace] = deque()
        self._sheets: deque[Sheet] = deque()

    def warm_up(self) -> None:
        """Compile what the program's kernels would compile at their first use."""
        self._kernels.warm_up(self._program.dtype)

    @_quiet
    def gradients(
        self,
        params: Params,
        work: GradientWork,
        stop: StopFlag,
        emit: Callable[[Job], None] | None = None,
        into: Sheet | None = None,
    ) -> GradientResult:
        """Compute the gradient sums of one microbatch.

        Args:
            params: of the program's model.
            work: the microbatch.
            stop: asked before each layer's kernel; raises ``Stopped`` there.
            emit: takes the job that computes one layer's weight gradient. By default the job is done at once; it may
                also be done later or in another thread, with the same bits. The result is complete, and may be
                released, when every emitted job is done.
            into: what the result is written to, and who gave it may use it again without a ``release``; by default
                arrays of the worker's own.
        """
        check_one_blas_thread()
        workspace = self._take_workspace()
        sheet = into or self._take_sheet()
        rng = partial(generator, self._program.seed, Purpose.DROPOUT, work.step, work.microbatch)
        scope = Scope(
            workspace,
            train=True,
            rng=rng,
            check=stop.check,
            emit=_call if emit is None else (lambda job: emit(_quiet(job))),
            gradients=sheet.gradients,
            statistics=sheet.statistics,
            kernels=self._kernels,
        )
        outputs, saved = self._model.forward(params, self._normalized(work.images, scope), scope)
        loss = self._loss(outputs, work.labels, work.weights, scope.empty("loss", outputs.shape, outputs.dtype))
        self._model.backward(params, saved, loss.gradient, scope)
        if emit is None:
            self._workspaces.append(workspace)
            release = partial(self._sheets.append, sheet)
        else:
            release = partial(self._take_back, workspace, sheet)
        return GradientResult(sheet.gradients, _sums(loss, work.labels), sheet.statistics, release)

    @_quiet
    def forward(self, params: Params, state: Params, work: ForwardWork, stop: StopFlag) -> ForwardResult:
        """Compute the model's outputs with its running statistics, and the loss sums where there are labels."""
        check_one_blas_thread()
        workspace = self._take_workspace()
        scope = Scope(workspace, train=False, check=stop.check, state=state, kernels=self._kernels)
        outputs, _ = self._model.forward(params, self._normalized(work.images, scope), scope)
        outputs = outputs.copy()  # the workspace is about to be used again
        self._workspaces.append(workspace)
        if work.labels is None:
            return ForwardResult(outputs)
        return ForwardResult(outputs, _sums(self._loss(outputs, work.labels, work.weights), work.labels))

    def forget_arrays(self) -> None:
        """Let go of the arrays that are kept for reuse: there is nothing more to compute."""
        self._workspaces.clear()
        self._sheets.clear()

    def _take_workspace(self) -> Workspace:
        try:
            return self._workspaces.pop()
        except IndexError:
            return Workspace()

    def _take_sheet(self) -> Sheet:
        try:
            return self._sheets.pop()
        except IndexError:
            return Sheet(self._layout.empty(), self._model.statistics_layout.empty())

    def _take_back(self, workspace: Workspace, sheet: Sheet) -> None:
        self._workspaces.append(workspace)
        self._sheets.append(sheet)

    def _normalized(self, images: Array, scope: Scope) -> Array:
        """Return ``(pixel / 255 - mean) / std`` in the program's dtype."""
        if images.dtype != np.uint8 or not images.flags.c_contiguous:
            raise ValueError(f"images must be C-contiguous uint8, got {images.dtype} with strides {images.strides}")
        normalization = self._program.normalization
        x = scope.empty("images", images.shape, np.dtype(self._program.dtype))
        np.copyto(x, images)
        x *= 1.0 / (255.0 * normalization.std)
        x -= normalization.mean / normalization.std
        return x


def _sums(loss: losses.Loss, labels: Array) -> Sums:
    counts = {"correct": float(loss.correct), "judged": float(loss.judged)}
    return Sums(loss.value, loss.weight, len(labels), counts)
