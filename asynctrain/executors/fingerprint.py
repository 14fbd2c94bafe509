"""The numeric fingerprint: what the bits of a computation depend on, besides its inputs."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from asynctrain.errors import FingerprintError


def numeric_fingerprint(kernels: str = "numpy") -> dict[str, str]:
    """Return the builds and CPU features that decide about the last bit of this process's arithmetic.

    Two processes with equal fingerprints give equal bits for equal work; with different ones they may not.
    With the ``kernels`` of numba, its compiler and the CPU that it compiles for are part of it.
    """
    return {
        "numpy": np.__version__,
        "blas": "; ".join(sorted(map(_describe, _blas_of_numpy()))),
        "cpu": " ".join(_simd_extensions()),
        "machine": platform.machine(),
        **(_compiler() if kernels == "numba" else {}),
    }


def require_same(ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Raise ``FingerprintError`` naming each difference, if there is one."""
    keys = sorted(ours.keys() | theirs.keys())
    differences: dict[str, tuple[object, object]] = {
        key: (ours.get(key), theirs.get(key)) for key in keys if ours.get(key) != theirs.get(key)
    }
    if differences:
        raise FingerprintError(differences)


def _compiler() -> dict[str, str]:
    import numba
    from llvmlite import __version__, binding

    return {"numba": numba.__version__, "llvmlite": __version__, "target": binding.get_host_cpu_name()}


def _blas_of_numpy() -> list[Mapping[str, object]]:
    """Return the BLAS that numpy brought along, or all of the process where it brought none.

    Others, such as the one that importing scipy loads, take no part in the arithmetic here.
    """
    from threadpoolctl import threadpool_info

    found = [library for library in threadpool_info() if library["user_api"] == "blas"]
    package = Path(np.__file__).resolve().parent
    folders = package, package.with_name("numpy.libs")
    own = [lib for lib in found if any(Path(lib["filepath"]).resolve().is_relative_to(folder) for folder in folders)]
    return own or found


def _describe(library: Mapping[str, object]) -> str:
    return f"{library['internal_api']} {library['version']} {library.get('architecture', '')}".strip()


def _simd_extensions() -> list[str]:
    config = np.show_config(mode="dicts") or {}
    extensions = config.get("SIMD Extensions", {})
    return [*extensions.get("baseline", []), *extensions.get("found", [])]
