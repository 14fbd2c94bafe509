"""What a command tells: to people on standard error, to programs as one JSON object on standard output."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

people = Console(stderr=True, highlight=False)


def to_programs(result: Mapping[str, Any]) -> None:
    """Print ``result`` as one line of JSON on standard output."""
    print(json.dumps(result))


def suggest(*arguments: str | Path) -> None:
    """Print a command that works when it is pasted into the shell that started this one."""
    words = [shlex.quote(str(argument)) for argument in arguments]
    people.print(f"  {this_command()} {' '.join(words)}", style="bold", markup=False, soft_wrap=True)


def this_command() -> str:
    """Return how this program was called: ``asynctrain``, a path to it, or an interpreter with ``-m``."""
    called = Path(sys.argv[0])
    if called.name == "__main__.py":
        return f"{shlex.quote(sys.executable)} -m asynctrain.cli"
    found = shutil.which(called.name)
    return called.name if found and Path(found).resolve() == called.resolve() else shlex.quote(str(called))


def percent(share: float) -> str:
    """Return 0.9912 as ``99.12 %``."""
    return f"{100 * share:.2f} %"
