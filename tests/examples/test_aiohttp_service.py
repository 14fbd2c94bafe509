"""``examples/aiohttp_service.py`` as a process, with a real client."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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


def test_a_run_that_cannot_begin_or_fails_is_told_and_the_service_goes_on(
    image_folder: Path, tmp_path: Path, port: int, client: httpx.Client
) -> None:
    folder = tmp_path / "weeds"
    service = start(folder, port, client)
    try:
        refused = client.post("/run")
        assert (refused.status_code, refused.text) == (422, f"{folder}: no such folder")
        for label in "ab":  # what is no image ends the run, once too many were skipped
            (folder / label).mkdir(parents=True)
            for number in range(5):
                (folder / label / f"{number}.png").write_bytes(b"no image")
        assert client.post("/run").status_code == 201
        while client.post("/run").status_code != 201:  # it has failed, and may be tried again
            time.sleep(0.05)
        shutil.rmtree(folder)
        shutil.rmtree(folder.with_suffix(".run"))
        shutil.copytree(image_folder, folder)
        while (answer := client.post("/run")).status_code == 409:
            time.sleep(0.05)
        assert answer.status_code == 201
        with ThreadPoolExecutor(3) as threads:
            assert list(threads.map(lambda _: client.post("/run").status_code, range(3))) == [409] * 3
        assert client.post("/run/cancel").is_success
        assert client.post("/run/stop").is_success
        service.send_signal(signal.SIGTERM)
        assert service.wait(30) == 0
    finally:
        service.kill()
        service.wait(30)
