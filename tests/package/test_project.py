"""What the project says of itself agrees: versions, licences, and what it needs."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import asynctrain
from tests.package.building import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def bounds(lines: list[str]) -> dict[str, str]:
    """Return the oldest release of each requirement by its name: ``numpy>=2.0; ...`` is ``numpy: 2.0``."""
    found = (re.split(">=|;", line) for line in lines)
    return {name: bound for name, bound, *_ in found}


def test_the_citation_is_of_this_version_and_licence() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {asynctrain.__version__}\n" in citation
    assert f"\nlicense: {PROJECT['project']['license']}\n" in citation


def test_the_development_tools_ask_for_nothing_newer_than_users_may_have() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    needed = bounds(PROJECT["project"]["dependencies"])
    for lines in extras.values():
        assert not needed.keys() & bounds(lines), "an extra repeats a dependency"
    optional = {name: bound for lines in extras.values() for name, bound in bounds(lines).items()}
    tools = bounds(PROJECT["dependency-groups"]["dev"])
    assert {name: bound for name, bound in tools.items() if optional.get(name, bound) != bound} == {}
