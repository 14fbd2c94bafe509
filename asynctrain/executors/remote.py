"""An error of the work, from where it was raised to where it is awaited: told as JSON there, rebuilt here."""

from __future__ import annotations

import builtins
import traceback

from asynctrain.errors import RemoteError
from asynctrain.types import JSON

NEVER_RAISED = (StopIteration, StopAsyncIteration)  # out of a coroutine: they mean something else there


def told(error: Exception) -> JSON:
    """Return what ``rebuilt`` makes an error from."""
    return {
        "kind": type(error).__name__,
        "text": str(error),
        "argument": error.args[0] if len(error.args) == 1 and isinstance(error.args[0], str) else None,
        "traceback": "".join(traceback.format_exception(error)),
    }


def rebuilt(telling: JSON, address: str) -> Exception:
    """Return the error that ``told`` described, the traceback there as its note.

    A built-in exception of one string is one again, everything else is a ``RemoteError`` of ``address``.
    """
    kind = getattr(builtins, telling["kind"], None)
    if (
        telling["argument"] is not None
        and isinstance(kind, type)
        and issubclass(kind, Exception)
        and not issubclass(kind, NEVER_RAISED)
    ):
        error: Exception = kind(telling["argument"])
        error.add_note(f"raised at {address}:\n{telling['traceback'].rstrip()}")
        return error
    return RemoteError(address, f"{telling['kind']}: {telling['text']}", telling["traceback"])
