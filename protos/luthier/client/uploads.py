"""Streaming files up: the messages of an upload, a few hundred kilobytes at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from luthier.client.errors import InvalidArgument
from luthier.v1.dataset_pb2 import UploadDatasetHeader, UploadDatasetRequest
from luthier.v1.model_pb2 import UploadModelFile, UploadModelHeader, UploadModelRequest

CODE = grpc.StatusCode.INVALID_ARGUMENT
CHUNK_BYTES = 512 * 1024

Progress = Callable[[int, int], None]
"""Called with the bytes sent so far and the bytes in all."""


def chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file in pieces that fit a message."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    for piece in chunks(path):
        digest.update(piece)
    return digest.hexdigest()


def dataset_messages(header: UploadDatasetHeader, path: Path, progress: Progress | None) -> Iterator[UploadDatasetRequest]:
    """The header, then the file."""
    total, sent = path.stat().st_size, 0
    yield UploadDatasetRequest(header=header)
    for piece in chunks(path):
        yield UploadDatasetRequest(chunk=piece)
        sent += len(piece)
        if progress:
            progress(sent, total)


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder in a fixed order, without hidden ones (`.git`, `.cache`)."""
    if not folder.is_dir():
        raise InvalidArgument(
            f"{folder} is not a folder; a model is a folder with config.json, weights and tokenizer files", CODE
        )
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise InvalidArgument(f"{folder} holds no files; a model is a folder with config.json, weights and tokenizer files", CODE)
    return files


def model_messages(
    header: UploadModelHeader, folder: Path, files: list[Path], progress: Progress | None
) -> Iterator[UploadModelRequest]:
    """The header, then for each file its opening and its bytes."""
    sizes = {path: path.stat().st_size for path in files}
    total, sent = sum(sizes.values()), 0
    yield UploadModelRequest(header=header)
    for path in files:
        yield UploadModelRequest(file=UploadModelFile(path=path.relative_to(folder).as_posix(), size_bytes=sizes[path]))
        for piece in chunks(path):
            yield UploadModelRequest(chunk=piece)
            sent += len(piece)
            if progress:
                progress(sent, total)
