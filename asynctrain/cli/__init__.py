"""The command line: ``asynctrain demo | train | evaluate | predict | report | serve | worker | info``.

People read standard error, programs read ``--json`` on standard output. Exit codes: 0 done, 1 failed, 2 wrong usage,
130 and 143 after SIGINT and SIGTERM.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command that ``sys.argv`` asks for and return its exit code."""
    try:
        from asynctrain.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("typer", "rich"):
            raise
        print('asynctrain: the command line is an extra: pip install "asynctrain[cli]"', file=sys.stderr)
        return 2
    app()
    return 0
