"""Who belongs to a project: members, their roles, and what becomes of their keys when they leave."""

from __future__ import annotations

from collections.abc import Sequence

from sqlmodel import Session, col, func, select

from common.errors import FailedPrecondition, NotFound
from coordinator.jobs.usage import locked_project
from coordinator.store.tables import ApiKey, Member, now
from luthier.v1 import admin_pb2

ADMIN = admin_pb2.ROLE_ADMIN


def set_member(session: Session, project: str, member: str, display_name: str, role: int, operator: bool) -> Member:
    """Add a member or change it.

    Raises NotFound for the project, FailedPrecondition where its last admin would be lowered by somebody who is no operator.
    """
    _lock(session, project)
    row = session.get(Member, (project, member))
    if row is None:
        row = Member(project_id=project, id=member, role=role, create_time=now(), update_time=now())
    elif row.role == ADMIN and role < ADMIN and not operator:
        _keep_an_admin(session, project, member, "given a lower role")
    row.display_name, row.role, row.update_time = display_name, role, now()
    session.add(row)
    session.flush()
    return row


def remove_member(session: Session, project: str, member: str, operator: bool) -> Sequence[ApiKey]:
    """Remove a member and revoke its keys; returns those.

    Raises NotFound, and FailedPrecondition for the last admin unless an operator removes it.
    """
    _lock(session, project)
    row = find_member(session, project, member)
    if row.role == ADMIN and not operator:
        _keep_an_admin(session, project, member, "removed")
    moment = now()
    keys = session.exec(
        select(ApiKey).where(ApiKey.project_id == project, ApiKey.member == member, col(ApiKey.revoke_time).is_(None))
    ).all()
    for key in keys:
        key.revoke_time = moment
        session.add(key)
    session.delete(row)
    session.flush()
    return keys


def find_member(session: Session, project: str, member: str) -> Member:
    """The member of that id; NotFound otherwise."""
    row = session.get(Member, (project, member))
    if row is None:
        raise NotFound(f"there is no member {member!r}; `luthier member list` shows those there are", "MEMBER_NOT_FOUND")
    return row


def _lock(session: Session, project: str) -> None:
    # Of two admins who remove each other, one is the last.
    if locked_project(session, project) is None:
        raise NotFound(f"there is no project {project!r}; `luthier project list` shows those there are", "PROJECT_NOT_FOUND")


def _keep_an_admin(session: Session, project: str, member: str, done: str) -> None:
    others = select(func.count()).select_from(Member)
    others = others.where(Member.project_id == project, Member.role == ADMIN, Member.id != member)
    if not session.exec(others).one():
        why = f"{member} is the last admin of project {project!r} and cannot be {done}; make somebody else an admin first"
        raise FailedPrecondition(f"{why}, or ask an operator", "LAST_ADMIN")
