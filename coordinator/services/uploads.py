"""Taking files in: chunks of a stream into a private folder that is gone afterwards, whatever happens."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from common.errors import InvalidArgument, ResourceExhausted, Violation

MAX_CHUNK = 1 << 20
"""Bytes of one chunk."""


class Staging:
    """Private folders for uploads below one root, which is emptied when the coordinator starts."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self.max_bytes = max_bytes
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True, mode=0o700)

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A fresh folder, removed at the end."""
        path = Path(tempfile.mkdtemp(dir=self._root))
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


class Sink:
    """A file that grows chunk by chunk, counted and hashed."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._file: BinaryIO = path.open("xb")
        self._hash = hashlib.sha256()
        self._max_bytes = max_bytes
        self.size = 0

    def write(self, chunk: bytes) -> None:
        """Append a chunk; raises ResourceExhausted over the limit of the file or of a chunk."""
        if len(chunk) > MAX_CHUNK:
            raise InvalidArgument.of([Violation("chunk", f"{len(chunk)} bytes; send at most {MAX_CHUNK} at a time")])
        self.size += len(chunk)
        if self.size > self._max_bytes:
            raise ResourceExhausted(
                f"the file is larger than {self._max_bytes} bytes; see the setting max_upload_bytes", "FILE_TOO_LARGE"
            )
        self._hash.update(chunk)
        self._file.write(chunk)

    def close(self) -> str:
        """Close the file and return its SHA-256 in hex."""
        self._file.close()
        return self._hash.hexdigest()
