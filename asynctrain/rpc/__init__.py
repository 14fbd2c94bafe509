"""Workers on other machines, over gRPC (extra ``grpc``); ``worker.proto`` is the contract.

async with GrpcExecutor("127.0.0.1:50052") as executor:
    trainer = at.Trainer(model, optimizer=optimizer, executor=executor)
"""

from __future__ import annotations

from asynctrain.rpc.coordinator import WorkerLimits
from asynctrain.rpc.executor import GrpcExecutor
from asynctrain.rpc.security import TLS, Tokens
from asynctrain.rpc.wire import Access
from asynctrain.rpc.worker import Worker, dial, dialling, listen

__all__ = ["TLS", "Access", "GrpcExecutor", "Tokens", "Worker", "WorkerLimits", "dial", "dialling", "listen"]
