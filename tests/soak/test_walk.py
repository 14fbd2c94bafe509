"""The commands of the README, as a newcomer types them, one after the other in a fresh clone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ACTIVATE = ". .venv/bin/activate"
ELSEWHERE = ("make test", "jupyter lab")  # what runs just now, and what wants a person: notebooks have a test
SERVED = {"uvicorn": "http://127.0.0.1:8000/images"}


def commands() -> list[str]:
    """Return what the README types at its prompts, without what it says about it."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [re.sub(r"\s+#.*", "", line.removeprefix("$ ")) for block in blocks for line in block.splitlines()]


def bare_environment() -> dict[str, str]:
    """Return this process's environment without what leads to this Python's packages."""
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join(folder for folder in os.environ["PATH"].split(os.pathsep) if folder != here)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV", "CI"))}
    return kept | {"PATH": path, "COLUMNS": "120"}


def answers(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait for a server to answer; False if it ends before."""
    while process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - of this machine
                return bool(answer.status == 200)
        except OSError:
            time.sleep(0.1)
    return False


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_each_command_of_the_readme_works_in_a_fresh_clone(image_folder: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    image_folder.rename(clone / "flowers")
    (clone / "rose.png").write_bytes((clone / "flowers" / "rose" / "00.png").read_bytes())
    entered = "true"
    with ExitStack() as background:
        for command in commands():
            if command == ACTIVATE:
                entered = ACTIVATE
            if command.startswith(ELSEWHERE):
                continue
            line = ["bash", "-c", f"{entered} && exec {command.removesuffix('&')}" if command != ACTIVATE else command]
            process = background.enter_context(subprocess.Popen(line, cwd=clone, env=bare_environment()))
            background.callback(process.kill)
            if command.endswith("&"):
                continue
            url = next((url for name, url in SERVED.items() if command.startswith(name)), None)
            if url is None:
                assert process.wait(300) == 0, command
            else:
                served = answers(url, process)
                process.terminate()
                assert served, command
    assert (clone / "runs" / "flowers" / "report.html").is_file()
