"""Draws the house, from the table that the imports are held against: ``python -m docs.house``."""

from __future__ import annotations

import ast
import runpy
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "pictures" / "house.svg"

# Single modules that share a box, and what it is called
TOGETHER = {
    "errors": "ground",
    "types": "ground",
    "arena": "ground",
    "randomness": "ground",
    "_aio": "kit",
    "_files": "kit",
    "_safetensors": "kit",
    "_version": "kit",
}
TOLD = {"ground": "errors, types, memory, random numbers", "kit": "what asyncio and file systems lack"}
COLORS = ("#eef1f4", "#fff3d6", "#e2f0d9", "#d9e8fb", "#e8e0f5", "#fbe0d9")
INK = "#1f2933"

WIDTH, MARGIN, GAP, FLOOR, ROOF = 1000, 20, 14, 84, 100  # pixels


@dataclass(frozen=True)
class Room:
    """A package in the house. below: the rooms it may import; outside: the packages of others."""

    name: str
    told: str
    below: frozenset[str]
    outside: tuple[str, ...]


@cache
def rooms() -> dict[str, Room]:
    """Return the packages by name, as the table of imports has them."""
    table = runpy.run_path(str(ROOT / "tests" / "test_imports.py"))
    below: dict[str, set[str]] = {}
    for module, names in table["PERMITTED"].items():
        below.setdefault(_room(module), set()).update(names)
    under_roof = {name for name in table["ANYTHING"] if not name.startswith("_")}
    ours = {name: {_room(other) for other in names if _is_ours(other)} - {name} for name, names in below.items()}
    ours |= {name: set(below) for name in under_roof}
    outside = {name: tuple(sorted(other for other in names if not _is_ours(other))) for name, names in below.items()}
    return {name: Room(name, _told(name), frozenset(ours[name]), outside.get(name, ())) for name in ours}


def _is_ours(module: str) -> bool:
    return module.startswith("asynctrain.")


def _room(module: str) -> str:
    name = module.split(".")[1]
    return TOGETHER.get(name, name)


def _told(name: str) -> str:
    """Return what a package says of itself first, up to a colon."""
    if name in TOLD:
        return TOLD[name]
    package = ROOT / "asynctrain" / name
    file = package / "__init__.py" if package.is_dir() else package.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    return first.replace("``", "").split(":")[0].split(";")[0].rstrip(".")


def floor(name: str) -> int:
    """Return how high a room must be, above all that it may import: 0 for what imports nothing."""
    return 1 + max((floor(other) for other in rooms()[name].below), default=-1)


def house() -> str:
    """Return the picture as SVG."""
    floors: dict[int, list[Room]] = {}
    for room in rooms().values():
        floors.setdefault(floor(room.name), []).append(room)
    height = ROOF + len(floors) * (FLOOR + GAP) + 2 * MARGIN
    shapes = [f'<rect width="{WIDTH}" height="{height}" fill="white"/>', _roof()]
    for number, members in floors.items():
        top = MARGIN + ROOF + GAP + (len(floors) - 1 - number) * (FLOOR + GAP)
        width = (WIDTH - 2 * MARGIN - GAP * (len(members) - 1)) / len(members)
        for place, room in enumerate(sorted(members, key=lambda room: room.name)):
            shapes.append(_box(room, MARGIN + place * (width + GAP), top, width, COLORS[number % len(COLORS)]))
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" fill="{INK}" text-anchor="middle">\n{body}\n</svg>\n'
    )


def _roof() -> str:
    middle, base = WIDTH / 2, MARGIN + ROOF
    return (
        f'<path d="M {middle:g} {MARGIN} L {WIDTH - MARGIN} {base} L {MARGIN} {base} Z" fill="{COLORS[-1]}" '
        f'stroke="{INK}" stroke-linejoin="round"/>\n'
        + _text(middle, base - 34, "asynctrain", size=17, bold=True)
        + _text(middle, base - 14, "the public names", size=12)
    )


def _box(room: Room, left: float, top: float, width: float, color: str) -> str:
    middle = left + width / 2
    lines = textwrap.wrap(room.told, int(width / 6.2))[:2]
    shape = (
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{FLOOR}" rx="8" fill="{color}" stroke="{INK}"/>\n'
        + _text(middle, top + 22, room.name, size=15, bold=True)
    )
    for number, line in enumerate(lines):
        shape += _text(middle, top + 40 + 14 * number, line, size=11.5)
    if room.outside:
        shape += _text(middle, top + FLOOR - 10, ", ".join(room.outside), size=10.5, color="#66788a")
    return shape


def _text(x: float, y: float, text: str, *, size: float, bold: bool = False, color: str = INK) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}"{weight}>{escape(text)}</text>\n'


if __name__ == "__main__":
    PICTURE.write_text(house(), encoding="utf-8")
