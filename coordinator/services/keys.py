"""Who is behind a key, remembered for a moment: otherwise every call would begin by reading the store."""

from __future__ import annotations

import time

from sqlalchemy import bindparam
from sqlmodel import Session, col, select

from common.errors import Unauthenticated
from coordinator.jobs.tokens import sha256
from coordinator.notify import Notifier
from coordinator.services.principal import Principal
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.tables import now
from luthier.v1 import admin_pb2

REMEMBERED_SECONDS = 1.0
"""How long a key counts without a look at the store. So late at most does a coordinator learn what another one changed."""

MOST = 10_000
"""Keys remembered at a time."""

CHANGED = "keys"
"""Topic on which a change of keys is announced, once it is recorded and before it is acknowledged."""

_BY_TOKEN = (
    select(tables.ApiKey, tables.Member)
    .outerjoin(
        tables.Member,
        (col(tables.Member.project_id) == tables.ApiKey.project_id) & (col(tables.Member.id) == tables.ApiKey.member),
    )
    .where(tables.ApiKey.token_sha256 == bindparam("token_sha256"))
)


class Keys:
    """Looks keys up. Only keys that count are remembered, under their hash; belongs to one event loop."""

    def __init__(self, store: Store, notifier: Notifier) -> None:
        self._store = store
        self._known: dict[str, tuple[tables.ApiKey, Principal, float]] = {}
        self._changes = 0
        notifier.on(CHANGED, self.forget)

    def forget(self) -> None:
        """Look at the store again for every key, also where a look is under way that may have come too early."""
        self._changes += 1
        self._known.clear()

    async def find(self, token: str) -> Principal:
        """The key behind a token; Unauthenticated, saying why, where it does not count."""
        token_sha256 = sha256(token)
        known = self._known.get(token_sha256)
        if known is not None and time.monotonic() < known[2]:
            _check(known[0])
            return known[1]
        changes, until = self._changes, time.monotonic() + REMEMBERED_SECONDS
        row, member = await self._store.read(lambda session: _find(session, token_sha256))
        _check(row)
        who = _principal(row, member)
        if changes == self._changes:
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[token_sha256] = row, who, until
        return who


def _find(session: Session, token_sha256: str) -> tuple[tables.ApiKey, tables.Member | None]:
    found = session.exec(_BY_TOKEN, params={"token_sha256": token_sha256}).first()
    if found is None:
        raise Unauthenticated("this key is not known here", "KEY_UNKNOWN")
    return found[0], found[1]


def _check(row: tables.ApiKey) -> None:
    if row.revoke_time is not None:
        raise Unauthenticated(f"key {row.display_name!r} was revoked", "KEY_REVOKED")
    if row.expire_time is not None and row.expire_time <= now():
        raise Unauthenticated(f"key {row.display_name!r} expired at {row.expire_time:%Y-%m-%d %H:%M} UTC", "KEY_EXPIRED")


def _principal(row: tables.ApiKey, member: tables.Member | None) -> Principal:
    if row.member and member is None:  # removing a member revokes its keys, so that this is a store that somebody else wrote into
        raise Unauthenticated(f"key {row.display_name!r} belongs to {row.member!r}, who is no member", "KEY_REVOKED")
    role = row.role if member is None else min(row.role, member.role)
    return Principal(row.project_id, row.id, row.display_name, admin_pb2.Role.ValueType(role), tuple(row.scopes), row.member)
