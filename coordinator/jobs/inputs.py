"""Whether what a new job reads is still there: it was looked up before the transaction that records the job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import bindparam, tuple_
from sqlmodel import Session, select

from common.errors import LuthierError, NotFound, Unavailable, Violation
from coordinator.garbage import UNRESOLVED, bases_are_deleted_now
from coordinator.store.tables import DatasetVersion, ModelVersion

Artifacts = Mapping[str, Mapping[str, Any]]
"""What a job reads by role, Artifacts (agent.proto) as JSON."""

Reference = tuple[str, str, str, int]
"""Kind (dataset or registry), project, name and version."""


def check_inputs(session: Session, project: str, artifacts: Artifacts) -> None:
    """Raise NotFound where something that a job reads was deleted since it was looked up."""
    (error,) = missing(session, [(project, artifacts)])
    if error is not None:
        raise error


def missing(session: Session, jobs: Sequence[tuple[str, Artifacts]]) -> list[LuthierError | None]:
    """For each of some jobs, by its project and what it reads: the error where that is not there any more."""
    wanted = {reference for project, artifacts in jobs for _, reference in _references(project, artifacts)}
    there = _there(session, wanted)
    unresolved = [any(artifact.get("kind") in UNRESOLVED for artifact in artifacts.values()) for _, artifacts in jobs]
    busy = any(unresolved) and bases_are_deleted_now(session)
    found: list[LuthierError | None] = []
    for (project, artifacts), brings in zip(jobs, unresolved, strict=True):
        gone = [(role, each) for role, each in _references(project, artifacts) if each not in there]
        if gone:
            role, (_, _, name, version) = gone[0]
            why = f"{name}@{version} has just been deleted"
            found.append(NotFound(why, violations=[Violation(f"job.{role}", why)]))
        else:
            why = "files of a model are being deleted, so none can be brought in now; nothing was recorded, send it again"
            found.append(Unavailable(why, "STORAGE_BUSY") if brings and busy else None)
    return found


def _references(project: str, artifacts: Artifacts) -> list[tuple[str, Reference]]:
    found = []
    for role, artifact in artifacts.items():
        name, _, version = artifact.get("name", "").partition("@")
        if artifact.get("kind") in ("dataset", "registry") and version.isdecimal():
            found.append((role, (artifact["kind"], project, name, int(version))))
    return found


def _there(session: Session, wanted: set[Reference]) -> set[Reference]:
    there: set[Reference] = set()
    for kind, query in _VERSIONS.items():
        keys = [reference[1:] for reference in wanted if reference[0] == kind]
        if keys:
            rows = session.connection().execute(query, {"keys": keys})
            there |= {(kind, row[0], row[1], row[2]) for row in rows}
    return there


def _versions(*columns: Any) -> Any:
    return select(*columns).where(tuple_(*columns).in_(bindparam("keys", expanding=True)))


# Built once: to build a statement takes longer than to run it.
_VERSIONS = {
    "dataset": _versions(DatasetVersion.project_id, DatasetVersion.dataset_id, DatasetVersion.version),
    "registry": _versions(ModelVersion.project_id, ModelVersion.model_id, ModelVersion.version),
}
