"""``--executor dask``: the same digest, on workers that the command starts and on a cluster that is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import AsynctrainCommand
from tests.executors.dask_clusters import DaskCluster


@pytest.mark.timeout(180)
def test_dask_gives_the_digest_of_threads(asynctrain: AsynctrainCommand, image_folder: Path, tmp_path: Path) -> None:
    def digest(name: str, executor: str) -> str:
        fixed = ["--epochs", 2, "--batch-size", 16, "--microbatch", 4, "--out", tmp_path / name, "--json"]
        return str(asynctrain("train", image_folder, *fixed, "--executor", executor).json["digest"])

    expected = digest("threads", "threads:2")
    assert digest("own workers", "dask") == expected
    with DaskCluster(tmp_path, workers=2) as cluster:
        assert digest("a cluster", f"dask:{cluster.address}") == expected
