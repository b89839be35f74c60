"""Artifacts: a folder in storage plus `manifest.json`, which names every file with its size and SHA-256.

The manifest is written last, so a folder without one is not an artifact yet. The whole is named by its content hash: the
SHA-256 of the manifest, or another one that it declares where content is more than bytes (equal rows, whatever
their files). A node keeps what it fetched under that name, so nothing is fetched twice and nodes share nothing but the storage.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import storage
from common.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from common.node import node_home

NAME = "manifest.json"
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_MANIFEST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """The files of an artifact by relative path. `data` is the manifest file itself, `declared` the hash that it declares."""

    files: dict[str, FileEntry]
    data: bytes
    declared: str = ""

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest's bytes."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def content_hash(self) -> str:
        """What the artifact is known by: the declared hash, else that of the manifest."""
        return self.declared or self.sha256

    @property
    def size_bytes(self) -> int:
        """Size of all files, the manifest not counted."""
        return sum(entry.size for entry in self.files.values())


def build(local_dir: Path, content_hash: str = "") -> Manifest:
    """Read a local folder and return the manifest that it would have. Symbolic links are refused: they may point anywhere."""
    if content_hash:
        _check_hash(content_hash)
    if not local_dir.is_dir():
        raise NotFound(f"there is no folder {local_dir}", "FILE_NOT_FOUND")
    files: dict[str, FileEntry] = {}
    for path in sorted(local_dir.rglob("*")):
        name = path.relative_to(local_dir).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InvalidArgument(
                f"{name!r} in {local_dir} is a link or device; an artifact holds plain files only", "UNSAFE_PATH"
            )
        if path.is_file() and name != NAME:
            storage.check_relative(name)
            files[name] = FileEntry(file_sha256(path), path.stat().st_size)
    if not files:
        raise InvalidArgument(f"the folder {local_dir} holds no files", "EMPTY_ARTIFACT")
    body: dict[str, Any] = {
        "format": 1,
        "files": {name: {"sha256": e.sha256, "size": e.size} for name, e in sorted(files.items())},
    }
    if content_hash:
        body["content_hash"] = content_hash
    return Manifest(files, json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False).encode(), content_hash)


def parse(data: bytes, where: str) -> Manifest:
    """Read the bytes of a manifest; `where` names it in errors. Names that would leave the folder are refused."""
    try:
        body = json.loads(data)
        if body["format"] != 1:
            raise ValueError(f"format {body['format']!r} is not known to this version")
        files = {storage.check_relative(name): _entry(entry) for name, entry in body["files"].items()}
        declared = _check_hash(body["content_hash"]) if "content_hash" in body else ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidArgument) as error:
        raise FailedPrecondition(f"the manifest of {where} cannot be read: {error}", "ARTIFACT_DAMAGED") from error
    if NAME in files or not files:
        raise FailedPrecondition(f"the manifest of {where} names no files or itself", "ARTIFACT_DAMAGED")
    return Manifest(files, data, declared)


def read(uri: str) -> Manifest:
    """Return the manifest of the artifact at a URI. Raises NotFound where there is none."""
    try:
        data = storage.read_bytes(storage.join(uri, NAME), MAX_MANIFEST_BYTES)
    except NotFound as error:
        raise NotFound(f"there is no artifact at {uri}: it has no {NAME}", "ARTIFACT_NOT_FOUND") from error
    return parse(data, uri)


def publish(local_dir: Path, uri: str, content_hash: str = "") -> Manifest:
    """Upload a local folder as the artifact at `uri`, its manifest last. `content_hash` is declared in the manifest where given.

    Publishing the same content again does nothing and returns the manifest that is there. Raises AlreadyExists where another
    artifact is there: artifacts never change.
    """
    manifest = build(local_dir, content_hash)
    with node_lock(f"publish-{hashlib.sha256(uri.encode()).hexdigest()}"):
        if storage.exists(storage.join(uri, NAME)):
            there = read(uri)
            if there.content_hash == manifest.content_hash:
                return there
            raise AlreadyExists(f"another artifact is at {uri} already, and artifacts never change", "ARTIFACT_EXISTS")
        for name in manifest.files:
            storage.upload_file(local_dir / name, storage.join(uri, name))
        storage.write_bytes(storage.join(uri, NAME), manifest.data)
    return manifest


def verify(local_dir: Path) -> Manifest:
    """Check every file of a local artifact against its manifest. Raises FailedPrecondition naming the first that differs."""
    try:
        data = (local_dir / NAME).read_bytes()
    except OSError as error:
        raise NotFound(f"there is no artifact in {local_dir}: it has no {NAME}", "ARTIFACT_NOT_FOUND") from error
    manifest = parse(data, str(local_dir))
    for name, entry in manifest.files.items():
        _check_file(local_dir / name, entry, f"{name} in {local_dir}")
    return manifest


def fetch(uri: str, sha256: str = "") -> Path:
    """Return a local folder with the artifact at `uri`, downloaded and checked unless this node has it already.

    `sha256` is the content hash that is expected; without it, whatever the manifest in storage says is taken. Safe while other
    processes of the node fetch the same. The folder is shared: do not write into it.
    """
    manifest = None if sha256 else read(uri)
    name = manifest.content_hash if manifest else _check_hash(sha256)
    artifacts = node_home() / "artifacts"
    artifacts.mkdir(mode=0o700, exist_ok=True)
    folder, stamps = artifacts / name, artifacts / f"{name}.json"
    if _trusted(folder, stamps):
        return folder
    with node_lock(f"artifact-{name}"):
        if _trusted(folder, stamps):
            return folder
        manifest = manifest or read(uri)
        if name not in (manifest.content_hash, manifest.sha256):
            raise FailedPrecondition(
                f"the artifact at {uri} has the hash {manifest.content_hash}, but {name} was expected", "ARTIFACT_DAMAGED"
            )
        _download(uri, manifest, folder, stamps)
    return folder


def delete(uri: str) -> None:
    """Delete the artifact at a URI, its manifest first: half of one must not look whole. One that is not there is fine."""
    storage.delete_file(storage.join(uri, NAME))
    storage.delete_tree(uri)


def discard(folder: Path) -> None:
    """Remove what `fetch` returned from this node, where nobody will want it again. Safe to call from several processes."""
    with node_lock(f"artifact-{folder.name}"):
        folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def _download(uri: str, manifest: Manifest, folder: Path, stamps: Path) -> None:
    part = folder.parent / f".{uuid.uuid4().hex}.part"
    part.mkdir(mode=0o700)
    try:
        for name, entry in manifest.files.items():
            storage.download_file(storage.join(uri, name), part / name)
            _check_file(part / name, entry, f"{name} at {uri}")
        (part / NAME).write_bytes(manifest.data)
        if folder.exists():
            shutil.rmtree(folder)
        part.replace(folder)
        stamps.write_text(json.dumps(_stamps(folder)))
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _trusted(folder: Path, stamps: Path) -> bool:
    """Whether the files are still the very ones that were checked. Hashing gigabytes at every start would take minutes."""
    try:
        return bool(folder.is_dir() and json.loads(stamps.read_bytes()) == _stamps(folder))
    except (OSError, ValueError):
        return False


def _stamps(folder: Path) -> dict[str, list[int]]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in found}


def _check_hash(text: Any) -> str:
    if not isinstance(text, str) or not SHA256.fullmatch(text):
        raise InvalidArgument(f"{str(text)[:80]!r} is not a SHA-256 in hex", "BAD_HASH")
    return text


def _entry(entry: Any) -> FileEntry:
    sha256, size = entry["sha256"], entry["size"]
    if not isinstance(sha256, str) or not SHA256.fullmatch(sha256) or type(size) is not int or size < 0:
        raise ValueError(f"{entry!r} is not a size and a SHA-256")
    return FileEntry(sha256, size)


def _check_file(path: Path, entry: FileEntry, where: str) -> None:
    if path.is_symlink() or not path.is_file():
        raise FailedPrecondition(f"{where} is missing", "ARTIFACT_DAMAGED")
    size = path.stat().st_size
    if size != entry.size:
        raise FailedPrecondition(f"{where} is damaged: it has {size:,} bytes instead of {entry.size:,}", "ARTIFACT_DAMAGED")
    if file_sha256(path) != entry.sha256:
        raise FailedPrecondition(f"{where} is damaged: its SHA-256 is not the one in the manifest", "ARTIFACT_DAMAGED")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def node_lock(name: str) -> Iterator[None]:
    """Hold a lock that all processes of this node respect; it goes with the process, however that ends."""
    locks = node_home() / "locks"
    locks.mkdir(mode=0o700, exist_ok=True)
    with (locks / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
