"""The client's side of TLS: which files it reads, and what to say when the two sides do not agree."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpc

from luthier.client.errors import InvalidArgument


@dataclass(frozen=True)
class Tls:
    """Paths of PEM files; empty where there are none, and without a CA nothing is encrypted."""

    ca: str = ""
    cert: str = ""
    key: str = ""

    @classmethod
    def of(cls, ca: Path | str | None = None, cert: Path | str | None = None, key: Path | str | None = None) -> Self:
        """What is given, else `LUTHIER_CA`, `LUTHIER_CERT` and `LUTHIER_KEY`; an empty text overrides them."""
        given = {"LUTHIER_CA": ca, "LUTHIER_CERT": cert, "LUTHIER_KEY": key}
        return cls(*(os.environ.get(name, "") if value is None else str(value) for name, value in given.items()))

    def credentials(self) -> grpc.ChannelCredentials | None:
        """The channel's credentials; None for one without TLS. Raises InvalidArgument naming a bad path."""
        if bool(self.cert) != bool(self.key):
            missing, given = ("key (LUTHIER_KEY)", "cert") if self.cert else ("cert (LUTHIER_CERT)", "key")
            raise _bad(f"{missing} is missing, and {given} is of no use without it")
        if not self.ca:
            if self.cert:
                raise _bad("ca (LUTHIER_CA) is missing: a certificate is shown only to a coordinator that is checked itself")
            return None
        ca = _read(self.ca, "ca (LUTHIER_CA)")
        pair: tuple[bytes, ...] = ()
        if b"-----BEGIN CERTIFICATE-----" not in ca:
            raise _bad(f"ca (LUTHIER_CA): {self.ca} holds no certificate in PEM form")
        if self.cert:
            pair = _read(self.key, "key (LUTHIER_KEY)"), _read(self.cert, "cert (LUTHIER_CERT)")
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(self.cert, self.key, password=lambda: b"")
            except (ssl.SSLError, ValueError) as error:
                why = "not a certificate and its own key, both in PEM form and without a passphrase"
                raise _bad(f"cert (LUTHIER_CERT) and key (LUTHIER_KEY): {self.cert} and {self.key}: {why}") from error
        return grpc.ssl_channel_credentials(ca, *pair)

    def advice(self, details: str) -> str:
        """What to do about gRPC's own words for a connection that was not made; empty where TLS is not why."""
        if "failed to connect" not in details.lower():
            return ""
        closed = "socket closed" in details.lower() or "connection reset" in details.lower()
        if not self.ca:
            return "it hangs up at once: if it takes TLS only, set LUTHIER_CA to the file with its CA" if closed else ""
        if "WRONG_VERSION_NUMBER" in details:
            return "it does not speak TLS: unset LUTHIER_CA"
        if "CERTIFICATE_VERIFY_FAILED" in details:
            return f"its certificate is not signed by the CA in {self.ca} (LUTHIER_CA)"
        if "peer name" in details.lower() or "hostname" in details.lower():
            return "its certificate is not for this address: connect by the name that it was made for"
        if not closed:
            return ""
        if self.cert:
            return f"it hangs up at once: it may not know the CA of the certificate in {self.cert} (LUTHIER_CERT)"
        return "it hangs up at once: if it asks for a client's certificate, set LUTHIER_CERT and LUTHIER_KEY"


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _bad(f"{name}: cannot read {path}: {error.strerror}") from error


def _bad(message: str) -> InvalidArgument:
    return InvalidArgument(message, grpc.StatusCode.INVALID_ARGUMENT, "TLS_SETTINGS")
