"""Strange and broken images, where they are there."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and later have it


@pytest.fixture(scope="session")
def odd_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pack = Path(os.environ.get("ASYNCTRAIN_DATA", "/nonexistent")) / "odd_images.tar.xz"
    if not pack.exists():
        pytest.skip("ASYNCTRAIN_DATA names no folder with odd_images.tar.xz")
    folder = tmp_path_factory.mktemp("odd")
    with tarfile.open(pack) as tar:
        tar.extractall(folder, **SAFELY)  # type: ignore[arg-type]  # noqa: S202 - a pack of our own
    return folder / "odd_images"
