"""``examples/aiohttp_service.py`` as a process, with a real client."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "aiohttp_service.py"


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def client(port: int) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
        yield client


def start(folder: Path, port: int, client: httpx.Client) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, SCRIPT, folder, "--port", str(port)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            client.get("/run")
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return process
    process.kill()
    raise AssertionError("the service did not come up within 30 s")


def test_one_run_is_started_steered_saved_by_a_shutdown_and_taken_up_again(
    image_folder: Path, port: int, client: httpx.Client
) -> None:
    def run(verb: str = "") -> dict[str, Any]:
        answer = client.post(f"/run/{verb}" if verb else "/run")
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    service = start(image_folder, port, client)
    try:
        assert client.get("/run").status_code == 409
        run()
        assert client.post("/run").status_code == 409
        paused = run("pause")
        assert paused["paused"]
        assert client.get("/run").json()["step"] == paused["step"]
        image = (image_folder / "rose" / "00.png").read_bytes()
        assert client.post("/predict", content=image).json()["label"] in {path.name for path in image_folder.iterdir()}
        assert client.post("/predict", content=b"no image").status_code == 422
        service.send_signal(signal.SIGTERM)
        assert service.wait(30) == 0

        service = start(image_folder, port, client)
        assert run()["step"] >= paused["step"]
        assert run("stop")["step"] >= paused["step"]
    finally:
        service.kill()
        service.wait(30)
