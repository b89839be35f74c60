"""AdminService: keys and status; its calls about projects are in projects.py."""

from __future__ import annotations

import os
import platform
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC
from importlib.metadata import version
from pathlib import Path

from sqlalchemy import func, tuple_
from sqlmodel import Session, col, select

from common import scopes
from common.errors import InvalidArgument, NotFound, PermissionDenied, Violation
from common.names import check_id
from coordinator import messages
from coordinator.jobs.reconcile import Reconciler
from coordinator.jobs.tokens import new_key, sha256
from coordinator.members import find_member
from coordinator.notify import Notifier
from coordinator.services import paging
from coordinator.services.backups import BackupCalls
from coordinator.services.keys import CHANGED
from coordinator.services.principal import Context, Principal, principal
from coordinator.services.projects import ProjectCalls, find_project
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.leader import Leadership
from coordinator.store.tables import now
from luthier.v1 import admin_pb2, admin_pb2_grpc


class AdminService(ProjectCalls, BackupCalls, admin_pb2_grpc.AdminServiceServicer):
    """Translates calls of those who run the stack."""

    def __init__(
        self,
        store: Store,
        notifier: Notifier,
        reconciler: Reconciler,
        leadership: Leadership,
        status: admin_pb2.GetStatusResponse,
        gateway_state: Callable[[], str],
        home: Path,
    ) -> None:
        self._store = store
        self._notifier = notifier
        self._reconciler = reconciler
        self._leadership = leadership
        self._status = status
        self._gateway_state = gateway_state
        self._home = home

    async def CreateKey(self, request: admin_pb2.CreateKeyRequest, context: Context) -> admin_pb2.CreateKeyResponse:
        """See admin.proto."""
        who = principal()
        (project_id,) = who.administered(request.parent, field="parent")
        key = request.key
        bad = []
        if key.role not in admin_pb2.Role.values() or key.role == admin_pb2.ROLE_UNSPECIFIED:
            roles = ", ".join(name for name, number in admin_pb2.Role.items() if number)
            bad.append(Violation("key.role", f"say one of {roles}"))
        if not 1 <= len(key.display_name) <= 100:
            bad.append(Violation("key.display_name", "a name of 1 to 100 characters is needed"))
        expires = key.expire_time.ToDatetime(tzinfo=UTC) if key.HasField("expire_time") else None
        if expires is not None and expires <= now():
            bad.append(Violation("key.expire_time", "lies in the past"))
        said = [(f"key.scopes[{index}]", scopes.problem(scope)) for index, scope in enumerate(key.scopes)]
        bad += [Violation(field, why) for field, why in said if why]
        if len(key.scopes) > scopes.MOST:
            bad.append(Violation("key.scopes", f"{len(key.scopes)} scopes; {scopes.MOST} are the most"))
        for name in ("requests_per_minute", "tokens_per_minute"):
            if getattr(key, name) < 0:
                bad.append(Violation(f"key.{name}", f"{getattr(key, name)} is negative; 0 is no limit"))
        if bad:
            raise InvalidArgument.of(bad)
        not_above(who, key.role, "key.role", "makes")
        not_beyond(who, key.scopes, "key.scopes", "makes")
        token = new_key()
        row = tables.ApiKey(
            id=f"key-{secrets.token_hex(5)}",
            project_id=project_id,
            display_name=key.display_name,
            role=key.role,
            token_sha256=sha256(token),
            create_time=now(),
            expire_time=expires,
            scopes=sorted(set(key.scopes)),
            member=check_id(key.member, "key.member") if key.member else "",
            requests_per_minute=key.requests_per_minute,
            tokens_per_minute=key.tokens_per_minute,
        )

        def work(session: Session) -> None:
            find_project(session, project_id)
            if row.member:
                find_member(session, project_id, row.member)
            session.add(row)

        await self._store.write(work)
        self._notifier.notify("endpoints")
        return admin_pb2.CreateKeyResponse(key=messages.key(row), token=token)

    async def ListKeys(self, request: admin_pb2.ListKeysRequest, context: Context) -> admin_pb2.ListKeysResponse:
        """See admin.proto."""
        who = principal()
        (project_id,) = who.administered(request.parent, field="parent")
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, 2)

        def work(session: Session) -> Sequence[tables.ApiKey]:
            find_project(session, project_id)
            key = tables.ApiKey
            query = select(key).where(key.project_id == project_id)
            if after is not None:
                last = select(key.create_time).where(key.id == after[1]).scalar_subquery()
                query = query.where(tuple_(col(key.create_time), col(key.id)) < tuple_(last, after[1]))
            return session.exec(query.order_by(col(key.create_time).desc(), col(key.id).desc()).limit(size + 1)).all()

        rows = await self._store.read(work)
        response = admin_pb2.ListKeysResponse(keys=[messages.key(row) for row in rows[:size]])
        if len(rows) > size:
            response.next_page_token = paging.encode("", rows[size - 1].id)
        return response

    async def RevokeKey(self, request: admin_pb2.RevokeKeyRequest, context: Context) -> admin_pb2.RevokeKeyResponse:
        """See admin.proto."""
        who = principal()
        project_id, key_id = who.administered(request.name, "keys")

        def work(session: Session) -> tables.ApiKey:
            row = session.get(tables.ApiKey, key_id)
            if row is None or row.project_id != project_id:
                raise NotFound(f"there is no key {key_id!r}; `luthier key list` shows those there are", "KEY_NOT_FOUND")
            not_above(who, row.role, "name", "revokes")
            not_beyond(who, row.scopes, "name", "revokes")
            row.revoke_time = row.revoke_time or now()
            session.add(row)
            return row

        row = await self._store.write(work)
        self._notifier.notify(CHANGED, "endpoints")
        return admin_pb2.RevokeKeyResponse(key=messages.key(row))

    async def GetStatus(self, request: admin_pb2.GetStatusRequest, context: Context) -> admin_pb2.GetStatusResponse:
        """See admin.proto."""
        who = principal()

        def work(session: Session) -> Sequence[tuple[str, int]]:
            query = select(tables.Job.state, func.count()).where(tables.Job.project_id == who.project)
            return session.exec(query.where(col(tables.Job.delete_time).is_(None)).group_by(tables.Job.state)).all()

        counts = await self._store.read(work)
        capacity = await self._reconciler.capacity()
        held = self._reconciler.queue.held
        response = admin_pb2.GetStatusResponse()
        response.CopyFrom(self._status)
        response.coordinator.epoch, response.coordinator.leader = await self._leadership.present()
        response.coordinator.leads = response.coordinator.epoch == self._leadership.epoch != 0
        response.gateway.state = self._gateway_state()
        response.ray.connected = capacity is not None
        response.ray.error = self._reconciler.cluster_error
        response.ray.autoscaler = self._reconciler.autoscaler.words
        if capacity is not None:
            response.ray.nodes = len(capacity.nodes)
            response.ray.cpus, response.ray.gpus = capacity.total.cpus, capacity.total.gpus
            response.ray.cpus_free = max(capacity.total.cpus - held.cpus, 0)
            response.ray.gpus_free = max(capacity.total.gpus - held.gpus, 0)
            response.ray.each_node.extend(
                admin_pb2.RayNode(id=node.id, cpus=node.total.cpus, gpus=node.total.gpus, labels=node.labels)
                for node in capacity.nodes
            )
        if who.may("jobs" + scopes.READ):
            response.jobs.update(dict(counts))
        return response


def not_above(who: Principal, role: int, field: str, does: str) -> None:
    """Refuse to touch a key that may do more than the caller's own. Raises PermissionDenied naming the field."""
    if role > who.role:
        mine, other = (admin_pb2.Role.Name(admin_pb2.Role.ValueType(each)) for each in (who.role, role))
        why = f"a key with {mine} {does} none with {other}; ask somebody whose key has that role"
        raise PermissionDenied(f"{field}: {why}", "ROLE_TOO_LOW", [Violation(field, why)])


def not_beyond(who: Principal, wanted: Sequence[str], field: str, does: str) -> None:
    """Refuse to touch a key whose scopes reach beyond the caller's own. Raises PermissionDenied naming the field."""
    more = scopes.beyond(who.scopes, wanted)
    if more:
        why = f"a key with the scopes {', '.join(who.scopes)} {does} none with {', '.join(more)}; ask somebody whose key has that"
        raise PermissionDenied(f"{field}: {why}", "SCOPE_MISSING", [Violation(field, why)])


def static_status(address: str, store: str, gateway_url: str, ray_address: str, metrics: str) -> admin_pb2.GetStatusResponse:
    """The part of the status that does not change while the process lives."""
    return admin_pb2.GetStatusResponse(
        coordinator=admin_pb2.CoordinatorStatus(
            pid=os.getpid(), address=address, start_time=messages.stamp(now()), store=store, metrics_address=metrics
        ),
        gateway=admin_pb2.GatewayStatus(url=gateway_url),
        ray=admin_pb2.RayStatus(address=ray_address),
        versions={"luthier": version("luthier"), "ray": version("ray"), "python": platform.python_version()},
    )
