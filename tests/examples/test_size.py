"""The examples stay small: where one needs more, the library lacks something."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("files", "most"), [("fastapi_service/*.py", 300), ("aiohttp_service.py", 100), ("plain_asyncio.py", 100)]
)
def test_an_example_has_no_more_lines_than_it_may(files: str, most: int) -> None:
    texts = [path.read_text(encoding="utf-8") for path in EXAMPLES.glob(files)]
    assert texts
    assert sum(bool(line.strip()) for text in texts for line in text.splitlines()) <= most
