"""What the service answers to a request that it does not fulfil."""

from __future__ import annotations

from grpc import StatusCode

from asynctrain.errors import AsyncTrainError


class Refused(AsyncTrainError):  # noqa: N818 - the name says what happened
    """A request is refused. ``code`` is the status it is answered with, ``detail`` one sentence for the client."""

    def __init__(self, code: StatusCode, detail: str) -> None:
        self.code = code
        self.detail = detail
        super().__init__(f"{code.name}: {detail}")

    def __reduce__(self) -> tuple[type[Refused], tuple[StatusCode, str]]:
        return type(self), (self.code, self.detail)


def invalid(detail: str) -> Refused:
    """Return the refusal of a message that does not say what it must."""
    return Refused(StatusCode.INVALID_ARGUMENT, detail)


def exhausted(detail: str) -> Refused:
    """Return the refusal of what is beyond a limit."""
    return Refused(StatusCode.RESOURCE_EXHAUSTED, detail)


def unfit(detail: str) -> Refused:
    """Return the refusal of what the state of a run does not permit."""
    return Refused(StatusCode.FAILED_PRECONDITION, detail)


def require_at_most(limit: int, value: int, what: str) -> None:
    """Raise ``Refused`` if ``value`` is beyond its limit; ``what`` names it: ``"classes"``, ``"bytes of a run"``."""
    if value > limit:
        raise exhausted(f"{value:,} {what} are more than the limit of {limit:,}")
