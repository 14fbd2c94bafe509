"""Who may call, over which connections, and what is told of secrets: nothing."""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import asynctrain as at
from asynctrain.rpc.security import is_loopback
from asynctrain.serve import TLS, Refused, Tokens, TrainingClient, serve
from asynctrain.serve import asynctrain_pb2 as pb
from asynctrain.serve import asynctrain_pb2_grpc as rpc
from tests.serve.conftest import Serving
from tests.serve.remote import OPTIONS

pytestmark = pytest.mark.one_loop

ALICE, BOB = "alice-0123456789abcdef", "bob-0123456789abcdef"
TOKENS = ["# who may", "", f"alice {ALICE}", f"bob {BOB}"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an authority, and certificates of it for a server and for the client carol."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2")
    for name in ("server", "carol"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "extensions", "-days", "2"]
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)
    return folder


def of(folder: Path, name: str) -> TLS:
    return TLS(folder / f"{name}.pem", folder / f"{name}.key", folder / "ca.pem")


async def refusals(address: str, metadata: Sequence[tuple[str, str]]) -> set[StatusCode]:
    """Return with which statuses all methods of all services are refused."""
    codes = set()
    async with aio.insecure_channel(address) as channel:
        training: Any = rpc.TrainingStub(channel)
        streaming: list[Any] = [training.TrainModel(metadata=metadata)]
        streaming += [training.WatchRun(pb.WatchRunRequest(), metadata=metadata)]
        streaming += [training.GetModel(pb.GetModelRequest(), metadata=metadata)]
        health: Any = health_pb2_grpc.HealthStub(channel)
        streaming += [health.Watch(health_pb2.HealthCheckRequest(), metadata=metadata)]
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        streaming += [reflection.ServerReflectionInfo(metadata=metadata)]
        unary = [health.Check(health_pb2.HealthCheckRequest(), metadata=metadata)]
        for name in (
            "TrainModelUnary",
            "GetRun",
            "ListRuns",
            "PauseRun",
            "ResumeRun",
            "StopRun",
            "CancelRun",
            "Predict",
        ):
            request = pb.TrainModelRequest if name == "TrainModelUnary" else getattr(pb, f"{name}Request")
            unary.append(getattr(training, name)(request(), metadata=metadata))
        for call in (*streaming, *unary):
            codes.add(await call.code())
            call.cancel()
    return codes


def test_the_methods_tried_are_all_there_are() -> None:
    methods = pb.DESCRIPTOR.services_by_name["Training"].methods_by_name
    assert len(methods) == 11


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer wrong-0123456789abcdef"),),
        (("authorization", f"Basic {ALICE}"),),
        (("authorization", ALICE),),
        (("authorization", "Bearer"),),
        (("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {ALICE}")),
    ],
    ids=["no token", "wrong token", "no bearer", "bare", "empty", "twice"],
)
async def test_every_method_is_refused_without_a_token_that_is_known(
    serving: Serving, metadata: Sequence[tuple[str, str]]
) -> None:
    async with serving(tokens=Tokens(TOKENS), reflection=True) as server:
        assert await refusals(server.address, metadata) == {StatusCode.UNAUTHENTICATED}


async def test_a_client_knows_its_own_runs_alone(serving: Serving, blobs: at.ArrayDataset, model: at.Model) -> None:
    async with (
        serving(tokens=Tokens(TOKENS)) as server,
        TrainingClient(server.address, token=ALICE) as alice,
        TrainingClient(server.address, token=BOB) as bob,
    ):
        one = await alice.train(blobs, model=model, idempotency_key="same", **OPTIONS).result()
        other = await bob.train(blobs, model=model, idempotency_key="same", **OPTIONS).result()
        assert one.run_id != other.run_id
        assert [info.run_id for info in await alice.runs()] == [one.run_id]
        with pytest.raises(Refused) as refused:
            await bob.run(one.run_id).cancel()
        assert refused.value.code is StatusCode.NOT_FOUND


async def test_no_token_gets_into_a_log_or_a_message(
    serving: Serving, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = Tokens(TOKENS)
    wrong = "mallory-0123456789abcdef"
    async with serving(tokens=tokens) as server:
        for token in (ALICE, wrong):
            async with TrainingClient(server.address, token=token) as client:
                with pytest.raises(Refused) as refused:
                    await client.run("magic").info()
                assert token not in str(refused.value)
                assert token not in repr(client)
        told = [*map(str, caplog.records), *(record.getMessage() for record in caplog.records), *capfd.readouterr()]
        told += [repr(tokens), repr(server)]
    assert not any(token in text for token in (ALICE, BOB, wrong) for text in told)


def test_tokens_come_from_a_file_or_the_environment_and_wrong_ones_are_not_told(tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("\n".join(TOKENS))
    for tokens in (Tokens.load(tmp_path / "tokens"), Tokens.from_environment({"ASYNCTRAIN_TOKENS": ",".join(TOKENS)})):
        assert tokens is not None
        assert (tokens.name_of(ALICE), tokens.name_of(BOB), tokens.name_of(ALICE[:-1])) == ("alice", "bob", None)
    assert Tokens.from_environment({}) is None
    for lines in (["alice short"], ["alice bob carol-0123456789abcdef"], []):
        with pytest.raises(ValueError, match="token") as error:
            Tokens(lines)
        assert "carol-0123456789abcdef" not in str(error.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])  # noqa: S104 - it is refused
async def test_an_address_that_others_can_reach_is_refused_without_tls(
    executor: at.ThreadExecutor, tmp_path: Path, host: str
) -> None:
    with pytest.raises(ValueError, match="--insecure"):
        async with serve(tmp_path, executor, host=host):
            pass
    assert list(tmp_path.iterdir()) == []


def test_addresses_of_this_machine_alone_are_told_from_others() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "unix:/tmp/socket"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "localhost.example.org", ""]))  # noqa: S104


def test_a_token_is_not_sent_to_another_machine_in_clear() -> None:
    with pytest.raises(ValueError, match="tls"):
        TrainingClient("192.0.2.1:50051", token=ALICE)
    with pytest.raises(ValueError, match="certificate and key"):
        TLS(certificate="server.pem")


async def test_two_servers_do_not_share_a_folder(serving: Serving) -> None:
    async with serving():
        with pytest.raises(OSError, match="another server"):
            async with serving():
                pass


async def test_with_tls_only_clients_with_a_certificate_of_the_authority_are_served(
    serving: Serving, certificates: Path, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with serving(tls=of(certificates, "server")) as server:
        async with TrainingClient(server.address, tls=of(certificates, "carol")) as client:
            trained = await client.train(blobs, model=model, **OPTIONS).result()
            assert server.runs.get("carol", trained.run_id).record.client == "carol"
        async with TrainingClient(server.address, tls=TLS(authority=certificates / "ca.pem"), patience=0) as stranger:
            with pytest.raises(Refused) as refused:
                await stranger.run("magic").info()
            assert refused.value.code is StatusCode.UNAVAILABLE
        async with TrainingClient(server.address, patience=0) as clear:
            with pytest.raises(Refused) as refused:
                await clear.run("magic").info()
            assert refused.value.code is StatusCode.UNAVAILABLE


async def test_the_server_is_healthy_until_it_drains_and_begins_nothing_then(
    serving: Serving, blobs: at.ArrayDataset, model: at.Model
) -> None:
    async with serving() as server, aio.insecure_channel(server.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watching = health.Watch(health_pb2.HealthCheckRequest(service="asynctrain.v1.Training"))
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        async with TrainingClient(server.address, patience=0) as client:
            await server.runs.drain()
            with pytest.raises(Refused) as refused:
                await client.train(blobs, model=model, **OPTIONS).result()
            assert refused.value.code is StatusCode.UNAVAILABLE
        await server.drain(5)
        assert (await watching.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize("asked", [True, False])
async def test_the_services_are_described_when_that_was_asked_for(serving: Serving, asked: bool) -> None:
    async with serving(reflection=asked) as server, aio.insecure_channel(server.address) as channel:
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = reflection.ServerReflectionInfo()
        if asked:
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            names = {service.name for service in (await call.read()).list_services_response.service}
            assert "asynctrain.v1.Training" in names
            call.cancel()
        else:
            assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
