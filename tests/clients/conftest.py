"""The example clients, installed or built, a service for them, and digits to learn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from asynctrain.data import unpack_digits
from benchmarks.loading import UNPACKED, made, unpack
from tests.serve.test_command import TOKEN, serving

CLIENTS = Path(__file__).parents[2] / "examples" / "clients"
HINT = "`make clients` installs what can be had"
GO_TOOLS = ("go", "protoc", "protoc-gen-go", "protoc-gen-go-grpc")
GO_PACKAGES = Path("/usr/share/gocode/src/google.golang.org")


@dataclass(frozen=True, slots=True)
class Client:
    """A program that is a client of the service at ``address``."""

    command: tuple[str, ...]
    address: str
    token: str | None = TOKEN

    def run(self, command: object, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        words = self._words(command, arguments)
        return subprocess.run(words, check=False, env=self.environment, capture_output=True, text=True, timeout=300)

    def start(self, command: object, *arguments: object) -> subprocess.Popen[str]:
        """Start a command, whose answers can be read one by one."""
        words = self._words(command, arguments)
        return subprocess.Popen(words, env=self.environment, stdout=subprocess.PIPE, text=True)

    def _words(self, command: object, arguments: tuple[object, ...]) -> list[str]:
        return [*self.command, *map(str, (command, "--address", self.address, *arguments))]

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment, with the token if there is one."""
        return os.environ | ({} if self.token is None else {"ASYNCTRAIN_TOKEN": self.token})


def answers(text: str) -> list[dict[str, Any]]:
    """Return what a client has printed."""
    return [json.loads(line) for line in text.splitlines()]


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a client is to have learnt, from ``train`` and ``test`` in a folder, with which options."""

    folder: Path
    options: tuple[object, ...]


@pytest.fixture(scope="session")
def node() -> tuple[str, ...]:
    """Return the command of the client in Node."""
    if shutil.which("node") is None:
        pytest.skip(f"node is not installed; {HINT}")
    if not (CLIENTS / "node" / "node_modules" / "@grpc" / "grpc-js").is_dir():
        pytest.skip(f"the client's npm packages are not installed; {HINT}")
    return ("node", str(CLIENTS / "node" / "client.mjs"))


@pytest.fixture(scope="session")
def go(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the command of the client in Go, which is built."""
    if missing := [tool for tool in GO_TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"{', '.join(missing)} not installed; {HINT}")
    if not all((GO_PACKAGES / package).is_dir() for package in ("grpc", "protobuf")):
        pytest.skip(f"Debian's Go packages for gRPC are not installed; {HINT}")
    folder = tmp_path_factory.mktemp("go")
    subprocess.run([CLIENTS / "go" / "build.sh", folder], check=True, timeout=300)
    return (str(folder / "client"),)


@pytest.fixture(scope="session", params=["node", "go"])
def command(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return the command of a client."""
    words: tuple[str, ...] = request.getfixturevalue(request.param)
    return words


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a service that asks for a token."""
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, "--executor", "threads:2", ASYNCTRAIN_TOKENS=f"alice {TOKEN}") as (_, address):
        yield address


@pytest.fixture
def client(command: tuple[str, ...], service: str) -> Client:
    """Return a client that the service knows."""
    return Client(command, service)


@pytest.fixture
def stranger(client: Client) -> Client:
    """Return a client without a token."""
    return replace(client, token=None)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the digits that come with the package."""
    folder = tmp_path_factory.mktemp("digits")
    unpack_digits(folder)
    return folder


@pytest.fixture(scope="session")
def lesson(digits: Path) -> Lesson:
    """Return MNIST where it is to be had, else the digits that come with the package."""
    data = os.environ.get("ASYNCTRAIN_DATA")
    if data is None:
        return Lesson(digits, ("--model", "small_cnn", "--size", 8, "--epochs", 40, "--batch-size", 32))
    folder = made(UNPACKED / "mnist", partial(unpack, Path(data) / "mnist.tar.xz"))
    return Lesson(folder, ("--model", "lenet", "--size", 28, "--epochs", 2, "--batch-size", 64))
