"""Training for clients in any language, over gRPC (extra ``grpc``); ``asynctrain.proto`` is the contract.

A server, and a client of it:

    async with at.ThreadExecutor() as executor, serve("service/", executor, port=50051):
        await asyncio.Event().wait()

    async with TrainingClient("127.0.0.1:50051") as client:
        async for event in client.train(data, model="lenet", image_shape=(28, 28, 1), epochs=3):
            print(event)
"""

from __future__ import annotations

try:
    from asynctrain.rpc.security import TLS, Tokens
    from asynctrain.serve.client import RemoteRun, RemoteTraining, Trained, TrainingClient
    from asynctrain.serve.limits import Limits
    from asynctrain.serve.refusal import Refused
    from asynctrain.serve.server import TrainingServer, serve
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("google", "grpc", "grpc_health", "grpc_reflection"):
        raise
    raise ModuleNotFoundError('the service is an extra: pip install "asynctrain[grpc]"', name=error.name) from error

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
