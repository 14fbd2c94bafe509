"""A coordinator that always computes, as a command: prints its address, and when told to stop, what came of it."""

from __future__ import annotations

import asyncio
import json
import sys

import asynctrain as at
from asynctrain.rpc import GrpcExecutor, Worker, dialling
from tests.rpc import fuzzing


async def main() -> None:
    async with GrpcExecutor(listen="127.0.0.1:0", heartbeat=60) as executor, at.ThreadExecutor(1) as home:
        address = await executor.listening()
        async with dialling(Worker(home, capacity=1), address), fuzzing.busy(executor) as session:
            print(json.dumps({"address": address}), flush=True)  # noqa: T201 - for a test
            await asyncio.to_thread(sys.stdin.readline)
            right = await fuzzing.bits(session) == await fuzzing.expected()
            print("the bits are", "right" if right else "wrong", flush=True)  # noqa: T201


if __name__ == "__main__":
    asyncio.run(main())
