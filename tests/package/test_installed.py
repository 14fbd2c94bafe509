"""The wheel in a clean environment, with nothing but the hard dependencies: it imports, trains, and is small."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.package.building import build_wheel

pytestmark = pytest.mark.soak

CORE = Path(__file__).with_name("core.py")
LARGEST = 125_000_000  # bytes of all that is installed


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment into which the wheel was installed. It takes the package index, or pip's cache."""
    folder = tmp_path_factory.mktemp("clean")
    wheel = build_wheel(folder)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=60)
    command = ["-m", "pip", "--python", str(folder / "venv" / "bin" / "python"), "install", "--quiet", str(wheel)]
    installed = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=100)
    assert installed.returncode == 0, installed.stderr
    return folder / "venv"


def python(clean: Path, *arguments: object) -> str:
    """Return what the environment's Python prints, with nothing of this tree in its path, and warnings as errors."""
    command = [str(clean / "bin" / "python"), "-I", "-W", "error", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60, cwd=clean).stdout


def test_nothing_but_the_hard_dependencies_is_installed(clean: Path) -> None:
    code = "import importlib.metadata as m; print(*(found.name for found in m.distributions()))"
    hard = {line.split(">")[0] for line in requires("asynctrain") or [] if "extra ==" not in line}
    assert {canonicalize_name(name) for name in python(clean, "-c", code).split()} == {"asynctrain", *hard}


def test_what_is_installed_takes_at_most_125_megabytes(clean: Path) -> None:
    size = sum(path.lstat().st_size for path in clean.rglob("*"))
    assert size <= LARGEST, f"{size / 1e6:.1f} MB"


def test_the_core_of_the_demo_trains_saves_resumes_and_predicts(clean: Path, tmp_path: Path) -> None:
    told = json.loads(python(clean, CORE, tmp_path))
    assert Path(told["imported from"]).is_relative_to(clean)
    assert told["accuracy"] == pytest.approx(told["accuracy of the file"])
    assert told["accuracy"] > 0.9
    whole, half = told["steps"]
    assert 0 < half < whole
    assert told["digests"][0] == told["digests"][1]


def test_a_type_checker_finds_the_types(clean: Path) -> None:
    code = "import asynctrain, pathlib; print(pathlib.Path(asynctrain.__file__).with_name('py.typed').is_file())"
    assert python(clean, "-c", code).strip() == "True"


def test_the_command_names_the_extra_that_it_needs_in_one_sentence(clean: Path) -> None:
    done = subprocess.run([clean / "bin" / "asynctrain", "demo"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'asynctrain: the command line is an extra: pip install "asynctrain[cli]"\n'


def test_the_service_names_the_extra_that_it_needs(clean: Path) -> None:
    command = [str(clean / "bin" / "python"), "-I", "-c", "import asynctrain.serve"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith('pip install "asynctrain[grpc]"\n')
