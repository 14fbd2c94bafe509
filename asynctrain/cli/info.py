"""``asynctrain info``: what a bug report should say about the machine."""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import asynctrain as at
from asynctrain.cli.output import people, to_programs
from asynctrain.executors.local import usable_cpus

PACKAGES = ("numpy", "pillow", "aiofiles", "uvloop", "threadpoolctl", "safetensors", "typer", "rich", "matplotlib")


async def info(as_json: bool) -> None:
    """Tell versions, loop, CPUs and numeric fingerprint."""
    facts = gather_facts(asyncio.get_running_loop())
    for line in _lines(facts):
        people.print(line, markup=False, soft_wrap=True)
    if as_json:
        to_programs(facts)


def gather_facts(loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """Return the facts as JSON values; None for a package that is not installed."""
    return {
        "asynctrain": at.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "cpus": {"usable": usable_cpus(), "present": os.cpu_count()},
        "loop": f"{type(loop).__module__}.{type(loop).__qualname__}",
        "packages": {name: _version(name) for name in PACKAGES},
        "fingerprint": at.numeric_fingerprint(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _lines(facts: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{name} ")
        else:
            yield f"{within + name:24} {'not installed' if value is None else value}"
