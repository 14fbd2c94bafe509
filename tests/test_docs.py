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

import asynctrain as at

DOCS = Path(__file__).parent.parent / "docs"
ALL = sorted(DOCS.rglob("*.md"))
PAGES = [page for page in ALL if "```python" in page.read_text(encoding="utf-8")]


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


@pytest.mark.parametrize("page", ALL, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_what_a_page_points_to_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        pointed = page.parent / path
        assert pointed.is_file(), target
        assert not heading or heading in headings(pointed), target


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


def test_the_costs_of_the_ready_models_are_those_the_page_on_models_tells() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+)x(\d+)x(\d+) \| (.*) \|$", (DOCS / "models.md").read_text(), re.MULTILINE)
    assert {name for name, *_ in rows} | {"resnet"} == set(at.models.NAMES)  # resnet is resnet20
    for name, *shape, told in rows:
        costs = at.models.get(name)(num_classes=10, image_shape=tuple(map(int, shape))).costs(microbatch=32)
        millions = costs.flops / 32, costs.parameter_bytes, costs.activation_bytes
        assert told == " | ".join([f"{costs.parameters:,}", *(f"{number / 1e6:.1f}" for number in millions)]), name


def test_the_summary_on_the_page_on_models_is_what_the_code_above_it_prints() -> None:
    told = re.search(r"```text\n(.*?)\n```", (DOCS / "models.md").read_text(), re.DOTALL)
    assert told
    assert told[1] == at.models.lenet(num_classes=10, image_shape=(28, 28, 1)).summary(microbatch=32)
