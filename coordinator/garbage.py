"""Folders of storage that nobody needs any more: who still needs one, and how nobody publishes where files are being deleted.

Artifacts are shared by content: two versions, of two projects even, may have one folder, and so may a job that brings a hub's
model in. Deleting a version therefore only notes its folder; the collector (collector.py) deletes it once nothing refers to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

from sqlmodel import Session, col, or_, select

from common.errors import Unavailable
from coordinator.jobs.states import TERMINAL
from coordinator.store.database import Store
from coordinator.store.tables import DatasetVersion, Endpoint, Garbage, Hold, Job, ModelVersion, now

BASES, DATASETS, JOBS = "bases", "datasets", "jobs"
"""Folders of the storage: models by content, data sets by content, and what runs leave by job and run."""

ROLES = ("dataset", "base", "model")
"""Roles that a job's inputs have."""

UNRESOLVED = ("builtin", "hub", "path")
"""Kinds of models whose content is known only once an agent has brought them into storage."""

HOLD_TIME = timedelta(hours=6)
"""After so long a hold is taken for one that a killed coordinator left behind."""

PATIENCE_SECONDS = 60.0
"""How long an upload waits for a folder whose files are being deleted."""

NOT_ENDED = col(Job.state).notin_([state.value for state in TERMINAL])

STARTED = select(Garbage.uri).where(col(Garbage.start_time).is_not(None))


def discard(session: Session, uri: str) -> None:
    """Note a folder that something which is deleted now had."""
    if uri and session.get(Garbage, uri) is None:
        session.add(Garbage(uri=uri, create_time=now()))


def needed(session: Session, uri: str, storage_uri: str) -> bool:
    """Whether a folder may be read: by a version, an adapter of it, a job that has not ended, an endpoint, or a publisher."""
    folder = folder_of(uri, storage_uri)
    queries: list[Any] = [
        select(DatasetVersion.version).where(DatasetVersion.uri == uri),
        select(ModelVersion.version).where(
            or_(col(ModelVersion.uri) == uri, col(ModelVersion.document)["base_artifact_uri"].as_string() == uri)
        ),
        select(Job.uid).where(NOT_ENDED, or_(*(each == uri for each in _inputs("uri")))),
        select(Hold.id).where(Hold.folder == folder, Hold.expire_time > now()),
    ]
    if folder == BASES:
        kinds = [col(Job.inputs)[("artifacts", role, "kind")].as_string() for role in ROLES]
        queries.append(select(Job.uid).where(NOT_ENDED, or_(*(each.in_(UNRESOLVED) for each in kinds))))
    if any(session.exec(query.limit(1)).first() is not None for query in queries):
        return True
    return any(uri in _served(endpoint, "uri") for endpoint in session.exec(select(Endpoint)).all())


def readers(session: Session, project: str, name: str) -> list[str]:
    """Who reads or serves a version (`name@3`) of a project: jobs that have not ended, and endpoints; the first few, in words."""
    jobs = select(Job.job_id).where(Job.project_id == project, NOT_ENDED, or_(*(each == name for each in _inputs("name"))))
    endpoints = session.exec(select(Endpoint).where(Endpoint.project_id == project)).all()
    return [
        *(f"job {job_id}" for job_id in session.exec(jobs.order_by(col(Job.create_time)).limit(5)).all()),
        *(f"endpoint {endpoint.id}" for endpoint in endpoints if name in _served(endpoint, "name")),
    ]


def folder_of(uri: str, storage_uri: str) -> str:
    """The folder of the storage that a URI lies in; empty for one outside of it."""
    root = storage_uri.rstrip("/") + "/"
    folder, slash, name = uri.removeprefix(root).partition("/")
    return folder if uri.startswith(root) and slash and name else ""


def bases_are_deleted_now(session: Session) -> bool:
    """Whether files of a model by content are being deleted, so that an agent must not bring one in."""
    return _deleted_now(session, BASES)


@asynccontextmanager
async def publishing(store: Store, folder: str) -> AsyncIterator[None]:
    """Hold a folder of the storage while something is published into it and recorded: nothing in it is deleted meanwhile.

    Waits for what is being deleted in it. Raises Unavailable where that takes too long.
    """
    id_ = secrets.token_hex(8)
    deadline = asyncio.get_running_loop().time() + PATIENCE_SECONDS
    while not await store.write(partial(_hold, id_=id_, folder=folder)):
        if asyncio.get_running_loop().time() > deadline:
            raise Unavailable("files are being deleted where yours would go; nothing was recorded, send it again", "STORAGE_BUSY")
        await asyncio.sleep(0.2)
    try:
        yield
    finally:
        with contextlib.suppress(Unavailable):  # it ends by itself then
            await store.write(partial(_release, id_=id_))


def _hold(session: Session, id_: str, folder: str) -> bool:
    if _deleted_now(session, folder):
        return False
    session.add(Hold(id=id_, folder=folder, expire_time=now() + HOLD_TIME))
    return True


def _deleted_now(session: Session, folder: str) -> bool:
    return any(f"/{folder}/" in uri for uri in session.connection().execute(STARTED).scalars())


def _release(session: Session, id_: str) -> None:
    row = session.get(Hold, id_)
    if row is not None:
        session.delete(row)


def _inputs(field: str) -> list[Any]:
    """A field of everything that a job reads, as columns: of the artifacts, and of the bases of adapters."""
    return [col(Job.inputs)[("artifacts", role, *inner, field)].as_string() for role in ROLES for inner in ((), ("base",))]


def _served(endpoint: Endpoint, field: str) -> set[str]:
    documents = (endpoint.desired, endpoint.serving)
    artifacts = [artifact for document in documents for artifact in document.get("artifacts", {}).values()]
    return {each.get(field, "") for artifact in artifacts for each in (artifact, artifact.get("base", {}))}
