"""The numeric fingerprint: what the bits of a computation depend on, besides its inputs."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import numpy as np
from threadpoolctl import threadpool_info

from asynctrain.errors import FingerprintError


def numeric_fingerprint() -> dict[str, str]:
    """Return the builds and CPU features that decide about the last bit of this process's arithmetic.

    Two processes with equal fingerprints give equal bits for equal work; with different ones they may not.
    """
    return {
        "numpy": np.__version__,
        "blas": "; ".join(sorted(_describe(library) for library in threadpool_info() if library["user_api"] == "blas")),
        "cpu": " ".join(_simd_extensions()),
        "machine": platform.machine(),
    }


def require_same(ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Raise ``FingerprintError`` naming each difference, if there is one."""
    keys = sorted(ours.keys() | theirs.keys())
    differences: dict[str, tuple[object, object]] = {
        key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)
    }
    if differences:
        raise FingerprintError(differences)


def _describe(library: Mapping[str, object]) -> str:
    return f"{library['internal_api']} {library['version']} {library.get('architecture', '')}".strip()


def _simd_extensions() -> list[str]:
    config = np.show_config(mode="dicts") or {}
    extensions = config.get("SIMD Extensions", {})
    return [*extensions.get("baseline", []), *extensions.get("found", [])]
