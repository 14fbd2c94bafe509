"""What is in the wheel: the package, whole, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from zipfile import ZipFile

import pytest

import asynctrain
from tests.package.building import ROOT, build_wheel

METADATA = f"asynctrain-{asynctrain.__version__}.dist-info"
NEEDED = {  # besides the modules
    "asynctrain/py.typed",
    "asynctrain/data/digits.npz",
    "asynctrain/data/digits.md",  # says whose they are, as their licence asks
    "asynctrain/serve/asynctrain.proto",
    "asynctrain/serve/asynctrain_pb2.pyi",
    f"{METADATA}/licenses/LICENSE",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZipFile]:
    with ZipFile(build_wheel(tmp_path_factory.mktemp("wheel"))) as archive:
        yield archive


def test_the_wheel_holds_the_files_of_the_package_and_nothing_else(wheel: ZipFile) -> None:
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "asynctrain").rglob("*") if path.is_file()}
    packed = {name for name in wheel.namelist() if not name.startswith(f"{METADATA}/")}
    assert packed == {name for name in here if "__pycache__" not in name}
    assert set(wheel.namelist()) >= NEEDED


def test_the_wheel_is_at_most_a_mebibyte(wheel: ZipFile) -> None:
    assert sum(file.compress_size for file in wheel.infolist()) < 2**20


def test_the_wheel_names_its_command_and_its_licence(wheel: ZipFile) -> None:
    assert "asynctrain = asynctrain.cli:main" in wheel.read(f"{METADATA}/entry_points.txt").decode()
    assert "License-Expression: MIT" in wheel.read(f"{METADATA}/METADATA").decode()
