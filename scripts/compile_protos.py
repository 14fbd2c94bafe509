"""Make the Python modules of the package's ``.proto`` files, beside them.

They are kept in the repository, so that a user needs no compiler::

    .venv/bin/python scripts/compile_protos.py            # writes them
    .venv/bin/python scripts/compile_protos.py --check    # says which are not what the .proto files now make
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
OUTPUTS = ("python", "grpc_python", "mypy", "mypy_grpc")


def compile_all(out: Path) -> list[Path]:
    """Compile all ``.proto`` files of the package; return what was written, relative to ``out``."""
    protos = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "asynctrain").rglob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *(f"--{kind}_out={out}" for kind in OUTPUTS), *protos]
    plugins = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(command, cwd=ROOT, env=plugins, check=True, stderr=subprocess.DEVNULL)
    return sorted(path.relative_to(out) for path in out.rglob("*_pb2*.py*"))


def outdated() -> list[str]:
    """Return the generated files that differ from what would be made now."""
    with TemporaryDirectory() as folder:
        made = compile_all(Path(folder))
        return [str(path) for path in made if not _same(Path(folder) / path, ROOT / path)]


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.read_bytes() == other.read_bytes()


def main() -> int:
    """Write the modules, or with ``--check`` only compare."""
    if "--check" in sys.argv:
        differing = outdated()
        print("\n".join(differing) or "all generated files are current")
        return int(bool(differing))
    with TemporaryDirectory() as folder:
        for path in compile_all(Path(folder)):
            (ROOT / path).write_bytes((Path(folder) / path).read_bytes())
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
