"""Files at a URI (`file://`, `s3://`, `gs://`, ...), by pyarrow's filesystems, with names that cannot leave their folder."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from pyarrow import fs as pafs

from common.errors import InvalidArgument, NotFound, Unavailable

SCHEMES = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
CHUNK = 4 * 2**20


def check_relative(path: str) -> str:
    """Return `path` if it is a plain relative path with forward slashes, else raise InvalidArgument.

    Refused are absolute paths, `.` and `..`, empty segments, backslashes, drive letters, NUL and other control characters.
    """
    segments = path.split("/")
    if (
        not path
        or len(path) > 1024
        or any(segment in ("", ".", "..") or len(segment.encode(errors="replace")) > 255 for segment in segments)
        or any(ord(character) < 32 or character in "\\\x7f" for character in path)
        or (len(segments[0]) == 2 and segments[0][1] == ":")
    ):
        raise InvalidArgument(
            f"{path[:200]!r} is not a safe file name; use a relative path with forward slashes and without '..'", "UNSAFE_PATH"
        )
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{path[:200]!r} cannot be written as UTF-8", "UNSAFE_PATH") from error
    return path


def join(uri: str, *parts: str) -> str:
    """Append relative paths to a URI, each checked by `check_relative`, quoted so that `#`, `?` and `%` stay part of the name."""
    split = _split(uri)
    tail = [quote(check_relative(part)) for part in parts]
    return urlunsplit(split._replace(path="/".join([split.path.rstrip("/"), *tail])))


def read_bytes(uri: str, limit: int = 2**30) -> bytes:
    """Return a whole file. Raises NotFound, and InvalidArgument where it is larger than `limit`."""
    filesystem, path = _open(uri)
    with _told(uri), filesystem.open_input_stream(path) as stream:
        data = bytearray()
        while len(data) <= limit and (chunk := stream.read(CHUNK)):
            data += chunk
    if len(data) > limit:
        raise InvalidArgument(f"{uri} is larger than {limit:,} bytes", "FILE_TOO_LARGE")
    return bytes(data)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file, durably, in one piece: readers see the old file or the new one."""
    filesystem, path = _open(uri)
    with _told(uri), _writing(filesystem, path) as stream:
        stream.write(data)


def upload_file(source: Path, uri: str) -> None:
    """Copy a local file to a URI, in one piece like `write_bytes`."""
    filesystem, path = _open(uri)
    with source.open("rb") as file, _told(uri), _writing(filesystem, path) as stream:
        shutil.copyfileobj(file, stream, CHUNK)


def download_file(uri: str, target: Path) -> None:
    """Copy a file at a URI to a local path, whose folder is made if absent. Raises NotFound."""
    target.parent.mkdir(parents=True, exist_ok=True)
    filesystem, path = _open(uri)
    with _told(uri), filesystem.open_input_stream(path) as stream, target.open("wb") as file:
        shutil.copyfileobj(stream, file, CHUNK)


def exists(uri: str) -> bool:
    """Whether there is a file or folder at the URI."""
    filesystem, path = _open(uri)
    with _told(uri):
        return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def list_files(uri: str) -> list[str]:
    """Return the relative paths of all files below a folder, sorted; none where the folder does not exist."""
    filesystem, path = _open(uri)
    with _told(uri):
        found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    prefix = path.rstrip("/") + "/"
    return sorted(info.path.removeprefix(prefix) for info in found if info.type == pafs.FileType.File)


def delete_file(uri: str) -> None:
    """Delete a file; one that does not exist is fine."""
    filesystem, path = _open(uri)
    with _told(uri):
        if filesystem.get_file_info(path).type == pafs.FileType.File:
            filesystem.delete_file(path)


def delete_but(uri: str, kept: Collection[str]) -> None:
    """Delete a folder but for the folders within it whose URIs are in `kept`, and what leads to them."""
    folder = uri.rstrip("/") + "/"
    inside = [each for each in kept if each.startswith(folder)]
    if not inside:
        delete_tree(uri)
        return
    filesystem, path = _open(uri)
    with _told(uri):
        found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    for info in found:
        child = join(uri, info.base_name)
        if info.type == pafs.FileType.File:
            delete_file(child)
        elif child not in inside:
            delete_but(child, inside)


def delete_tree(uri: str) -> None:
    """Delete a folder with everything in it; a folder that does not exist is fine. The root of a storage is refused."""
    if len([segment for segment in _split(uri).path.split("/") if segment]) < 1:
        raise InvalidArgument(f"{uri} is the root of a storage and is not deleted", "UNSAFE_PATH")
    filesystem, path = _open(uri)
    with _told(uri):
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.Directory:
            filesystem.delete_dir(path)


def local_path(uri: str) -> Path | None:
    """Return the path of a `file://` URI, and None for any other."""
    split = _split(uri)
    return Path(unquote(split.path)) if split.scheme == "file" else None


def sync_folder(folder: Path) -> None:
    """Make the names in a local folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _split(uri: str) -> SplitResult:
    try:
        split = urlsplit(uri)
    except ValueError as error:
        raise InvalidArgument(f"{uri[:200]!r} is not a URI: {error}", "BAD_URI") from error
    if split.scheme not in SCHEMES:
        raise InvalidArgument(f"{uri[:200]!r} is not a storage URI; it has to begin with one of {', '.join(SCHEMES)}", "BAD_URI")
    path = unquote(split.path)
    if split.fragment or "\0" in path or any(segment in (".", "..") for segment in path.split("/")):
        raise InvalidArgument(f"{uri[:200]!r} is not a safe URI: no '#', NUL, '.' or '..' in it", "BAD_URI")
    if (split.scheme == "file") == bool(split.netloc) or (split.scheme == "file" and not path.startswith("/")):
        raise InvalidArgument(f"{uri[:200]!r} is not a storage URI; use file:///absolute/path or s3://bucket/path", "BAD_URI")
    return split


def _open(uri: str) -> tuple[Any, str]:
    split = _split(uri)
    filesystem, base = _filesystem(urlunsplit(split._replace(path="/")))
    return filesystem, base.rstrip("/") + "/" + unquote(split.path).strip("/") if base.strip("/") else unquote(split.path)


@lru_cache(maxsize=32)
def _filesystem(root: str) -> tuple[Any, str]:
    """Making a filesystem may ask the network (an S3 bucket's region), so it is done once a root."""
    try:
        filesystem, base = pafs.FileSystem.from_uri(root)
    except OSError as error:
        raise Unavailable(f"the storage at {root} cannot be opened: {error}", "STORAGE_UNAVAILABLE") from error
    except (ValueError, NotImplementedError) as error:
        raise InvalidArgument(f"{root} is not a storage URI: {error}", "BAD_URI") from error
    return filesystem, base


@contextmanager
def _writing(filesystem: Any, path: str) -> Iterator[BinaryIO]:
    if not isinstance(filesystem, pafs.LocalFileSystem):
        # Object stores show a file only once it is closed.
        with filesystem.open_output_stream(path) as stream:
            yield stream
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{uuid.uuid4().hex}.part"
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(target.parent)


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Turn the system's errors into ones that name the URI."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"there is no file at {uri}", "FILE_NOT_FOUND") from error
    except OSError as error:
        raise Unavailable(f"the storage failed at {uri}: {error.strerror or error}", "STORAGE_UNAVAILABLE") from error
