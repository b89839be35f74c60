"""Finding and adding data set versions and model versions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sqlalchemy import bindparam, func, update
from sqlmodel import Session, col, select

from common.errors import FailedPrecondition, NotFound
from common.names import VersionRef
from coordinator.messages import document, parse, stamp
from coordinator.store import tables
from coordinator.store.tables import now
from luthier.v1 import dataset_pb2, model_pb2

# Built once: to build a statement takes longer than to run it, and every new job asks for what it reads.
_LATEST_DATASET = (
    select(tables.DatasetVersion)
    .where(tables.DatasetVersion.project_id == bindparam("project"), tables.DatasetVersion.dataset_id == bindparam("id"))
    .order_by(col(tables.DatasetVersion.version).desc())
    .limit(1)
)
_LATEST_MODEL = (
    select(tables.ModelVersion)
    .where(tables.ModelVersion.project_id == bindparam("project"), tables.ModelVersion.model_id == bindparam("id"))
    .order_by(col(tables.ModelVersion.version).desc())
    .limit(1)
)


def find_dataset(session: Session, project: str, ref: VersionRef) -> tables.DatasetVersion:
    """Return the version a reference stands for; NotFound says which part is missing."""
    row: tables.DatasetVersion | None = None
    if ref.version == "latest":
        row = session.exec(_LATEST_DATASET, params={"project": project, "id": ref.id}).first()
    elif ref.version.isdecimal():
        row = session.get(tables.DatasetVersion, (project, ref.id, int(ref.version)))
    if row is None:
        if session.get(tables.Dataset, (project, ref.id)) is None:
            raise NotFound(f"there is no data set {ref.id!r}; `luthier dataset list` shows those there are", "DATASET_NOT_FOUND")
        there = _there(latest_datasets(session, project, [ref.id]).get(ref.id, 0))
        raise NotFound(f"data set {ref.id!r} has no version {ref.version!r}; {there}", "DATASET_NOT_FOUND")
    return row


def find_model(session: Session, project: str, ref: VersionRef) -> tables.ModelVersion:
    """Return the version a number, an alias or `latest` stands for; NotFound says which part is missing."""
    row: tables.ModelVersion | None = None
    if ref.version == "latest":
        row = session.exec(_LATEST_MODEL, params={"project": project, "id": ref.id}).first()
    elif ref.version.isdecimal():
        row = session.get(tables.ModelVersion, (project, ref.id, int(ref.version)))
    else:
        alias = session.get(tables.ModelAlias, (project, ref.id, ref.version))
        row = session.get(tables.ModelVersion, (project, ref.id, alias.version)) if alias else None
    if row is None:
        if session.get(tables.Model, (project, ref.id)) is None:
            raise NotFound(f"there is no model {ref.id!r}; `luthier model list` shows those there are", "MODEL_NOT_FOUND")
        there = _there(latest_models(session, project, [ref.id]).get(ref.id, 0))
        raise NotFound(f"model {ref.id!r} has no version {ref.version!r}; {there}", "MODEL_NOT_FOUND")
    return row


def _there(latest: int) -> str:
    return f"its latest is {latest}" if latest else "all that it had were deleted"


def latest_datasets(session: Session, project: str, ids: Collection[str]) -> dict[str, int]:
    """Number of the latest version of each of some data sets that has one. The next one's number follows on the latest ever."""
    version = tables.DatasetVersion
    query = select(version.dataset_id, func.max(version.version)).where(version.project_id == project)
    return dict(session.exec(query.where(col(version.dataset_id).in_(ids)).group_by(version.dataset_id)).all())


def latest_models(session: Session, project: str, ids: Collection[str]) -> dict[str, int]:
    """Number of the latest version of each of some models that has one. The next one's number follows on the latest ever."""
    version = tables.ModelVersion
    query = select(version.model_id, func.max(version.version)).where(version.project_id == project)
    return dict(session.exec(query.where(col(version.model_id).in_(ids)).group_by(version.model_id)).all())


def model_version(session: Session, row: tables.ModelVersion) -> model_pb2.ModelVersion:
    """A version's row, with the aliases that point at it, as the contract's message."""
    message = parse(row.document, model_pb2.ModelVersion())
    message.name = f"projects/{row.project_id}/models/{row.model_id}/versions/{row.version}"
    aliases = select(tables.ModelAlias.alias).where(
        tables.ModelAlias.project_id == row.project_id,
        tables.ModelAlias.model_id == row.model_id,
        tables.ModelAlias.version == row.version,
    )
    message.aliases.extend(sorted(session.exec(aliases)))
    return message


def add_dataset_version(
    session: Session,
    project: str,
    dataset_id: str,
    version: dataset_pb2.DatasetVersion,
    manifest_sha256: str,
    request_id: str,
    request_sha256: str,
) -> tables.DatasetVersion:
    """Record the next version of a data set, making the data set if it is the first."""
    number = _next_number(session, tables.Dataset, project, dataset_id)
    version.name = f"projects/{project}/datasets/{dataset_id}/versions/{number}"
    version.state = dataset_pb2.DATASET_STATE_READY
    moment = now()
    version.create_time.CopyFrom(stamp(moment))  # type: ignore[arg-type]
    row = tables.DatasetVersion(
        project_id=project,
        dataset_id=dataset_id,
        version=number,
        content_hash=version.content_hash,
        manifest_sha256=manifest_sha256,
        uri=version.uri,
        document=document(version),
        request_id=request_id or None,
        request_sha256=request_sha256,
        create_time=moment,
    )
    session.add(row)
    return row


def add_model_version(
    session: Session,
    project: str,
    model_id: str,
    version: model_pb2.ModelVersion,
    *,
    job_uid: str = "",
    request_id: str = "",
    request_sha256: str = "",
) -> tables.ModelVersion:
    """Record the next version of a model, making the model if it is the first."""
    number = _next_number(session, tables.Model, project, model_id)
    version.name = f"projects/{project}/models/{model_id}/versions/{number}"
    moment = now()
    version.create_time.CopyFrom(stamp(moment))  # type: ignore[arg-type]
    row = tables.ModelVersion(
        project_id=project,
        model_id=model_id,
        version=number,
        content_hash=version.content_hash,
        uri=version.artifact_uri,
        job_uid=job_uid,
        document=document(version),
        request_id=request_id or None,
        request_sha256=request_sha256,
        create_time=moment,
    )
    session.add(row)
    return row


def set_alias(session: Session, row: tables.ModelVersion, alias: str) -> None:
    """Point an alias at a version, away from wherever it pointed."""
    if alias.isdecimal() or alias == "latest":
        raise FailedPrecondition(f"{alias!r} cannot be an alias: it already means a version", "ALIAS_RESERVED")
    session.merge(tables.ModelAlias(project_id=row.project_id, model_id=row.model_id, alias=alias, version=row.version))


def _next_number(session: Session, table: type[tables.Dataset] | type[tables.Model], project: str, id_: str) -> int:
    """Take the next version number in the UPDATE of the name's own row, so that no two versions share one."""
    statement: Any = (
        update(table)
        .where(col(table.project_id) == project, col(table.id) == id_)
        .values(latest=table.latest + 1)
        .returning(col(table.latest))
        .execution_options(synchronize_session=False)
    )
    number = session.execute(statement).scalar()
    if number is None:
        session.add(table(project_id=project, id=id_, latest=1, create_time=now()))
        session.flush()
        number = 1
    return int(number)
