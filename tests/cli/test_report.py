"""``asynctrain report``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Asynctrain = Callable[..., Any]


def test_a_trained_run_is_reported_in_its_folder_or_where_the_user_wants(
    asynctrain: Asynctrain, image_folder: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert asynctrain("train", image_folder, "--model", "linear", "--epochs", 2, "--out", run_dir).code == 0
    called = asynctrain("report", run_dir, "--json")
    assert called.code == 0
    assert called.json == {"report": str(run_dir / "report.html")}
    assert "<svg" in (run_dir / "report.html").read_text()
    assert asynctrain("report", run_dir, "--out", tmp_path / "page.html").code == 0
    assert "2 of 2" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_without_a_run_is_told_in_one_sentence(asynctrain: Asynctrain, tmp_path: Path, folder: str) -> None:
    called = asynctrain("report", tmp_path / folder)
    assert called.code == 1
    assert called.sentence == f"asynctrain: {tmp_path / folder}: this folder holds no run"
