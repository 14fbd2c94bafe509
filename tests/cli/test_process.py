"""A command is a process: its streams, its signals, its exit code."""

from __future__ import annotations

import re
import signal
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

import asynctrain as at


def test_info_tells_what_a_bug_report_needs_and_that_the_loop_is_uvloop(asynctrain: Callable[..., Any]) -> None:
    called = asynctrain("info", "--json")
    assert called.code == 0
    assert called.json["asynctrain"] == at.__version__
    assert called.json["loop"].startswith("uvloop")
    assert called.json["fingerprint"] == at.numeric_fingerprint()
    assert called.json["packages"]["numpy"] in called.stderr
    assert called.json["cpus"]["model"] in called.stderr
    assert "openblas" not in called.json["fingerprint"]["blas"] or called.json["blas threads"]["openblas"] > 0


def test_info_tells_the_version_of_every_dependency_and_of_every_extra_or_that_it_is_missing(
    asynctrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == "tensorboardX":
            raise PackageNotFoundError(name)
        return f"the version of {name}"

    monkeypatch.setattr("asynctrain.cli.info.version", version)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    called = asynctrain("info", "--json")
    assert set(called.json["packages"]) == {name_of(line) for line in project["dependencies"]}
    extras = {extra: set(map(name_of, lines)) for extra, lines in project["optional-dependencies"].items()}
    assert {extra: set(found) for extra, found in called.json["extra"].items()} == extras
    assert called.json["extra"]["cli"]["typer"] == "the version of typer"
    assert called.json["extra"]["tensorboard"]["tensorboardX"] is None
    assert any(
        line.split() == ["extra", "tensorboard", "tensorboardX", "not", "installed"]
        for line in called.stderr.splitlines()
    )


def name_of(requirement: str) -> str:
    """Return the name in a requirement such as ``numpy>=2.0``."""
    return re.split(r"[>; ]", requirement)[0]


def test_without_uvloop_a_command_runs_on_the_loop_of_asyncio(
    asynctrain: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert asynctrain("info", "--json").json["loop"].startswith("asyncio")


def test_without_arguments_the_help_is_shown(asynctrain: Callable[..., Any]) -> None:
    called = asynctrain()
    assert called.code == 2
    for command in ("demo", "train", "evaluate", "predict", "info"):
        assert command in called.stdout + called.stderr


def test_signal_handlers_are_what_they_were_after_a_command(asynctrain: Callable[..., Any]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    asynctrain("info")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
