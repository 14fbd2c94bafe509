"""What the README and the examples show works, word for word."""

from __future__ import annotations

import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def beside_flowers(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to the folder that holds ``flowers/`` and ``rose.png`` and return it."""
    shutil.copy(image_folder / "rose" / "00.png", image_folder.parent / "rose.png")
    monkeypatch.chdir(image_folder.parent)
    return image_folder.parent


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_readme_has_a_quickstart() -> None:
    assert python_blocks()


@pytest.mark.parametrize("block", python_blocks())
def test_the_readme_does_what_it_says(block: str, beside_flowers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})  # noqa: S102
    *epochs, prediction = capsys.readouterr().out.splitlines()
    assert len(epochs) == 5
    assert prediction.startswith("Prediction(label='rose'")
    assert (beside_flowers / "flowers.safetensors").is_file()


@pytest.mark.parametrize(
    "example", [ROOT / "examples" / name for name in ("plain_asyncio.py", "quickstart.py")], ids=lambda path: path.name
)
def test_each_script_runs_on_a_folder_of_images(
    example: Path, beside_flowers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(example), "flowers"])
    runpy.run_path(str(example), run_name="__main__")
    assert "Prediction(label=" in capsys.readouterr().out
