"""Print pip constraints with the oldest release of each dependency that ``pyproject.toml`` permits, extras included.

python scripts/oldest.py > constraints.txt
"""

from __future__ import annotations

import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
BELOW = ["pyparsing<3.3"]  # matplotlib 3.9 calls it by names of which later releases warn, and warnings are errors


def constraints() -> list[str]:
    """Return a line for each dependency: ``numpy>=2.0`` becomes ``numpy==2.0``."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    return BELOW + sorted(line.replace(">=", "==") for lines in (project["dependencies"], *extras) for line in lines)


if __name__ == "__main__":
    print(*constraints(), sep="\n")
