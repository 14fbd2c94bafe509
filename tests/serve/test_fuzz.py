"""Whatever a stranger sends, the answer is a status: never a crash, and nothing is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grpc import aio
from hypothesis import HealthCheck, given, settings

import asynctrain as at
from asynctrain.serve import Limits, TrainingClient, serve
from tests.serve import fuzzing
from tests.serve.remote import OPTIONS

COMMON = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
LIMITS = Limits(runs=10_000, runs_per_client=10_000, ended_runs=20, epoch_samples=10_000, running=4)


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


def fuzz(runner: asyncio.Runner, folder: Path, blobs: at.ArrayDataset, model: at.Model, cases: int) -> None:
    """Send so many streams, single messages and bytes that are none to one server; then train on it."""

    async def opened() -> tuple[Any, ...]:
        executor = at.ThreadExecutor(1)
        serving = serve(folder, executor, limits=LIMITS)
        server = await serving.__aenter__()
        channel = aio.insecure_channel(server.address)
        return executor, serving, server, channel

    executor, serving, server, channel = runner.run(opened())
    try:

        @settings(max_examples=cases, suppress_health_check=COMMON, database=None)
        @given(stream=fuzzing.streams, one=fuzzing.unary, raw=fuzzing.raw)
        def send(stream: list[bytes], one: tuple[str, bytes], raw: bytes) -> None:
            fuzzing.require_answer(runner.run(fuzzing.send_stream(channel, stream)))
            fuzzing.require_answer(runner.run(fuzzing.send_one(channel, *one)))
            runner.run(fuzzing.send_raw(server.address, raw))

        send()

        async def train() -> str:
            async with TrainingClient(server.address) as client:
                return (await client.train(blobs, model=model, **OPTIONS).result()).reason

        assert runner.run(train()) == "finished"
        runner.run(_tidied(server))
    finally:

        async def close() -> None:
            await channel.close(None)
            await serving.__aexit__(None, None, None)
            await executor.aclose()

        runner.run(close())


async def _tidied(server: Any) -> None:
    async with asyncio.timeout(20):
        while "0 bytes" not in repr(server.runs):
            await asyncio.sleep(0.05)


def test_five_hundred_strange_messages_are_each_answered_with_a_status(
    runner: asyncio.Runner, tmp_path: Path, blobs: at.ArrayDataset, model: at.Model
) -> None:
    fuzz(runner, tmp_path, blobs, model, 250)
