"""The homes that ``--executor`` names: ``threads:2``, ``processes``, ``dask``, ``grpc://HOST:PORT``, ..."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

import asynctrain as at

if TYPE_CHECKING:
    from asynctrain.rpc import Access

TOKEN = "ASYNCTRAIN_TOKEN"  # noqa: S105 - the environment's variable
EXTRA = 'workers over gRPC are an extra: pip install "asynctrain[cli,grpc]"'
OPTIONS = ("ca", "cert", "insecure", "join_wait", "key", "token", "tokens")
LISTEN = "listen:"
FOR_PEOPLE = 600.0  # seconds that who listens waits for the first worker, which somebody has yet to start

Make = Callable[[str], at.Executor]
"""Makes an executor of what stands behind the colon, if anything; ``ValueError`` where that is not understood."""


def _counted(executor: Callable[[int | None], at.Executor]) -> Make:
    """Take a number of workers; nothing stands for one for each CPU."""

    def make(workers: str) -> at.Executor:
        if workers and not (workers.isdecimal() and int(workers) >= 1):
            raise ValueError("N must be at least 1")
        return executor(int(workers) if workers else None)

    return make


def _inline(rest: str) -> at.Executor:
    if rest:
        raise ValueError("inline has no number")
    return at.InlineExecutor()


def _dask(address: str) -> at.Executor:
    if address and "://" not in address:
        raise ValueError("the address of a scheduler is written tcp://HOST:PORT")
    return at.DaskExecutor(address or None)


def _workers_at(rest: str) -> at.Executor:
    """Return the executor of what stands behind ``grpc:`` in ``grpc://HOST:PORT,listen:HOST:PORT?option=value&...``.

    Addresses are dialled, except one behind ``listen:``, where workers dial in. The options are ``ca``, ``cert`` and
    ``key`` (files of TLS, in PEM), ``token`` and ``tokens`` (files), ``insecure``, and ``join_wait`` (seconds).

    Raises:
        ValueError: it is not of this form, or a file cannot be read.
        ModuleNotFoundError: the extra is not installed.
    """
    try:
        from asynctrain.rpc import GrpcExecutor
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(EXTRA, name=error.name) from error

    places, _, query = rest.removeprefix("//").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if foreign := options.keys() - set(OPTIONS):
        raise ValueError(f"options are {', '.join(OPTIONS)}, got {', '.join(sorted(foreign))}")
    listens = [place.removeprefix(LISTEN) for place in places.split(",") if place.startswith(LISTEN)]
    addresses = [place for place in places.split(",") if place and not place.startswith(LISTEN)]
    if not rest.startswith("//") or len(listens) > 1:
        raise ValueError("it must be grpc:// and addresses, of which one may begin with listen:")
    file = {name: Path(options[name]) if name in options else None for name in ("token", "tokens", "cert", "key", "ca")}
    try:
        access = access_of(
            file["token"], file["tokens"], file["cert"], file["key"], file["ca"], "insecure" in options, bool(listens)
        )
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error
    join_wait = float(options.get("join_wait", FOR_PEOPLE if listens else 30.0))
    return GrpcExecutor(*addresses, listen=listens[0] if listens else None, access=access, join_wait=join_wait)


def access_of(
    token: Path | None,
    tokens: Path | None,
    certificate: Path | None,
    key: Path | None,
    authority: Path | None,
    insecure: bool,
    listens: bool,
) -> Access:
    """Return who may connect, by the files that options name. Blocks; raises ``OSError`` and ``ValueError``."""
    from asynctrain.rpc import TLS, Access, Tokens

    tls = None if certificate is key is authority is None else TLS(certificate, key, authority)
    known = None
    if listens:
        known = Tokens.from_environment(os.environ) if tokens is None else Tokens.load(tokens)
    ours = os.environ.get(TOKEN) if token is None else token.read_text(encoding="utf-8").strip()
    return Access(tls=tls, tokens=known, token=ours, insecure=insecure)


EXECUTORS: dict[str, tuple[str, Make]] = {  # by what stands before the colon: how it is written, and what makes it
    "inline": ("inline", _inline),
    "threads": ("threads[:N]", _counted(at.ThreadExecutor)),
    "processes": ("processes[:N]", _counted(at.ProcessExecutor)),
    "dask": ("dask[:tcp://HOST:PORT]", _dask),
    "grpc": ("grpc://[listen:]HOST:PORT[,...]", _workers_at),
}


def make_executor(text: str) -> at.Executor:
    """Return the home that ``text`` stands for: ``inline``, ``threads`` (one for each CPU), ``processes:2``, ...

    Raises:
        ValueError: it stands for none.
        ModuleNotFoundError: it needs an extra that is not installed; the message says which.
    """
    kind, colon, rest = text.partition(":")
    try:
        _, make = EXECUTORS[kind if rest or not colon else text]
        return make(rest)
    except (KeyError, ValueError) as error:
        forms = ", ".join(form for form, _ in EXECUTORS.values())
        reason = f": {error}" if kind == "grpc" else ""
        raise ValueError(f"executor must be one of {forms} with N at least 1, got {text!r}{reason}") from error
