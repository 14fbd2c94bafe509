"""What the pages take from the repository when they are built: measured figures, and the public names.

A page asks for it by a comment on a line of its own:

    <!-- figures: loop -->                                the rows of benchmarks/results/loop.json, and their machine
    <!-- figures: training | seconds | PyTorch, tuned --> those rows alone that contain all of these words
    <!-- figures: others -->                              the files that the page does not name
    <!-- names -->                                        what ``import asynctrain`` offers, in its groups
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import asynctrain

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]

_FIGURES = re.compile(r"^<!-- figures: (.+) -->$", re.MULTILINE)
_NAMES = re.compile(r"^<!-- names -->$", re.MULTILINE)
_HEAD = "| what | unit | asynctrain | the other | | times better | asked for | met |\n|---|---|--:|--:|---|--:|---|---|"
_MET = {True: "yes", False: "**no**", None: ""}


def filled(markdown: str) -> str:
    """Return a page with what it asks for in the place of its comments.

    Raises:
        ValueError: a comment names no file of results, or words that no row contains.
    """
    named = {told.partition("|")[0].strip() for told in _FIGURES.findall(markdown)}
    markdown = _FIGURES.sub(lambda found: _figures(found[1], named), markdown)
    return _NAMES.sub(lambda _: names(), markdown)


def measured() -> list[str]:
    """Return the names of the benchmarks whose results are in the repository."""
    return sorted(path.stem for path in RESULTS.glob("*.json"))


def _figures(asked: str, named: set[str]) -> str:
    name, *words = (part.strip() for part in asked.split("|"))
    if name == "others":
        return "\n\n".join(f"## {other.capitalize()}\n\n{figures(other)}" for other in measured() if other not in named)
    if name not in measured():
        raise ValueError(f"figures must be of one of {', '.join(measured())}, got {name!r}")
    return figures(name, words)


def figures(name: str, words: Sequence[str] = ()) -> str:
    """Return the rows of a benchmark as Markdown, with the command that makes them and the machine they are from.

    Without ``words`` it is all rows: those with a target first, if there are others, and these folded up.
    """
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rows = [row for row in content["rows"] if all(word in _told(row) for word in words)]
    if not rows:
        raise ValueError(f"no row of {name}.json contains all of {', '.join(words)}")
    if words:
        return f"{_table(rows)}\n\n{_origin(name, content)}"
    asked = [row for row in rows if row["target"]]
    others = [row for row in rows if not row["target"]]
    notes = "\n".join(f"- {note}" for note in content["notes"])
    parts = [_origin(name, content), notes, _table(asked), _folded(others), _plot(name)]
    return "\n\n".join(part for part in parts if part)


def _told(row: Row) -> str:
    return f"{row['case']} | {row['metric']} | {row['peer_name']}"


def _origin(name: str, content: dict[str, Any]) -> str:
    machine, versions = content["machine"], content["versions"]
    what = ", ".join(f"{library} {version}" for library, version in versions.items())
    return (
        f"*By `make bench-{name}`, on {machine['cpus']} CPUs of {machine['cpu']}, {machine['system']} "
        f"{machine['kernel']}, Python {machine['python']}; {what}.*"
    )


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    return "\n".join([_HEAD, *map(_line, rows)])


def _line(row: Row) -> str:
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    cells = (
        row["case"],
        row["metric"],
        _number(row["ours"]),
        _number(row["peer"]),
        row["peer_name"],
        ratio,
        row["target"],
        _MET[row["met"]],
    )
    return "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"


def _number(value: float | None) -> str:
    """Return a figure with four digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _folded(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    table = "\n".join(f"    {line}" for line in _table(rows).splitlines())
    return f'??? note "{len(rows)} rows for which nothing was asked"\n\n{table}'


def _plot(name: str) -> str:
    return f"![The ratios and their targets](results/{name}.png)" if (RESULTS / f"{name}.png").exists() else ""


def names() -> str:
    """Return the public names of ``asynctrain`` in the groups of its ``__init__.py``, each with its first sentence."""
    parts = []
    for group, members in groups().items():
        rows = "\n".join(f"| [`{name}`][{_path(name)}] | {_summary(name)} |" for name in members)
        parts.append(f"**{group}**\n\n| | |\n|---|---|\n{rows}")
    return "\n\n".join(parts)


def groups() -> dict[str, list[str]]:
    """Return the public names below each comment over the imports in ``asynctrain/__init__.py``."""
    source = (ROOT / "asynctrain" / "__init__.py").read_text(encoding="utf-8")
    lines, group, found = source.splitlines(), "The packages", dict[str, list[str]]()
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ImportFrom | ast.If):
            continue
        above = lines[node.lineno - 2]
        group = above.removeprefix("# ") if above.startswith("# ") else group
        imported = [alias.name for part in ast.walk(node) if isinstance(part, ast.ImportFrom) for alias in part.names]
        found.setdefault(group, []).extend(
            name for name in imported if name in asynctrain.__all__ and not name.startswith("_")
        )
    return {group: names for group, names in found.items() if names}


def _path(name: str) -> str:
    """Return where a name is described: modules where they are, all else where it is defined."""
    value = getattr(asynctrain, name)
    return value.__name__ if isinstance(value, ModuleType) else f"{value.__module__}.{value.__qualname__}"


def _summary(name: str) -> str:
    documentation = getattr(asynctrain, name).__doc__ or ""
    sentence = " ".join(documentation.split("\n\n")[0].split())
    return sentence.replace("``", "`").replace("|", r"\|")
