"""What the site is made of holds together, and what its pages take from the repository is true."""

from __future__ import annotations

import json
import logging
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import asynctrain as at
from docs import generated, house

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SITE = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
GENERATED = {"source/CHANGELOG.md"}  # shown by the site, though they are no pages of docs/
LONGEST = 40  # lines that define an example for contributors, not counting what shows that it works

MACHINE = {"cpu": "A CPU", "cpus": 2, "system": "Linux", "kernel": "6.1", "python": "3.11.7"}
ROW = {
    "case": "a step",
    "metric": "ms",
    "ours": 2.0,
    "peer": 3.0,
    "peer_name": "the | other",
    "ratio": 1.5,
    "spread": 0.01,
    "target": "2x",
    "met": False,
}


def test_the_site_shows_every_page_and_no_page_that_is_not_there() -> None:
    shown = re.findall(r": ([\w/]+\.md)$", SITE, re.MULTILINE)
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    assert len(shown) == len(set(shown))
    assert set(shown) - GENERATED == pages


def test_the_site_asks_no_other_host_for_fonts() -> None:
    assert re.search(r"^  font: false$", SITE, re.MULTILINE)


def test_the_house_is_that_of_the_table_of_imports() -> None:
    drawn = house.PICTURE.read_text(encoding="utf-8")
    assert drawn == house.house(), "the packages or what they may import have changed: run python -m docs.house"


def test_every_room_stands_above_all_that_it_imports() -> None:
    rooms = house.rooms()
    assert {"nn", "data", "executors", "train", "cli"} <= rooms.keys()
    assert all(house.floor(below) < house.floor(name) for name, room in rooms.items() for below in room.below)


def test_every_test_that_the_page_on_reliability_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / "reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 30
    for path, name in named:
        assert re.search(rf"def {name}\(", (ROOT / path).read_text(encoding="utf-8")), f"{path}::{name}"


def test_each_example_for_contributors_is_short() -> None:
    sections = (DOCS / "contributing.md").read_text(encoding="utf-8").split("\n## ")
    for name in ("A layer", "A source", "An executor", "A callback"):
        (section,) = (each for each in sections if each.startswith(name))
        defining = [block for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL) if "class " in block]
        assert 0 < sum(bool(line.strip()) for block in defining for line in block.splitlines()) < LONGEST, name


def described() -> set[Any]:
    """Return what the pages of the reference describe."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    modules = [import_module(name) for name in re.findall(r"^::: (\S+)$", text, re.MULTILINE)]
    return {module.__name__ for module in modules} | {name for module in modules for name in members(module)}


def members(module: ModuleType) -> set[str]:
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    return {where(getattr(module, name)) for name in names}


def where(value: Any) -> str:
    if isinstance(value, ModuleType):
        return value.__name__
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"


def test_the_reference_describes_every_public_name() -> None:
    public = {where(getattr(at, name)) for name in at.__all__ if not name.startswith("_")}
    assert public - described() == set()


def test_the_public_names_are_listed_once_each() -> None:
    listed = [name for members in generated.groups().values() for name in members]
    assert sorted(listed) == sorted(name for name in at.__all__ if not name.startswith("_"))
    assert all(f"[`{name}`]" in generated.names() for name in listed)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of results of two made-up benchmarks."""
    monkeypatch.setattr(generated, "RESULTS", tmp_path)
    for name in ("first", "second"):
        rows = [ROW, ROW | {"case": "untold", "target": "", "met": None}]
        content = {"machine": MACHINE, "versions": {"numpy": "2.0"}, "notes": [f"of {name}"], "rows": rows}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_figures_come_from_the_results_with_their_command_and_machine(results: Path) -> None:
    page = generated.filled("Before.\n\n<!-- figures: first -->\n\nAfter.")
    assert "`make bench-first`, on 2 CPUs of A CPU, Linux 6.1, Python 3.11.7; numpy 2.0" in page
    assert r"| a step | ms | 2 | 3 | the \| other | 1.50 | 2x | **no** |" in page
    assert "- of first" in page
    assert "make bench-second" not in page


def test_rows_are_chosen_by_words_and_words_that_choose_none_are_an_error(results: Path) -> None:
    page = generated.filled("<!-- figures: first | untold -->")
    assert page.count("| ms |") == 1
    with pytest.raises(ValueError, match=r"no row of first.json contains all of untold, nowhere"):
        generated.filled("<!-- figures: first | untold | nowhere -->")
    with pytest.raises(ValueError, match="must be of one of first, second, got 'third'"):
        generated.filled("<!-- figures: third -->")


def test_results_that_a_page_does_not_name_are_shown_all_the_same(results: Path) -> None:
    page = generated.filled("<!-- figures: first -->\n\n<!-- figures: others -->")
    assert page.count("make bench-first") == 1
    assert "## Second" in page


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.relative_to(DOCS).as_posix())
def test_every_page_can_be_filled(page: Path) -> None:
    assert not re.search(r"^<!-- (figures|names)", generated.filled(page.read_text(encoding="utf-8")), re.MULTILINE)


def test_each_benchmark_with_results_has_a_target_that_makes_them() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^bench-{name}:", makefile, re.MULTILINE) for name in generated.measured())


def test_a_built_page_with_a_dead_link_or_something_of_another_host_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: make docs installs it")
    from docs import hooks

    (tmp_path / "other.html").write_text('<h1 id="here">Other</h1><img src="there.png"><a href="https://example.com">')
    (tmp_path / "there.png").touch()
    (tmp_path / "index.html").write_text(
        '<a href="other.html#here"></a><a href="other.html#gone"></a><a href="gone.html"></a>'
        '<script src="https://cdn.example.com/x.js"></script><link rel="stylesheet" href="//fonts.example.com/a.css">'
    )
    config: Any = SimpleNamespace(site_dir=str(tmp_path))
    with caplog.at_level(logging.WARNING):
        hooks.on_post_build(config)
    assert sorted(record.message for record in caplog.records) == [
        "index.html: gone.html leads nowhere",
        "index.html: loads //fonts.example.com/a.css, which is somebody else's",
        "index.html: loads https://cdn.example.com/x.js, which is somebody else's",
        "index.html: other.html#gone leads nowhere",
    ]
