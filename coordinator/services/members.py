"""MemberService."""

from __future__ import annotations

from collections.abc import Sequence

from sqlmodel import Session, col, select

from common.errors import InvalidArgument, Violation
from coordinator import members, messages
from coordinator.notify import Notifier
from coordinator.services import paging
from coordinator.services.keys import CHANGED
from coordinator.services.principal import ADMIN, EDITOR, OPERATOR, VIEWER, Context, principal
from coordinator.services.projects import find_project
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.v1 import admin_pb2, member_pb2, member_pb2_grpc

ROLES = (VIEWER, EDITOR, ADMIN)
"""What a member may be. Operators run the stack, not a project; to query and nothing else is a matter of single keys."""


class MemberService(member_pb2_grpc.MemberServiceServicer):
    """Translates calls about members."""

    def __init__(self, store: Store, notifier: Notifier) -> None:
        self._store = store
        self._notifier = notifier

    async def SetMember(self, request: member_pb2.SetMemberRequest, context: Context) -> member_pb2.SetMemberResponse:
        """See member.proto."""
        who, wanted = principal(), request.member
        project, member = who.administered(wanted.name, "members", field="member.name")
        bad = []
        if wanted.role not in ROLES:
            names = ", ".join(admin_pb2.Role.Name(role) for role in ROLES)
            bad.append(Violation("member.role", f"say one of {names}"))
        if len(wanted.display_name) > 100:
            bad.append(Violation("member.display_name", f"{len(wanted.display_name)} characters; 100 are the most"))
        if bad:
            raise InvalidArgument.of(bad)
        operator = who.role >= OPERATOR
        row = await self._store.write(
            lambda session: members.set_member(session, project, member, wanted.display_name, wanted.role, operator)
        )
        self._notifier.notify(CHANGED)
        return member_pb2.SetMemberResponse(member=message(row))

    async def ListMembers(self, request: member_pb2.ListMembersRequest, context: Context) -> member_pb2.ListMembersResponse:
        """See member.proto."""
        (project,) = principal().administered(request.parent, field="parent")
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 1)

        def work(session: Session) -> Sequence[tables.Member]:
            find_project(session, project)
            query = select(tables.Member).where(tables.Member.project_id == project)
            if after is not None:
                query = query.where(tables.Member.id > after[0])
            return session.exec(query.order_by(col(tables.Member.id)).limit(size + 1)).all()

        rows = await self._store.read(work)
        response = member_pb2.ListMembersResponse(members=[message(row) for row in rows[:size]])
        if len(rows) > size:
            response.next_page_token = paging.encode(rows[size - 1].id)
        return response

    async def RemoveMember(self, request: member_pb2.RemoveMemberRequest, context: Context) -> member_pb2.RemoveMemberResponse:
        """See member.proto."""
        who = principal()
        project, member = who.administered(request.name, "members")
        operator = who.role >= OPERATOR
        revoked = await self._store.write(lambda session: members.remove_member(session, project, member, operator))
        self._notifier.notify(CHANGED, "endpoints")
        return member_pb2.RemoveMemberResponse(revoked_keys=[messages.key(row) for row in revoked])


def message(row: tables.Member) -> member_pb2.Member:
    """A member's row as the contract's message."""
    return member_pb2.Member(
        name=f"projects/{row.project_id}/members/{row.id}",
        display_name=row.display_name,
        role=admin_pb2.Role.ValueType(row.role),
        create_time=messages.stamp(row.create_time),
        update_time=messages.stamp(row.update_time),
    )
