"""Who may call the service, and over which connections."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import grpc

ANYONE = "anyone"  # the client's name where nobody has to tell who they are
TOKENS = "ASYNCTRAIN_TOKENS"  # the environment's variable
SHORTEST = 16  # characters of a token


class Tokens:
    """The bearer tokens that the service knows, and whose they are; only their digests are kept.

    Args:
        lines: ``NAME TOKEN`` each, or only a token, of the client ``client``. Empty ones and those that begin with
            ``#`` do not count. One name may have several tokens, so that one can be replaced by another.

    Raises:
        ValueError: a line is none of these, or a token is too short; the message does not tell it.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._names: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) > 2 or len(words[-1]) < SHORTEST:
                raise ValueError(
                    f"line {number} of the tokens must be NAME TOKEN, the token of {SHORTEST} characters or more"
                )
            self._names[_digest(words[-1])] = words[0] if len(words) == 2 else "client"
        if not self._names:
            raise ValueError("tokens must be at least one, got none")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Tokens:
        """Return the tokens of a file. Blocks; raises ``OSError`` and ``ValueError``."""
        return cls(Path(path).read_text(encoding="utf-8").splitlines())

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Tokens | None:
        """Return the tokens of ``ASYNCTRAIN_TOKENS``, divided by commas or line ends; None where it is not set."""
        text = environment.get(TOKENS)
        return None if text is None else cls(text.replace(",", "\n").splitlines())

    def name_of(self, token: str) -> str | None:
        """Return whose token this is, None where it is nobody's; takes as long whichever it is."""
        given = _digest(token)
        found = None
        for digest, name in self._names.items():
            if hmac.compare_digest(digest, given):
                found = name
        return found

    def __repr__(self) -> str:
        return f"<Tokens of {', '.join(sorted(set(self._names.values())))}>"


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


@dataclass(frozen=True, slots=True)
class TLS:
    """The files, in PEM, of a connection that others cannot read.

    Attributes:
        certificate: of the server, with the chain up to its authority; of a client, where the server asks for one.
        key: of the certificate.
        authority: whose certificates are accepted from the other side. A server that is given one asks every client for
            a certificate; a client needs it where its system does not know the server's.
    """

    certificate: str | PathLike[str] | None = None
    key: str | PathLike[str] | None = None
    authority: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key must be given together")

    def of_server(self) -> grpc.ServerCredentials:
        """Return a server's credentials. Blocks; raises ``OSError``, ``ValueError`` without a certificate."""
        certificate, key, authority = self._contents()
        if certificate is None or key is None:
            raise ValueError("a server must have a certificate and its key")
        return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=authority is not None)

    def of_client(self) -> grpc.ChannelCredentials:
        """Return a client's credentials. Blocks; raises ``OSError``."""
        certificate, key, authority = self._contents()
        return grpc.ssl_channel_credentials(authority, key, certificate)

    def _contents(self) -> tuple[bytes | None, bytes | None, bytes | None]:
        certificate, key, authority = (
            None if path is None else Path(path).read_bytes() for path in (self.certificate, self.key, self.authority)
        )
        return certificate, key, authority


def require_safe(host: str, encrypted: bool, insecure: bool) -> None:
    """Raise ``ValueError`` where ``host`` lets other machines in, unencrypted, and that is not what was spelled out."""
    if not (encrypted or insecure or is_loopback(host)):
        raise ValueError(
            f"{host} can be reached from other machines: give the server a certificate, or spell out --insecure"
        )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach ``host``."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
