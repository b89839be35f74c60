"""From the name of a model to its files: in storage for all nodes, by content, and on this node."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from agents.models import hub
from agents.models.files import gather
from common import manifest, storage
from common.errors import InvalidArgument, NotFound
from common.model_files import check_model_folder
from common.node import node_home
from luthier.agent.v1 import agent_pb2

TINY = "builtin:tiny"


@dataclass(frozen=True)
class Base:
    """A model that lies whole in storage (`uri`, under `content_hash`) and on this node (`local_dir`).

    `name` is what was asked for, `revision` the hub's commit where it came from one. Another node gets the same files by
    `manifest.fetch(uri, content_hash)`.
    """

    local_dir: Path
    uri: str
    content_hash: str
    revision: str
    name: str


def materialise(artifact: agent_pb2.Artifact, storage_uri: str) -> Base:
    """Return the model that an artifact names, brought into storage first where it is not there.

    Raises errors that name the model: NotFound, InvalidArgument for files that are not taken, Unavailable for a hub or storage
    that does not answer.
    """
    if artifact.uri:
        folder = manifest.fetch(artifact.uri, artifact.content_hash)
        return Base(folder, artifact.uri, artifact.content_hash or folder.name, artifact.revision, artifact.name)
    if artifact.kind == "builtin":
        return _builtin(artifact, storage_uri)
    if artifact.kind == "hub":
        return _from_hub(artifact, storage_uri)
    if artifact.kind == "path":
        with _scratch() as folder:
            gather(Path(artifact.name), folder)
            return _publish(folder, artifact, storage_uri, "")
    raise InvalidArgument(f"{artifact.name!r} is no model: an artifact of kind {artifact.kind!r} without a uri", "NOT_A_MODEL")


def _publish(folder: Path, artifact: agent_pb2.Artifact, storage_uri: str, revision: str) -> Base:
    check_model_folder(folder)
    content_hash = manifest.build(folder).sha256
    uri = storage.join(storage_uri, "bases", content_hash)
    manifest.publish(folder, uri)
    return Base(manifest.fetch(uri, content_hash), uri, content_hash, revision, artifact.name)


def _builtin(artifact: agent_pb2.Artifact, storage_uri: str) -> Base:
    if artifact.name != TINY:
        raise NotFound(f"there is no builtin model {artifact.name!r}; there is {TINY}", "MODEL_NOT_FOUND")
    folder = node_home() / "builtin" / f"tiny-{_builtin_key()}"
    with manifest.node_lock(folder.name):
        if not folder.is_dir():
            from agents.models.builtin import build_tiny

            with _scratch() as scratch:
                build_tiny(scratch)
                folder.parent.mkdir(exist_ok=True)
                scratch.replace(folder)
        return _publish(folder, artifact, storage_uri, "")


def _builtin_key() -> str:
    """What the bytes of the builtin model follow from."""
    source = Path(__file__).with_name("builtin.py").read_bytes()
    versions = [version(package) for package in ("torch", "transformers", "tokenizers", "safetensors")]
    return hashlib.sha256("|".join([sys.version, *versions]).encode() + source).hexdigest()[:16]


def _from_hub(artifact: agent_pb2.Artifact, storage_uri: str) -> Base:
    repo = artifact.name.removeprefix("hf:")
    commit, names = hub.resolve_revision(repo, artifact.revision)
    known = storage.join(storage_uri, "bases", "hub", hashlib.sha256(f"{hub.endpoint()}|{repo}|{commit}".encode()).hexdigest())
    if storage.exists(known):
        content_hash = json.loads(storage.read_bytes(known))["content_hash"]
        uri = storage.join(storage_uri, "bases", content_hash)
        # The note outlives the files where these were deleted.
        if storage.exists(storage.join(uri, manifest.NAME)):
            return Base(manifest.fetch(uri, content_hash), uri, content_hash, commit, artifact.name)
    folder = node_home() / "downloads" / f"{repo.replace('/', '--')}-{commit[:40]}"
    with manifest.node_lock(f"download-{folder.name}"):
        hub.download(repo, commit, names, folder)
        base = _publish(folder, artifact, storage_uri, commit)
        shutil.rmtree(folder)
    storage.write_bytes(known, json.dumps({"repo": repo, "revision": commit, "content_hash": base.content_hash}).encode())
    return base


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = node_home() / "scratch" / uuid.uuid4().hex
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
