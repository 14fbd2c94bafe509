"""Files that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile

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
