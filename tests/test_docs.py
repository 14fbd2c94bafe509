"""The code on each page of the documentation runs, from top to bottom, in one loop."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [page for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text(encoding="utf-8")]


@pytest.fixture
def beside_flowers(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to the folder that holds ``flowers/``."""
    shutil.copy(image_folder / "rose" / "00.png", image_folder.parent / "rose.png")
    monkeypatch.chdir(image_folder.parent)
    return image_folder.parent


async def run(blocks: list[str]) -> dict[str, Any]:
    """Execute the blocks one after the other, as cells of a notebook: ``await`` works at the top level."""
    names: dict[str, Any] = {}
    for block in blocks:
        code = compile(block, "documentation", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)  # noqa: S307 - code of our own
        if inspect.iscoroutine(result):
            await result
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_each_page_runs(page: Path, beside_flowers: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert asyncio.run(run(blocks))["at"]
