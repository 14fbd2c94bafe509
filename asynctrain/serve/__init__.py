"""Training for clients in any language, over gRPC (extra ``grpc``); ``asynctrain.proto`` is the contract.

A server, and a client of it:

    async with at.ThreadExecutor() as executor, serve("service/", executor, port=50051):
        await asyncio.Event().wait()

    async with TrainingClient("127.0.0.1:50051") as client:
        async for event in client.train(data, model="lenet", image_shape=(28, 28, 1), epochs=3):
            print(event)
"""

from __future__ import annotations

from asynctrain.serve.client import RemoteRun, RemoteTraining, Trained, TrainingClient
from asynctrain.serve.limits import Limits
from asynctrain.serve.refusal import Refused
from asynctrain.serve.security import TLS, Tokens
from asynctrain.serve.server import TrainingServer, serve

__all__ = [
    "TLS",
    "Limits",
    "Refused",
    "RemoteRun",
    "RemoteTraining",
    "Tokens",
    "Trained",
    "TrainingClient",
    "TrainingServer",
    "serve",
]
