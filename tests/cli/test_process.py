"""A command is a process: its streams, its signals, its exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires
from typing import Any

import pytest
from packaging.requirements import Requirement

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
        if name == "matplotlib":
            raise PackageNotFoundError(name)
        return f"the version of {name}"

    monkeypatch.setattr("asynctrain.cli.info.version", version)
    needed = list(map(Requirement, requires("asynctrain") or []))
    called = asynctrain("info", "--json")
    told = {None: called.json["packages"], **called.json["extra"]}
    for extra, found in told.items():
        wanted = {"extra": extra or "", "python_version": "3.11"}  # what a later one lacks is told as missing
        names = {one.name for one in needed if one.marker is None or one.marker.evaluate(wanted)}
        hard = {one.name for one in needed if "extra" not in str(one.marker)}
        assert set(found) == (names - hard if extra else hard)
    assert called.json["extra"]["cli"]["typer"] == "the version of typer"
    assert called.json["extra"]["plot"]["matplotlib"] is None
    assert "extra plot matplotlib not installed" in [" ".join(line.split()) for line in called.stderr.splitlines()]


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
