"""The processes that a process has started, as the system tells it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def children(pid: int | str = "self") -> set[int]:
    """Return the ids of the processes that ``pid`` has started and not yet waited for; empty where nobody tells."""
    found: set[int] = set()
    with suppress(OSError):  # the system tells nothing, or the process has ended
        for thread in Path("/proc", str(pid), "task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
                found.update(map(int, (thread / "children").read_text().split()))
    return found


def is_alive(pid: int) -> bool:
    """Return whether the process is there and, where the system tells, not dead and merely unburied."""
    try:
        os.kill(pid, 0)
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # it has ended between the two questions, or this system has no such files
        return not Path("/proc/self").exists()
