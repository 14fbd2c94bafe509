"""``asynctrain info``: what a bug report should say about the machine."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_info

import asynctrain as at
from asynctrain.cli.output import people, to_programs
from asynctrain.data.images import ImageSettings, decoder_fingerprint
from asynctrain.executors.local import usable_cpus

_REQUIREMENT = re.compile(r"""(?P<name>[\w.-]+).*?(extra == ["'](?P<extra>[\w.-]+)["'])?\s*$""")


async def info(as_json: bool) -> None:
    """Tell versions, loop, CPUs, BLAS, extras and numeric fingerprint."""
    facts = gather_facts(asyncio.get_running_loop())
    lines = list(_lines(facts))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        people.print(f"{name:{width}} {value}", markup=False, soft_wrap=True)
    if as_json:
        to_programs(facts)


def gather_facts(loop: asyncio.AbstractEventLoop) -> dict[str, Any]:
    """Return the facts as JSON values; None for a package that is not installed."""
    hard, extras = _requirements()
    return {
        "asynctrain": at.__version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}{_gil()}",
        "system": platform.platform(),
        "cpus": {"model": _cpu_model(), "usable": usable_cpus(), "present": os.cpu_count()},
        "loop": f"{type(loop).__module__}.{type(loop).__qualname__}",
        "blas threads": {library["internal_api"]: library["num_threads"] for library in threadpool_info()},
        "packages": {name: _version(name) for name in hard},
        "extra": {extra: {name: _version(name) for name in names} for extra, names in extras.items()},
        "decoding": decoder_fingerprint(ImageSettings()),
        "fingerprint": at.numeric_fingerprint(),
    }


def _gil() -> str:
    """Return what is to be said of a build that can do without a global interpreter lock."""
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        return ""
    return ", free-threaded" + (", but with the GIL" if getattr(sys, "_is_gil_enabled", lambda: True)() else "")


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """Return the names of the packages that are needed always, and those that each extra needs."""
    hard: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in requires("asynctrain") or []:
        if found := _REQUIREMENT.match(line):
            (extras.setdefault(found["extra"], []) if found["extra"] else hard).append(found["name"])
    return hard, extras


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """Return what the CPU calls itself, as far as the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _lines(facts: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, object]]:
    """Yield the names of the facts, with the names of what they are in, and the facts."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{within}{name} ")
        else:
            yield within + name, "not installed" if value is None else value
