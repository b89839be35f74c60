"""Certificates and keys from files, read before anything listens or connects, so that an error names the setting."""

from __future__ import annotations

import ssl
from pathlib import Path

from common.errors import FailedPrecondition

REASON = "TLS_SETTINGS"


def read_ca(path: Path, setting: str) -> bytes:
    """PEM of the certificates to trust. Raises FailedPrecondition naming the setting."""
    content = _read(path, setting)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError) as error:
        raise FailedPrecondition(f"{setting}: {path} holds no certificate in PEM form", REASON) from error
    return content


def read_pair(cert: Path | None, key: Path | None, cert_setting: str, key_setting: str) -> tuple[bytes, bytes] | None:
    """PEM of a private key and of its certificate with what leads to its CA; None where neither is set.

    Raises FailedPrecondition naming the setting that is missing, cannot be read, or does not go with the other.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        missing, given = (cert_setting, key_setting) if cert is None else (key_setting, cert_setting)
        raise FailedPrecondition(f"{missing} is not set, and {given} is of no use without it", REASON)
    chain, private = _read(cert, cert_setting), _read(key, key_setting)
    try:
        # A key with a passphrase is refused: there is nobody to ask.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        why = (
            "the key is not that of the certificate" if "MISMATCH" in str(error).upper() else "not both in PEM form, unencrypted"
        )
        raise FailedPrecondition(f"{cert_setting} and {key_setting}: {cert} and {key}: {why}", REASON) from error
    return private, chain


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FailedPrecondition(f"{setting}: cannot read {path}: {error.strerror}", REASON) from error
