"""The service in ``examples/fastapi_service``, in a process of its own, with a real client and a real browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COLORS = {"blue": (40, 60, 200), "green": (40, 190, 60), "red": (200, 50, 40)}


def picture(color: str, seed: int) -> bytes:
    """Return a noisy PNG of one colour, which a network tells from the others at once."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(rng.normal(COLORS[color], 40, (24, 24, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def archive() -> bytes:
    """A zip with a folder per class, thirty images each."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as images:
        for number, color in enumerate(COLORS):
            for seed in range(30):
                images.writestr(f"{color}/{seed:02}.png", picture(color, 100 * number + seed))
    return file.getvalue()


def command_of_the_readme() -> list[str]:
    """Return how the README starts the service."""
    (command,) = re.findall(r"^\$ (uvicorn .*)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(command)


class Server:
    """The service under uvicorn, on a port that stays the same when it is started again."""

    def __init__(self, home: Path) -> None:
        self.home = home
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command_of_the_readme(), "--port", str(self.port), "--log-level", "warning"],
            env={**os.environ, "STUDIO_HOME": str(self.home)},
            cwd=ROOT,
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                self.client.get("/images")
            except httpx.TransportError:
                assert self.process.poll() is None, "the service has ended"
                time.sleep(0.05)
            else:
                return
        raise AssertionError("the service did not come up within 30 s")

    def end(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(30)

    def post(self, path: str, **content: Any) -> Any:
        answer = self.client.post(path, **content)
        assert answer.is_success, answer.text
        return answer.json()

    def events(self, last: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the id and the event of each message, beginning after ``last``."""
        with self.client.stream("GET", "/run/events", headers={"Last-Event-ID": last} if last else {}) as stream:
            number = ""
            for line in stream.iter_lines():
                if line.startswith("id: "):
                    number = line.removeprefix("id: ")
                elif line.startswith("data: "):
                    yield number, json.loads(line.removeprefix("data: "))

    def until(self, kind: str, last: str = "", **facts: Any) -> list[tuple[str, dict[str, Any]]]:
        """Return the messages up to the first event of a kind with these facts."""
        found = []
        for message in self.events(last):
            found.append(message)
            if message[1]["event"] == kind and facts.items() <= message[1].items():
                return found
        raise AssertionError(f"the stream has ended before {kind}")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "studio")
    yield server
    server.client.close()
    if server.process.poll() is None:
        server.end(signal.SIGKILL)


def upload(server: Server, archive: bytes) -> None:
    found = server.post("/images", files={"files": ("colors.zip", archive)})
    assert found == dict.fromkeys(COLORS, 30)


def test_what_does_not_fit_the_moment_or_the_form_is_told(server: Server) -> None:
    for path in ("/run/pause", "/run/stop", "/predict"):
        refused = server.client.post(path)
        assert (refused.status_code, refused.json()["detail"]) == (409, "no run was started yet")
    refused = server.client.post("/run", json={})
    assert (refused.status_code, "at least two images of at least two classes" in refused.text) == (409, True)
    assert server.client.post("/run", json={"epochs": 0}).status_code == 422
    refused = server.client.post("/images?label=../../etc", files={"files": ("passwd", b"root")})
    assert (refused.status_code, "name must end in one of" in refused.text) == (422, True)
    assert not list(server.home.rglob("passwd"))
    refused = server.client.post("/images", files={"files": ("colors.zip", b"no zip")})
    assert (refused.status_code, "colors.zip: this is no zip" in refused.text) == (422, True)
    server.post("/images?label=typo", files={"files": ("0.png", b"no image")})
    assert server.client.delete("/images/typo").json() == {}
    assert server.client.delete("/images/typo").status_code == 422


def test_of_two_starts_at_once_one_is_refused_and_a_failure_is_the_answer(server: Server, archive: bytes) -> None:
    for label in "ab":  # of images that are none there is no run
        server.post(f"/images?label={label}", files=[("files", (f"{n}.png", b"no image")) for n in range(5)])
    failing = server.post("/run", json={"epochs": 1})["run"]
    told = server.until("RunEnd")[-1][1]
    assert (told["run"], told["reason"]) == (failing, "failed")
    assert server.client.post("/run/stop").status_code == 409
    for label in "ab":
        server.client.delete(f"/images/{label}")

    upload(server, archive)
    with ThreadPoolExecutor(4) as threads:
        order = {"epochs": 10_000, "image_size": 16}
        answers = list(threads.map(lambda _: server.client.post("/run", json=order), range(4)))
    assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
    assert sorted(path.name for path in (server.home / "runs").iterdir()) == ["0000", "0001"]
    server.post("/run/cancel")
    assert server.post("/run/stop")["reason"] == "cancelled"
    assert server.end(signal.SIGTERM) in (0, -signal.SIGTERM)


def test_a_run_that_cannot_go_on_at_a_restart_goes_on_at_a_later_one(server: Server, archive: bytes) -> None:
    upload(server, archive)
    server.post("/run", json={"epochs": 10_000, "image_size": 16})
    step = server.until("StepEnd", step=7)[-1][1]["step"]
    server.end(signal.SIGTERM)
    images = server.home / "images"
    images.rename(server.home / "elsewhere")
    server.start()
    while "no run was started yet" in (answer := server.client.get("/run")).text:
        time.sleep(0.05)
    server.end(signal.SIGTERM)
    images.rmdir()
    (server.home / "elsewhere").rename(images)
    server.start()
    while (answer := server.client.get("/run")).status_code != 200:
        time.sleep(0.05)
    assert answer.json()["step"] >= step


def test_one_trains_follows_pauses_predicts_stops_and_takes_the_model(server: Server, archive: bytes) -> None:
    upload(server, archive)
    assert server.post("/run", json={"epochs": 500, "image_size": 16}) == {"run": "0000"}
    assert server.client.post("/run", json={}).status_code == 409
    told = server.until("Evaluation")
    assert [int(number.removeprefix("0000-")) for number, _ in told] == list(range(len(told)))

    step = server.post("/run/pause")["step"]
    assert server.client.get("/run").json()["paused"]
    guesses = [server.post("/predict", content=picture(color, 999)) for color in COLORS]
    assert all(sum(share for _, share in guess["top"]) == pytest.approx(1) for guess in guesses)
    assert server.client.get("/run").json()["step"] == step
    server.post("/run/resume")

    after = server.until("EpochEnd", last=told[3][0], epoch=20)
    assert after[0][0] == "0000-4"
    assert [server.post("/predict", content=picture(color, 999))["label"] for color in COLORS] == list(COLORS)
    weights = server.client.get("/model")
    assert weights.headers["content-disposition"] == 'attachment; filename="0000.safetensors"'
    assert len(weights.content) > 10_000
    assert server.post("/run/stop")["reason"] == "stopped"
    assert server.until("RunEnd")[-1][1]["reason"] == "stopped"


def test_a_killed_service_goes_on_where_its_run_was_and_the_numbers_of_events_go_on(
    server: Server, archive: bytes
) -> None:
    upload(server, archive)
    server.post("/run", json={"epochs": 40, "image_size": 16})
    seen = server.until("CheckpointSaved")
    server.end(signal.SIGKILL)
    server.start()
    rest = server.until("RunEnd", last=seen[-1][0])
    assert [int(number.removeprefix("0000-")) for number, _ in seen + rest] == list(range(len(seen + rest)))
    assert rest[-1][1]["reason"] == "finished"
    assert [event["epoch"] for _, event in seen + rest if event["event"] == "EpochEnd"] == list(range(1, 41))


def test_a_terminated_service_saves_its_run_and_a_cancelled_run_does_not_come_back(
    server: Server, archive: bytes
) -> None:
    upload(server, archive)
    server.post("/run", json={"epochs": 10_000, "image_size": 16})
    last = server.until("StepEnd", step=7)[-1][0]
    assert server.end(signal.SIGTERM) in (0, -signal.SIGTERM)
    server.start()
    resumed = server.until("Resumed", last=last)
    assert resumed[-1][1]["step"] == max(event["step"] for _, event in resumed if event["event"] == "StepEnd")
    server.post("/run/cancel")
    label = server.post("/predict", content=picture("red", 999))["label"]
    server.end(signal.SIGTERM)
    server.start()
    assert server.client.get("/run").status_code == 409
    assert server.post("/predict", content=picture("red", 999))["label"] == label, "what was learned can still be asked"
    assert 'filename="0000.safetensors"' in server.client.get("/model").headers["content-disposition"]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_the_page_shows_a_run_that_is_paused_killed_and_goes_on(server: Server, archive: bytes, tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 720})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(str(server.client.base_url))

        def step() -> int:
            return int(page.evaluate("document.body.dataset.step ?? 0"))

        def drop(target: str, name: str, content: bytes) -> None:
            dropped = page.evaluate_handle(
                """([name, content]) => {
                    const bytes = Uint8Array.from(atob(content), c => c.charCodeAt(0)), drop = new DataTransfer();
                    drop.items.add(new File([bytes], name));
                    return drop;
                }""",
                [name, base64.b64encode(content).decode()],
            )
            page.dispatch_event(target, "drop", {"dataTransfer": dropped})

        drop("#upload", "colors.zip", archive)
        page.wait_for_function("document.querySelector('#counts').textContent === 'blue: 30, green: 30, red: 30'")
        page.fill("#epochs", "10000")
        page.fill("#image_size", "16")
        page.click("[data-start]")
        page.wait_for_function("+document.body.dataset.step > 20")
        before = page.get_attribute("#loss", "d")
        page.wait_for_function("+document.body.dataset.step > 40")
        assert page.get_attribute("#loss", "d") != before

        page.click("[data-do=pause]")
        page.wait_for_function("document.body.dataset.state === 'paused'")
        held = step()
        drop("#guess", "red.png", picture("red", 999))
        page.wait_for_selector("#answer .bar")
        assert page.inner_text("#answer").count("%") == 3
        if folder := os.environ.get("ASYNCTRAIN_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / "fastapi_service.png")
        assert step() == held == server.client.get("/run").json()["step"]
        page.click("[data-do=resume]")
        page.wait_for_function(f"+document.body.dataset.step > {held + 5}")

        server.end(signal.SIGKILL)
        page.wait_for_function("document.body.dataset.state === 'the service is away'")
        reached = step()
        server.start()
        page.wait_for_function(f"document.body.dataset.state === 'learning' && +document.body.dataset.step > {reached}")
        browser.close()
        assert not errors
