"""The calls of AdminService about projects."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from google.protobuf.message import Message
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col, select

from common.errors import Aborted, AlreadyExists, InvalidArgument, NotFound, Violation
from common.names import check_id, parse
from coordinator import messages
from coordinator.jobs.usage import Standing, locked_project, standings
from coordinator.notify import Notifier
from coordinator.services import paging
from coordinator.services.principal import OPERATOR, Context, principal
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.tables import now
from luthier.v1 import admin_pb2

AMOUNTS = {"quota": "quota", "limit": "ceiling", "budget": "budget"}
"""Fields that hold amounts, and their columns."""

FIELDS = ("display_name", "share", *AMOUNTS)
"""What of a project can be changed."""


class ProjectCalls:
    """Translates calls about projects; a part of AdminService."""

    _store: Store
    _notifier: Notifier

    async def CreateProject(self, request: admin_pb2.CreateProjectRequest, context: Context) -> admin_pb2.CreateProjectResponse:
        """See admin.proto."""
        check_id(request.project_id, "project_id")
        row = tables.Project(id=request.project_id, create_time=now())
        set_fields(row, request.project, FIELDS)

        def work(session: Session) -> admin_pb2.Project:
            session.add(row)
            try:
                session.flush()
            except IntegrityError as error:
                why = f"there is a project {request.project_id!r} already; `luthier project update` changes it"
                raise AlreadyExists(why, "PROJECT_EXISTS", [Violation("project_id", why)]) from error
            return message(row, Standing())

        project = await self._store.write(work)
        self._notifier.notify("scheduler")
        return admin_pb2.CreateProjectResponse(project=project)

    async def GetProject(self, request: admin_pb2.GetProjectRequest, context: Context) -> admin_pb2.GetProjectResponse:
        """See admin.proto."""
        (project_id,) = principal().administered(request.name)

        def work(session: Session) -> admin_pb2.Project:
            return _stated(session, [find_project(session, project_id)])[0]

        return admin_pb2.GetProjectResponse(project=await self._store.read(work))

    async def ListProjects(self, request: admin_pb2.ListProjectsRequest, context: Context) -> admin_pb2.ListProjectsResponse:
        """See admin.proto."""
        who = principal()
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 1)

        def work(session: Session) -> tuple[list[admin_pb2.Project], bool]:
            query = select(tables.Project)
            if who.role < OPERATOR:
                query = query.where(tables.Project.id == who.project)
            if after is not None:
                query = query.where(tables.Project.id > after[0])
            rows = session.exec(query.order_by(col(tables.Project.id)).limit(size + 1)).all()
            return _stated(session, rows[:size]), len(rows) > size

        projects, more = await self._store.read(work)
        response = admin_pb2.ListProjectsResponse(projects=projects)
        if more:
            response.next_page_token = paging.encode(parse(projects[-1].name, "projects")[0])
        return response

    async def UpdateProject(self, request: admin_pb2.UpdateProjectRequest, context: Context) -> admin_pb2.UpdateProjectResponse:
        """See admin.proto."""
        (project_id,) = principal().administered(request.project.name, field="project.name")
        fields = masked(request)

        def work(session: Session) -> admin_pb2.Project:
            row = locked_project(session, project_id)
            if row is None:
                raise _unknown(project_id)
            if request.etag and request.etag != etag(row):
                why = f"project {project_id!r} was changed since it was read; read it again, then change it"
                raise Aborted(why, "ETAG_MISMATCH", [Violation("etag", why)])
            set_fields(row, request.project, fields)
            row.version += 1
            session.add(row)
            session.flush()
            return _stated(session, [row])[0]

        project = await self._store.write(work)
        self._notifier.notify("scheduler")
        return admin_pb2.UpdateProjectResponse(project=project)


def find_project(session: Session, project_id: str) -> tables.Project:
    """The project of that id; NotFound otherwise."""
    row = session.get(tables.Project, project_id)
    if row is None:
        raise _unknown(project_id)
    return row


def masked(request: admin_pb2.UpdateProjectRequest) -> Sequence[str]:
    """The fields that an update is to change: those of its mask, else all that are set.

    Raises InvalidArgument for a path that names nothing that can be changed.
    """
    paths = list(request.update_mask.paths)
    can = f"what can be changed is {', '.join(FIELDS)}"
    bad = [Violation("update_mask", f"{path[:80]!r} cannot be changed; {can}") for path in paths if path not in FIELDS]
    if bad:
        raise InvalidArgument.of(bad)
    fields = paths or [field.name for field, _ in request.project.ListFields() if field.name in FIELDS]
    if not fields:
        raise InvalidArgument.of([Violation("update_mask", f"empty, and no field of the project is set; {can}")])
    return fields


def set_fields(row: tables.Project, project: admin_pb2.Project, fields: Iterable[str]) -> None:
    """Write fields of the message into the row, absent ones as their defaults. InvalidArgument names every bad one."""
    fields = set(fields)
    bad: list[Violation] = []
    share = project.share if project.HasField("share") else 1.0
    if "display_name" in fields and len(project.display_name) > 100:
        bad.append(Violation("project.display_name", f"{len(project.display_name)} characters; 100 are the most"))
    if "share" in fields and not 0 < share < math.inf:
        bad.append(Violation("project.share", f"{share} is not a finite number above 0"))
    amounts = {name: _amounts(getattr(project, name), f"project.{name}", bad) for name in AMOUNTS if name in fields}
    if not bad and fields & {"quota", "limit"}:
        bad += _over_limit(amounts.get("quota", row.quota), amounts.get("limit", row.ceiling))
    if bad:
        raise InvalidArgument.of(bad)
    row.display_name = project.display_name if "display_name" in fields else row.display_name
    row.share = share if "share" in fields else row.share
    for name, values in amounts.items():
        setattr(row, AMOUNTS[name], values)


def message(row: tables.Project, standing: Standing) -> admin_pb2.Project:
    """A project's row, and how it stands, as the contract's message."""
    project = admin_pb2.Project(
        name=f"projects/{row.id}",
        display_name=row.display_name,
        share=row.share,
        create_time=messages.stamp(row.create_time),
        etag=etag(row),
        jobs=standing.jobs,
    )
    for name, column in AMOUNTS.items():
        messages.parse(getattr(row, column), getattr(project, name))
    project.held.cpus, project.held.gpus = standing.held.cpus, standing.held.gpus
    project.usage.cpu_seconds, project.usage.gpu_seconds = standing.spent.cpus, standing.spent.gpus
    project.usage.trained_tokens = standing.trained_tokens
    return project


def etag(row: tables.Project) -> str:
    """Changes with every change that UpdateProject makes."""
    return f'"{row.version}"'


def _stated(session: Session, rows: Sequence[tables.Project]) -> list[admin_pb2.Project]:
    found = standings(session, rows, now())
    return [message(row, found[row.id]) for row in rows]


def _amounts(sent: Message, path: str, bad: list[Violation]) -> dict[str, float]:
    """The fields that are set, by name; what is no amount is added to `bad`."""
    amounts: dict[str, float] = {field.name: value for field, value in sent.ListFields()}
    for name, value in amounts.items():
        if not 0 <= value < math.inf:
            bad.append(Violation(f"{path}.{name}", f"{value} is not a finite number of 0 or more"))
    return amounts


def _over_limit(quota: dict[str, float], limit: dict[str, float]) -> list[Violation]:
    return [
        Violation(f"project.quota.{name}", f"{value:g} is above the limit of {limit[name]:g} (project.limit.{name})")
        for name, value in quota.items()
        if value > limit.get(name, math.inf)
    ]


def _unknown(project_id: str) -> NotFound:
    why = f"there is no project {project_id!r}; `luthier project list` shows those there are"
    return NotFound(why, "PROJECT_NOT_FOUND")
