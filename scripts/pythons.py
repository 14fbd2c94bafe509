"""Run the tests on each other Python that is found here, in an environment of its own: ``make test-pythons``.

    python scripts/pythons.py [PYTEST ARGUMENT ...]

Looked for are ``python3.11`` and so on, and the free-threaded ``python3.13t`` and so on, on the PATH and where pyenv
and uv keep theirs. One that is not there, or for which the development tools cannot be installed, is skipped with the
reason. Some tools have no wheels for free-threaded builds: there the tests that need them are left out. Exits with 1 if
a test has failed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = ("python3.11", "python3.12", "python3.13", "python3.14", "python3.13t", "python3.14t")
# For free-threaded builds: tools without wheels, dependencies of which only such a release has one, and tests left out.
WITHOUT_WHEELS = ("grpc", "simplejpeg")
FIRST_WHEELS = ["safetensors>=0.9.0rc1"]
NEED_GRPC = ["clients", "rpc", "serve", "soak", "test_benchmarks.py", "executors/test_conformance.py"]
PLACES = (".pyenv/versions/*/bin", ".local/share/uv/python/*/bin")


def found(name: str) -> Path | None:
    """Return the interpreter of a name such as ``python3.13``, if there is one that runs."""
    there = [path for place in PLACES for path in Path.home().glob(f"{place}/{name}")]
    on_path = shutil.which(name)
    is_other = (
        f"import sys, sysconfig; sys.exit(bool(sysconfig.get_config_var('Py_GIL_DISABLED')) != {name[-1] == 't'})"
    )
    for candidate in [Path(on_path), *there] if on_path else there:  # a shim of pyenv may not run
        if subprocess.run([candidate, "-c", is_other], capture_output=True).returncode == 0:
            return candidate
    return None


def install(python: Path, name: str) -> Path:
    """Make the environment of ``python``, once, and return its interpreter. Raises ``CalledProcessError``."""
    folder = ROOT / f".venv-{name}"
    own = folder / "bin" / "python"
    stamp = folder / ".installed"
    group = ["--group", "dev"]
    if name.endswith("t"):
        lines = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]["dev"]
        group = [*FIRST_WHEELS, *(line for line in lines if not line.startswith(WITHOUT_WHEELS))]
    if not stamp.is_file() or stamp.stat().st_mtime < (ROOT / "pyproject.toml").stat().st_mtime:
        quiet = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--prefer-binary"]
        for command in (
            [python, "-m", "venv", folder],
            [own, *quiet, "--upgrade", "pip>=25.1"],
            [own, *quiet, "--editable", f"{ROOT}[cli]", *group],
        ):
            subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stderr=subprocess.PIPE, text=True)
        stamp.touch()
    return own


def tested(name: str, arguments: Sequence[str]) -> str:
    """Run the tests on one Python and say how it went."""
    python = found(name)
    if python is None:
        return "skipped: there is none here"
    try:
        own = install(python, name)
    except subprocess.CalledProcessError as error:
        return f"skipped: {error.stderr.strip().splitlines()[-1]}"
    left_out = [f"--ignore=tests/{path}" for path in NEED_GRPC] if name.endswith("t") else []
    done = subprocess.run([own, "-m", "pytest", *arguments, *left_out], cwd=ROOT)
    return "passed" if done.returncode == 0 else f"FAILED: pytest ended with {done.returncode}"


def main() -> int:
    """Test on each in turn, but for this one's version, tell the outcomes, and return the exit code."""
    own = "python{}.{}".format(*sys.version_info)
    outcomes = {name: tested(name, sys.argv[1:]) for name in NAMES if name != own}
    for name, outcome in outcomes.items():
        print(f"{name:12} {outcome}")
    return any(outcome.startswith("FAILED") for outcome in outcomes.values())


if __name__ == "__main__":
    sys.exit(main())
