"""What a user gets by ``import asynctrain``: quickly, typed, and nothing optional."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import requires, version
from importlib.resources import files
from pathlib import Path

import asynctrain

ROOT = Path(__file__).parent.parent
EXTRAS = ["typer", "rich", "matplotlib", "torch", "sklearn", "pydantic", "grpc", "numba"]


def python(code: str) -> str:
    """Return what ``code`` prints in a fresh interpreter, with the warnings that users see turned into errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60, env=environment)
    return done.stdout


TIMED_IMPORT = """
import numpy, time
def seconds(task):
    start = time.thread_time()
    task()
    return time.thread_time() - start
functions = "".join(f"def f{n}(x, y=1):\\n return [a + {n} for a in x if a > y]\\n" for n in range(1000))
print(seconds(lambda: __import__("asynctrain")) / seconds(lambda: compile(functions, "functions", "exec")))
"""


def import_milliseconds() -> float:
    """Return what ``import asynctrain`` costs a process that has imported numpy, on a machine of usual speed.

    Machines differ by more than a factor of two, some from one second to the next. So the clock ticks with the machine:
    one that compiles a thousand small functions in 33 ms is taken for usual. It is the thread's own, so that other
    processes do not count, nor the thread of OpenBLAS, which spins for a while after numpy's import.
    """
    return 33 * float(python(TIMED_IMPORT))


def test_the_import_costs_at_most_150_ms_more_than_numpy() -> None:
    import_milliseconds()  # writes the byte code
    assert min(import_milliseconds() for _ in range(9)) <= 150  # what else runs here only adds to it


def test_the_import_brings_in_no_extra() -> None:
    code = f"import asynctrain, sys; print([name for name in {EXTRAS} if name in sys.modules])"
    assert python(code).strip() == "[]"


def test_the_import_changes_no_loop_policy_and_no_signal_handler() -> None:
    code = """
import asyncio, logging, signal
def state():
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return handlers, asyncio.new_event_loop.__module__, logging.root.handlers[:]
before = state()
import asynctrain
assert state() == before
with asyncio.Runner() as runner:
    assert type(runner.get_loop()).__module__.startswith("asyncio."), type(runner.get_loop())
"""
    python(code)


def test_the_package_is_typed() -> None:
    assert files("asynctrain").joinpath("py.typed").is_file()


def test_every_public_name_exists() -> None:
    python("import asynctrain; [getattr(asynctrain, name) for name in asynctrain.__all__]")


def test_the_hard_dependencies_are_these_seven() -> None:
    needed = {line.split(">")[0] for line in requires("asynctrain") or [] if "extra ==" not in line}
    assert needed == {"numpy", "aiofiles", "pillow", "uvloop", "threadpoolctl", "safetensors", "tomli-w"}


def test_the_changelog_knows_the_version() -> None:
    assert version("asynctrain") == asynctrain.__version__
    assert f"## [{asynctrain.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_command_line_without_its_extra_names_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from asynctrain.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert 'pip install "asynctrain[cli]"' in done.stderr
    assert "Traceback" not in done.stderr
