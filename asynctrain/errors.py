"""The error tree: facts are attributes, the message is one sentence.

Wrong arguments are plain ``ValueError`` or ``TypeError``; everything else that asynctrain raises derives from
``AsyncTrainError``. Errors of other libraries are translated once, where that library is called, cause attached.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath

TOLD = 4  # names in a message that could have many


class AsyncTrainError(Exception):
    """The root of all errors that asynctrain raises, wrong arguments aside."""


class DataError(AsyncTrainError):
    """Something is wrong with the data at ``path``: a file, a folder, or the name of a record (``array[17]``)."""

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        self.path = fspath(path)
        self.reason = reason
        super().__init__(f"{self.path}: {reason}")

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


class ReadError(DataError):
    """The bytes of a record could not be read."""


class DecodeError(DataError):
    """The bytes of a record are no image that may be decoded."""


class TooManyBadSamples(DataError):  # noqa: N818 - the name says what is wrong
    """More samples were skipped than the budget allows; ``path`` is the last of them."""


class ExecutorError(AsyncTrainError):
    """A home of gradient workers failed; ``address`` says which (``threads:2``, ``host:port``)."""

    def __init__(self, address: str, reason: str) -> None:
        self.address = address
        self.reason = reason
        super().__init__(f"{address}: {reason}")

    def __reduce__(self) -> tuple[type[ExecutorError], tuple[str, str]]:
        return type(self), (self.address, self.reason)


class WorkerLostError(ExecutorError):
    """The worker or home at ``address`` is gone, and its work with it, which may be done elsewhere."""


class RemoteError(ExecutorError):
    """The work itself failed at ``address``; ``traceback_text`` is where, as that process told it."""

    def __init__(self, address: str, reason: str, traceback_text: str) -> None:
        self.traceback_text = traceback_text
        super().__init__(address, reason)
        self.add_note(traceback_text.rstrip())

    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str, str]]:  # type: ignore[override]
        return type(self), (self.address, self.reason, self.traceback_text)


class StaleParametersError(ExecutorError):
    """A session was asked to compute with a version of the parameters that it does not hold."""

    def __init__(self, address: str, have: int | None, want: int) -> None:
        self.have = have
        self.want = want
        super().__init__(address, f"has parameters of version {have}, was asked for version {want}")

    def __reduce__(self) -> tuple[type[StaleParametersError], tuple[str, int | None, int]]:  # type: ignore[override]
        return type(self), (self.address, self.have, self.want)


class DivergenceError(AsyncTrainError):
    """The loss or a gradient is not finite at ``step``; the state of the step before it is intact.

    ``sources`` are the names of the samples that were in its batch.
    """

    def __init__(self, step: int, loss: float, sources: Sequence[str] = ()) -> None:
        self.step = step
        self.loss = loss
        self.sources = tuple(sources)
        told = ", ".join(self.sources[:TOLD]) + (f" and {len(sources) - TOLD} more" if len(sources) > TOLD else "")
        super().__init__(
            f"training diverged at step {step}: the loss is {loss} or a gradient is not finite; "
            "a lower learning rate or gradient clipping usually helps" + (f"; the batch was {told}" if told else "")
        )

    def __reduce__(self) -> tuple[type[DivergenceError], tuple[int, float, tuple[str, ...]]]:
        return type(self), (self.step, self.loss, self.sources)


class WeightlessBatchError(AsyncTrainError):
    """No sample of the batch of ``step`` weighs anything, so its loss has no mean; the state before it is intact."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(
            f"the batch of step {step} has a total weight of 0: all its labels are ignored or of classes that weigh 0"
        )

    def __reduce__(self) -> tuple[type[WeightlessBatchError], tuple[int]]:
        return type(self), (self.step,)


class CheckpointError(AsyncTrainError):
    """The file at ``path`` is torn, foreign, of another version, or does not fit."""

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        self.path = fspath(path)
        self.reason = reason
        super().__init__(f"{self.path}: {reason}")

    def __reduce__(self) -> tuple[type[CheckpointError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


class FingerprintError(AsyncTrainError):
    """Two numeric fingerprints differ, so that the bits would too; ``differences`` maps each key to (ours, theirs)."""

    def __init__(self, differences: dict[str, tuple[object, object]]) -> None:
        self.differences = differences
        told = "; ".join(f"{key} is {ours!r} here and {theirs!r} there" for key, (ours, theirs) in differences.items())
        super().__init__(f"the same bits cannot be promised: {told}")

    def __reduce__(self) -> tuple[type[FingerprintError], tuple[dict[str, tuple[object, object]]]]:
        return type(self), (self.differences,)


class ClosedError(AsyncTrainError):
    """Something was used after its ``aclose()``."""
