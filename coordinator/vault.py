"""Encrypting secrets for the store: AES-256-GCM under keys that are derived from a file, which the store never sees.

A key file holds one key a line, 32 random bytes in URL-safe base64. What is set is encrypted under the first one; the others only
decrypt, so that keys can be changed. The key of AES and the name of the key in the store come from it by HKDF (RFC 5869). Project
and name of a secret are authenticated with its value, as associated data: a row that was copied to another does not decrypt.
"""

from __future__ import annotations

import base64
import binascii
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import FailedPrecondition

KEY_BYTES = 32
NONCE_BYTES = 12
KEY_FILE = "secrets.key"
"""File in the home where no other is named by the setting `secrets_key_path`."""

SETTING = "secrets_key_path"


@dataclass(frozen=True)
class Sealed:
    """An encrypted value, and the name of the key that it is encrypted under."""

    key_id: str
    ciphertext: str


class Vault:
    """Encrypts and decrypts. The keys are in memory alone, and in no error or representation."""

    def __init__(self, keys: Sequence[bytes], path: Path | str) -> None:
        self.path = path
        self._ciphers: Mapping[str, AESGCM] = {_derive(key, b"key id", 8).hex(): AESGCM(_derive(key, b"aes")) for key in keys}
        self.key_id = next(iter(self._ciphers))
        """Name of the key that is used for what is set now."""

    @property
    def key_ids(self) -> frozenset[str]:
        """Names of the keys that can decrypt."""
        return frozenset(self._ciphers)

    @classmethod
    def of(cls, path: Path | None, home: Path) -> Vault:
        """Read the key file; without a path the home's own, which is made where there is none.

        Raises FailedPrecondition, naming the setting, where the file is missing, open to everybody, or holds no keys.
        """
        if path is None:
            path = home / KEY_FILE
            _make(path)
        try:
            mode, text = path.stat().st_mode, path.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "not a text file"
            raise _refused(f"{path} cannot be read: {why}; make one with `{MAKE_ONE.format(path)}`") from None
        if mode & 0o007:
            raise _refused(f"everybody on this machine may use {path}; `chmod o= {path}`")
        lines = [line.strip() for line in text.splitlines()]
        keys = [_decoded(line, path, number) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]
        if not keys:
            raise _refused(f"{path} holds no key; make one with `{MAKE_ONE.format(path)}`")
        return cls(keys, path)

    def seal(self, project: str, name: str, value: str) -> Sealed:
        """Encrypt the value of a project's secret under the first key."""
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._ciphers[self.key_id].encrypt(nonce, value.encode(), _bound(project, name))
        return Sealed(self.key_id, base64.urlsafe_b64encode(nonce + sealed).decode())

    def open(self, project: str, name: str, sealed: Sealed) -> str:
        """Decrypt. Raises FailedPrecondition where the key is not among ours, or the value was not written for this name."""
        cipher = self._ciphers.get(sealed.key_id)
        if cipher is None:
            raise self.unknown_key(sealed.key_id)
        raw = base64.urlsafe_b64decode(sealed.ciphertext)
        try:
            return cipher.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], _bound(project, name)).decode()
        except InvalidTag:
            why = f"the stored value of secret {name!r} is damaged, or was written for another name or project; set it again"
            raise FailedPrecondition(why, "SECRET_DAMAGED") from None

    def unknown_key(self, key_id: str) -> FailedPrecondition:
        """The error where the store's secrets are encrypted under a key that the file does not hold."""
        return _refused(
            f"{self.path} does not hold the key {key_id} that secrets in the store are encrypted with (it holds "
            f"{', '.join(self._ciphers)}). All coordinators of a store need the same file, and a key that is replaced stays "
            "in it below the new one until each of them was started again. If it is lost, so are the secrets: empty the table "
            "`secret`, then set them again"
        )


MAKE_ONE = "(umask 077; openssl rand -base64 32 | tr '+/' '-_' > {})"
"""How a person makes a key file."""


def _derive(key: bytes, purpose: bytes, length: int = KEY_BYTES) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=b"luthier secrets 1: " + purpose).derive(key)


def _bound(project: str, name: str) -> bytes:
    return f"projects/{project}/secrets/{name}".encode()


def _decoded(line: str, path: Path, number: int) -> bytes:
    try:
        key = base64.b64decode(line, altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise _refused(f"line {number} of {path} is no key of {KEY_BYTES} bytes in URL-safe base64")
    return key


def _make(path: Path) -> None:
    """Make a key file that only its owner may read, whole or not at all; one that is there stays as it is."""
    if path.exists():
        return
    half = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).decode() + "\n")
        file.flush()
        os.fsync(file.fileno())
    half.rename(path)


def _refused(why: str) -> FailedPrecondition:
    return FailedPrecondition(f"{SETTING}: {why}", "SECRETS_KEY")
