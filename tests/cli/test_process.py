"""A command is a process: its streams, its signals, its exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
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
