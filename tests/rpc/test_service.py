"""The service, whose runs are computed by workers on other machines: one call of a client, several processes."""

from __future__ import annotations

from pathlib import Path

import pytest

import asynctrain as at
from asynctrain.serve import TrainingClient
from tests.rpc.conftest import Start
from tests.serve.conftest import blobs, model  # noqa: F401 - fixtures
from tests.serve.remote import OPTIONS, RATE, trained_here
from tests.serve.test_command import serving


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    """Run these, which start processes, on one loop: that of the command line."""
    return "asyncio", {"debug": True, "use_uvloop": True}


@pytest.mark.parametrize("dials", ["the service", "the workers"])
async def test_a_clients_run_on_two_worker_processes_has_the_digest_of_a_run_here(
    blobs: at.ArrayDataset,  # noqa: F811
    model: at.Model,  # noqa: F811
    tmp_path: Path,
    start: Start,
    address: str,
    dials: str,
) -> None:
    role = ("--executor", "threads:1", "--capacity", "1")
    if dials == "the service":
        home = "grpc://" + ",".join(start(*role).address for _ in range(2))
    else:
        home = f"grpc://listen:{address}"
        for _ in range(2):
            start(*role, "--connect", address)
    with serving(tmp_path, "--executor", home) as (_, service):
        async with TrainingClient(service) as client:
            trained = await client.train(blobs, model=model, optimizer=at.optim.adamw(RATE), **OPTIONS).result()
    assert trained.digest == (await trained_here(blobs, model)).state.digest()
