"""What the benchmark of gRPC runs: workers and clients as processes on loopback, and the least that could do the same.

``python -m benchmarks.hosts worker ADDRESS [FOLDER]`` is a worker over gRPC, with the certificates in ``FOLDER``;
``... bare PORT MEGABYTES`` is one of the bare loop; ``... client ADDRESS`` keeps a training service busy.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

import numpy as np
import uvloop

import asynctrain as at
from asynctrain.arena import Array
from asynctrain.executors.blas import find_blas, one_blas_thread
from asynctrain.executors.worker import GradientWorker, Sheet, StopFlag
from asynctrain.rpc import TLS, Access, GrpcExecutor, Worker, dial
from asynctrain.serve import TrainingClient
from asynctrain.types import GradientWork, Program
from benchmarks import homes

BUFFER = 4 * 2**20  # bytes that a socket is asked to hold, either way
FOREVER = 100_000  # epochs
IMAGE = 64, 64, 3


@contextmanager
def processes(count: int, *arguments: object) -> Iterator[list[subprocess.Popen[str]]]:
    """Have so many processes of this module."""
    command = [sys.executable, "-m", "benchmarks.hosts", *map(str, arguments)]
    with ExitStack() as stack:
        started = [stack.enter_context(subprocess.Popen(command, stdout=-1, text=True)) for _ in range(count)]
        try:
            yield started
        finally:
            for process in started:
                process.terminate()


# Workers over gRPC


class GrpcHosts(GrpcExecutor):
    """Workers with one thread each, as processes that dial in; they go with the executor.

    Args:
        workers: how many.
        folder: of certificates, or None for connections that are not encrypted.
    """

    def __init__(self, workers: int, folder: Path | None = None) -> None:
        super().__init__(listen="127.0.0.1:0", access=access_of(folder))
        self._workers = workers
        self._folder = folder
        self._processes = ExitStack()

    async def __aenter__(self) -> Self:
        told = [] if self._folder is None else [self._folder]
        self._processes.enter_context(processes(self._workers, "worker", await self.listening(), *told))
        return self

    async def aclose(self, grace: float = 5.0) -> None:
        await super().aclose(grace)
        self._processes.close()


@asynccontextmanager
async def grpc_rounds(megabytes: float, encrypted: bool = False) -> AsyncIterator[homes.Round]:
    """Offer rounds on two workers, over mutual TLS where they are encrypted."""
    with TemporaryDirectory() as folder:
        if encrypted:
            write_certificates(Path(folder))
        hosts = GrpcHosts(homes.WORKERS, Path(folder) if encrypted else None)
        async with homes.executor_rounds(hosts, megabytes) as round_:
            yield round_


async def grpc_worker(address: str, folder: Path | None) -> None:
    async with at.ThreadExecutor(1) as executor:
        await dial(Worker(executor, capacity=1), address, access_of(folder))


def access_of(folder: Path | None) -> Access:
    return Access() if folder is None else Access(tls=TLS(folder / "host.pem", folder / "host.key", folder / "ca.pem"))


def write_certificates(folder: Path) -> None:
    """Write an authority, and a certificate of it that all hosts share."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    openssl("req", *key, "-keyout", "host.key", "-out", "host.csr", "-subj", "/CN=host")
    (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\n")
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "extensions", "-days", "2"]
    openssl("x509", "-req", "-in", "host.csr", "-out", "host.pem", *signed)


# The bare loop


@asynccontextmanager
async def bare_rounds(megabytes: float) -> AsyncIterator[homes.Round]:
    """Offer the same rounds through asyncio's own sockets: bytes from where they are to where they belong, no more."""
    loop = asyncio.get_running_loop()
    params = homes.params_of(megabytes).vector
    gradients = [np.empty_like(params) for _ in range(homes.WORKERS)]
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.setblocking(False)
        stack.enter_context(processes(homes.WORKERS, "bare", server.getsockname()[1], megabytes))
        connections = [stack.enter_context((await loop.sock_accept(server))[0]) for _ in range(homes.WORKERS)]
        for connection in connections:
            set_up(connection)

        async def exchange(connection: socket.socket, into: Array) -> None:
            await loop.sock_sendall(connection, bytes_of(params))
            await receive(connection, bytes_of(into))
            assert into[0] == 3.0

        async def round_() -> None:
            await asyncio.gather(*map(exchange, connections, gradients))

        yield round_


async def bare_worker(port: int, megabytes: float) -> None:
    """Send gradients for parameters, computed by the code that computes them everywhere."""
    model = homes.model_of(megabytes)
    worker = GradientWorker(Program(model.to_json()))
    params, gradients = model.layout().empty(), model.layout().empty()
    work = GradientWork(0, 0, homes.WORKERS, homes.IMAGES, homes.LABELS)
    into = Sheet(gradients, model.statistics_layout.empty())
    loop = asyncio.get_running_loop()
    with socket.create_connection(("127.0.0.1", port)) as connection, one_blas_thread(find_blas()):
        set_up(connection)
        while True:
            await receive(connection, bytes_of(params.vector))
            worker.gradients(params, work, StopFlag(), into=into)
            await loop.sock_sendall(connection, bytes_of(gradients.vector))


def set_up(connection: socket.socket) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, BUFFER)


async def receive(connection: socket.socket, rest: memoryview) -> None:
    """Fill ``rest``; raises ``ConnectionError`` at the end of the stream."""
    loop = asyncio.get_running_loop()
    while rest:
        count = await loop.sock_recv_into(connection, rest)
        if not count:
            raise ConnectionError("the other side has gone")
        rest = rest[count:]


def bytes_of(vector: Array) -> memoryview:
    return vector.view(np.uint8).data


# The training service


@contextmanager
def service(folder: str) -> Iterator[str]:
    """Have a service in a process of its own, and its address."""
    command = [sys.executable, "-m", "asynctrain.cli", "serve", folder, "--grpc", "--json", "--port", "0"]
    with subprocess.Popen([*command, "--executor", "threads:1"], stdout=-1, stderr=-3, text=True) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["address"]
        finally:
            process.terminate()


def pixels(megabytes: int, shape: tuple[int, int, int] = IMAGE) -> at.ArrayDataset:
    """Return so many MB of noise in two classes."""
    count = megabytes * 10**6 // int(np.prod(shape))
    images = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    return at.ArrayDataset(images, np.arange(count) % 2)


async def keep_busy(address: str, megabytes: int) -> None:
    """Train without an end, listen, and send images meanwhile, time and again; a line is printed for each time."""
    lot = pixels(megabytes)
    async with TrainingClient(address) as client, asyncio.TaskGroup() as tasks:
        training = client.train(pixels(1, (28, 28, 1)), model="lenet", image_shape=(28, 28, 1), epochs=FOREVER)
        async with training as run:

            async def listen() -> None:
                async for _ in run:
                    pass

            tasks.create_task(listen(), name="listen")
            while True:
                async with client.train(lot, model="linear", image_shape=IMAGE, epochs=1):
                    print(megabytes, flush=True)


def main(kind: str, *arguments: str) -> None:
    if kind == "worker":
        work = grpc_worker(arguments[0], Path(arguments[1]) if arguments[1:] else None)
    elif kind == "bare":
        work = bare_worker(int(arguments[0]), float(arguments[1]))
    else:
        work = keep_busy(arguments[0], int(arguments[1]))
    # The loop of the command line; a connection that ends, ends with the benchmark.
    with suppress(ConnectionError), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


if __name__ == "__main__":
    main(*sys.argv[1:])
