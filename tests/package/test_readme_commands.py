"""The commands that the README prints, as a newcomer types them: one after the other, in one shell."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKERS_END = "trap 'kill $(jobs -p); wait' EXIT"


def commands() -> list[str]:
    """Return the calls of asynctrain; what is called before them is what the Makefile and these tests are."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("asynctrain ")]


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_every_command_of_the_readme_works_as_it_is_printed(image_folder: Path) -> None:
    folder = image_folder.parent
    shutil.copy(image_folder / "rose" / "00.png", folder / "rose.png")
    script = "\n".join(["set -e", WORKERS_END, *commands()])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("of the test images are recognised") == 4
    assert "rose.png: rose" in done.stderr
    assert (folder / "runs" / "flowers" / "report.html").is_file()
