"""What the benchmark of executors runs: layers without arithmetic, and the least that could do the same job.

``python -m benchmarks.homes SOCKET PARAMETERS GRADIENTS MEGABYTES`` is a worker of the bare loop.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from asynctrain import nn
from asynctrain.arena import Arena, Array, Shape
from asynctrain.executors import Executor
from asynctrain.executors.base import Session
from asynctrain.executors.blas import find_blas, one_blas_thread
from asynctrain.executors.shared_memory import Block
from asynctrain.executors.worker import GradientWorker, Sheet, StopFlag
from asynctrain.nn.layers.base import Parameter
from asynctrain.types import GradientWork, Params, Program

ARRAYS = 20
WORKERS = 2
IMAGES = np.zeros((1, 2, 2, 1), np.uint8)
LABELS = np.zeros(1, np.int64)

Round = Callable[[], Awaitable[object]]


@nn.register_layer("bench_double")
@dataclass(frozen=True)
class Double(nn.ReLU):
    """Has ``size`` parameters, whose gradient is twice their value: one pass over memory, and no arithmetic besides."""

    size: int = 1

    def parameters(self, input_shape: Shape) -> Mapping[str, Parameter]:
        return {"weight": Parameter((self.size,), "zeros")}

    def forward(self, params: Params, x: Array, scope: nn.Scope) -> tuple[Array, Any]:
        return x, None

    def backward_input(self, params: Params, saved: Any, dy: Array, scope: nn.Scope) -> Array:
        return dy

    def backward_params(self, params: Params, saved: Any, dy: Array, scope: nn.Scope) -> None:
        np.multiply(params["weight"], 2, out=scope.gradient("weight"))


def model_of(megabytes: float) -> nn.Model:
    """Return a model of 20 arrays that have so many MB together."""
    size = int(megabytes * 1e6) // 4 // ARRAYS
    return nn.Model([*(Double(size) for _ in range(ARRAYS)), nn.Flatten()], input_shape=(2, 2, 1))


def params_of(megabytes: float) -> Arena:
    params = model_of(megabytes).init(0)
    for array in params.values():
        array[...] = 1.5
    return params


@asynccontextmanager
async def executor_rounds(executor: Executor, megabytes: float) -> AsyncIterator[Round]:
    """Offer a round on ``executor``: broadcast the parameters, and have one gradient from each worker."""
    params = params_of(megabytes)
    version = 0
    async with executor, executor.open(Program(model_of(megabytes).to_json())) as session:
        await complete(session, WORKERS)

        async def round_() -> None:
            nonlocal version
            version += 1
            await session.broadcast(params, {}, version)
            works = [GradientWork(version, i, WORKERS, IMAGES, LABELS) for i in range(WORKERS)]
            for result in await asyncio.gather(*(session.compute(work, version) for work in works)):
                assert result.gradients.vector[0] == 3.0
                result.release()

        yield round_


async def complete(session: Session, workers: int) -> None:
    """Wait until all workers take part: those that dial in come one after the other."""
    async with asyncio.timeout(60):
        while session.slots < workers:  # noqa: ASYNC110 - nobody tells it
            await asyncio.sleep(0.01)


@asynccontextmanager
async def bare_rounds(megabytes: float) -> AsyncIterator[Round]:
    """Offer the same through memory and sockets that are used directly, by a caller that blocks."""
    params = params_of(megabytes)
    layout = params.layout
    shared = Block.create(params.vector.nbytes)
    workers = []
    for _ in range(WORKERS):
        gradients = Block.create(params.vector.nbytes)
        ours, theirs = socket.socketpair()
        passed = [theirs.fileno(), shared.descriptor, gradients.descriptor]
        command = [sys.executable, "-m", "benchmarks.homes", *map(str, passed), str(megabytes)]
        process = subprocess.Popen(command, pass_fds=passed)  # noqa: ASYNC220 - the bare loop blocks, as it may
        theirs.close()
        gradients.close()
        workers.append((process, ours, gradients.array(0, (layout.size,), layout.dtype)))
    shared.close()
    board = shared.array(0, (layout.size,), layout.dtype)

    async def round_() -> None:
        np.copyto(board, params.vector)
        for _, connection, _ in workers:
            connection.sendall(b"g")
        for _, connection, gradients in workers:
            connection.recv(1)
            assert gradients[0] == 3.0

    yield round_
    for process, connection, _ in workers:
        connection.close()
        process.wait()


def bare_worker(connection: socket.socket, shared: int, own: int, megabytes: float) -> None:
    """Answer each byte when the gradients are written, by the code that computes them everywhere."""
    model = model_of(megabytes)
    worker = GradientWorker(Program(model.to_json()))
    layout = model.layout()
    size = layout.size * layout.dtype.itemsize
    params, gradients = Block(shared, size, writable=False).arena(0, layout), Block(own, size).arena(0, layout)
    work, into = GradientWork(0, 0, WORKERS, IMAGES, LABELS), Sheet(gradients, model.statistics_layout.empty())
    with one_blas_thread(find_blas()):
        while connection.recv(1):
            worker.gradients(params, work, StopFlag(), into=into)
            connection.sendall(b"d")


@asynccontextmanager
async def bare_dask_rounds(megabytes: float) -> AsyncIterator[Round]:
    """Offer the same through Dask used directly: scatter, submit, gather."""
    from distributed import Client, LocalCluster

    vector = params_of(megabytes).vector
    number = 0
    cluster = LocalCluster(
        n_workers=WORKERS, threads_per_worker=1, asynchronous=True, dashboard_address=None, host="127.0.0.1"
    )
    async with cluster, Client(cluster, asynchronous=True) as client:

        async def round_() -> None:
            nonlocal number
            number += 1
            future = await client.scatter(vector, broadcast=True, hash=False)
            tasks = [client.submit(doubled, future, number, worker, pure=False) for worker in range(WORKERS)]
            for gradients in await client.gather(tasks):
                assert gradients[0] == 3.0

        yield round_


def doubled(vector: Array, number: int, worker: int) -> Array:
    return np.multiply(vector, 2)


async def timed(round_: Round, warm_up: int, rounds: int) -> list[float]:
    """Return the seconds of each round after the first few."""
    seconds = []
    for number in range(warm_up + rounds):
        start = time.perf_counter()
        await round_()
        if number >= warm_up:
            seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    _socket, _params, _gradients = map(int, sys.argv[1:4])
    bare_worker(socket.socket(fileno=_socket), _params, _gradients, float(sys.argv[4]))
