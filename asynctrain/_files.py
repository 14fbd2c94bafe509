"""Files that are whole or absent, and files that one holds at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import BinaryIO

PIECE = 4 * 2**20  # bytes between two questions whether to stop


def write_whole(
    path: Path, content: bytes | Sequence[bytes | memoryview], stopped: Callable[[], bool] = lambda: False
) -> None:
    """Write ``content``, whose parts may be views, to ``path``: a crash leaves the old file or the new one, whole.

    Blocks. Raises ``OSError`` that names ``path``; what was there before is then still there and nothing else is left
    behind. So it is where ``stopped`` says that nobody wants the file any more, but without an error.
    """
    try:
        _write_whole(path, [content] if isinstance(content, bytes) else content, stopped)
    except OSError as error:
        error.filename = str(path)  # of a full disk it names no file
        del error.filename2  # which is told as None where it is set to that
        raise


def _write_whole(path: Path, parts: Sequence[bytes | memoryview], stopped: Callable[[], bool]) -> None:
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as temporary:
        try:
            for piece in (part[start : start + PIECE] for part in parts for start in range(0, len(part), PIECE)):
                if stopped():
                    Path(temporary.name).unlink()
                    return
                temporary.write(piece)
            temporary.flush()
            os.fsync(temporary.fileno())
            Path(temporary.name).chmod(0o644)
            Path(temporary.name).replace(path)
        except BaseException:
            Path(temporary.name).unlink(missing_ok=True)
            raise  # closing the file may raise another, on a full disk for one
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename within ``folder`` outlast a power cut, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_held: set[BinaryIO] = set()  # by this process


def hold(path: Path) -> ExitStack:
    """Have the file, made where there is none, to oneself until what is returned is closed or the process has ended.

    Raises ``BlockingIOError`` where somebody else holds it. Where the system or its files know no locks, anybody may.
    """
    with ExitStack() as stack:
        file = stack.enter_context(path.open("ab"))
        _held.add(file)
        stack.callback(_held.discard, file)
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError:
                pass  # a file system without locks
        return stack.pop_all()


def _let_go() -> None:
    """Hold nothing in a forked child, which may live longer than its parent."""
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
