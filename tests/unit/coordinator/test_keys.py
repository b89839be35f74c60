"""A key is remembered for a moment, and forgotten the moment it is revoked."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from sqlmodel import Session, select

from common.errors import Unauthenticated
from coordinator.jobs.tokens import sha256
from coordinator.notify import Notifier
from coordinator.services import keys
from coordinator.services.keys import CHANGED, Keys
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.v1 import admin_pb2

TOKEN = "lut_a-token"


@pytest.fixture
def notifier() -> Notifier:
    return Notifier()


@pytest.fixture
def found(store: Store, notifier: Notifier) -> Keys:
    change(store)
    return Keys(store, notifier)


def change(store: Store, **values: Any) -> None:
    """Make the key, or set columns of it."""

    def work(session: Session) -> None:
        row = session.get(tables.ApiKey, "k") or tables.ApiKey(
            id="k",
            project_id="default",
            display_name="mine",
            role=admin_pb2.ROLE_EDITOR,
            token_sha256=sha256(TOKEN),
            create_time=tables.now(),
        )
        for name, value in values.items():
            setattr(row, name, value)
        session.add(row)

    store.write_now(work)


def reads(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    real = store.read_now

    def read_now(work: Any) -> Any:
        counted.append(1)
        return real(work)

    monkeypatch.setattr(store, "read_now", read_now)
    return counted


async def test_a_key_is_looked_up_once_in_a_while(found: Keys, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = reads(store, monkeypatch)
    monkeypatch.setattr(keys, "REMEMBERED_SECONDS", 30.0)
    for _ in range(5):
        assert (await found.find(TOKEN)).display_name == "mine"
    assert len(counted) == 1
    with pytest.raises(Unauthenticated, match="not known"):
        await found.find("lut_another")


async def test_a_revoked_key_is_refused_at_once(found: Keys, store: Store, notifier: Notifier) -> None:
    await found.find(TOKEN)
    change(store, revoke_time=tables.now())
    notifier.notify(CHANGED)
    with pytest.raises(Unauthenticated, match="was revoked"):
        await found.find(TOKEN)


async def test_a_look_that_came_too_early_is_not_remembered(
    found: Keys, store: Store, notifier: Notifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, looked, go = store.read, asyncio.Event(), asyncio.Event()

    async def slow(work: Any) -> Any:
        row = await read(work)
        looked.set()
        await go.wait()
        return row

    monkeypatch.setattr(store, "read", slow)
    early = asyncio.ensure_future(found.find(TOKEN))
    await looked.wait()
    await asyncio.to_thread(change, store, revoke_time=tables.now())
    notifier.notify(CHANGED)
    go.set()
    await early
    with pytest.raises(Unauthenticated, match="was revoked"):
        await found.find(TOKEN)


async def test_what_another_coordinator_revoked_counts_no_longer_than_a_moment(
    found: Keys, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "REMEMBERED_SECONDS", 0.2)
    await found.find(TOKEN)
    change(store, revoke_time=tables.now())
    await asyncio.sleep(0.25)
    with pytest.raises(Unauthenticated, match="was revoked"):
        await found.find(TOKEN)


async def test_a_remembered_key_expires_on_time(found: Keys, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "REMEMBERED_SECONDS", 30.0)
    expires = tables.now() + timedelta(hours=1)
    change(store, expire_time=expires)
    await found.find(TOKEN)
    monkeypatch.setattr(keys, "now", lambda: expires)
    with pytest.raises(Unauthenticated, match="expired at"):
        await found.find(TOKEN)


async def test_secrets_are_not_kept_in_memory(found: Keys, store: Store) -> None:
    await found.find(TOKEN)
    kept = store.read_now(lambda session: session.exec(select(tables.ApiKey)).all())
    assert TOKEN not in repr(found.__dict__) + repr(kept)
