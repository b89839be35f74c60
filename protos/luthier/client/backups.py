"""Receiving a backup: into a private file that is there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import grpc

from luthier.client.errors import Internal, InvalidArgument
from luthier.v1.admin_pb2 import BackupRecordsResponse, BackupSummary

BackupProgress = Callable[[str, int, int], None]
"""Called with what is counted (`rows` that the coordinator has read, then `bytes` that came), how many, and how many in all."""


def receive(parts: Iterable[BackupRecordsResponse], path: Path, progress: BackupProgress | None) -> BackupSummary:
    """Write a backup to a new file and return what it is. Raises InvalidArgument where there is such a file already."""
    if path.exists():
        raise InvalidArgument(f"there is a file {path} already; choose another name", grpc.StatusCode.INVALID_ARGUMENT)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    unfinished = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            digest, size, summary = hashlib.sha256(), 0, None
            for part in parts:
                kind = part.WhichOneof("part")
                if kind == "summary":
                    summary = part.summary
                elif kind == "chunk":
                    file.write(part.chunk)
                    digest.update(part.chunk)
                    size += len(part.chunk)
                    if progress and summary:
                        progress("bytes", size, summary.size_bytes)
                elif kind == "progress" and progress:
                    progress("rows", part.progress.rows, part.progress.total_rows)
            if summary is None or (size, digest.hexdigest()) != (summary.size_bytes, summary.sha256):
                raise Internal("the backup did not arrive as it was sent; try again", grpc.StatusCode.DATA_LOSS)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return summary
