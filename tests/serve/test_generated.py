"""The generated modules are what the compiler now makes of the .proto files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_generated_modules_are_current() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "compile_protos.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"run scripts/compile_protos.py; these are not current:\n{done.stdout}{done.stderr}"
