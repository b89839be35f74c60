"""Members: what their keys may do, and what becomes of those when a member is lowered or leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlmodel import Session

from common.errors import FailedPrecondition, NotFound, Unauthenticated
from coordinator import members
from coordinator.jobs.tokens import sha256
from coordinator.notify import Notifier
from coordinator.services import keys
from coordinator.services.keys import CHANGED, Keys
from coordinator.services.principal import ADMIN, EDITOR, OPERATOR, VIEWER, Principal
from coordinator.store import tables
from coordinator.store.database import Store

TOKEN = "lut_adas"


def put(store: Store, member: str, role: int, operator: bool = False) -> tables.Member:
    return store.write_now(lambda session: members.set_member(session, "default", member, "", role, operator))


def leave(store: Store, member: str, operator: bool = False) -> list[str]:
    return [key.id for key in store.write_now(lambda session: members.remove_member(session, "default", member, operator))]


def add_key(store: Store, key: str, member: str = "", token: str = "", **values: Any) -> None:
    row = {"id": key, "project_id": "default", "display_name": key, "role": ADMIN, "token_sha256": sha256(token or key)}
    store.write_now(lambda session: session.add(tables.ApiKey(**row | values, member=member, create_time=tables.now())))


def key_of(store: Store, key: str) -> tables.ApiKey:
    return store.read_now(lambda session: session.get_one(tables.ApiKey, key))


@pytest.mark.parametrize(
    ("of_key", "of_member", "counts"),
    [(ADMIN, VIEWER, VIEWER), (VIEWER, ADMIN, VIEWER), (EDITOR, EDITOR, EDITOR), (OPERATOR, ADMIN, ADMIN)],
)
async def test_the_lesser_role_of_key_and_member_counts(store: Store, of_key: int, of_member: int, counts: int) -> None:
    put(store, "ada", of_member)
    add_key(store, "k", "ada", TOKEN, role=of_key)
    add_key(store, "nobodys", role=of_key)
    found = Keys(store, Notifier())
    who = await found.find(TOKEN)
    assert (who.role, who.member, who.creator) == (counts, "ada", "ada")
    other = await found.find("nobodys")
    assert (other.role, other.member, other.creator) == (of_key, "", "nobodys")


async def test_a_member_of_the_same_name_in_another_project_counts_for_nothing(store: Store) -> None:
    def work(session: Session) -> None:
        session.add(tables.Project(id="theirs", create_time=tables.now()))
        session.flush()
        members.set_member(session, "theirs", "ada", "", ADMIN, False)

    store.write_now(work)
    add_key(store, "k", "ada", TOKEN)
    with pytest.raises(Unauthenticated, match="who is no member"):
        await Keys(store, Notifier()).find(TOKEN)
    put(store, "ada", VIEWER)
    assert (await Keys(store, Notifier()).find(TOKEN)).role == VIEWER
    assert leave(store, "ada") == ["k"]
    assert store.read_now(lambda session: session.get(tables.Member, ("theirs", "ada"))) is not None


async def test_a_lower_role_holds_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "REMEMBERED_SECONDS", 30.0)
    put(store, "bob", ADMIN)
    put(store, "ada", ADMIN)
    add_key(store, "k", "ada", TOKEN)
    notifier = Notifier()
    found = Keys(store, notifier)
    assert (await found.find(TOKEN)).role == ADMIN
    await asyncio.to_thread(put, store, "ada", VIEWER)
    notifier.notify(CHANGED)
    assert (await found.find(TOKEN)).role == VIEWER


async def test_who_leaves_takes_all_keys_along_and_nobody_elses(store: Store) -> None:
    put(store, "ada", EDITOR)
    put(store, "bob", EDITOR)
    add_key(store, "first", "ada", TOKEN)
    add_key(store, "second", "ada")
    add_key(store, "bobs", "bob")
    add_key(store, "nobodys")
    before = tables.now()
    add_key(store, "gone", "ada", revoke_time=before)
    assert sorted(leave(store, "ada")) == ["first", "second"]
    with pytest.raises(Unauthenticated, match="was revoked"):
        await Keys(store, Notifier()).find(TOKEN)
    assert key_of(store, "gone").revoke_time == before
    assert key_of(store, "bobs").revoke_time is key_of(store, "nobodys").revoke_time is None
    put(store, "ada", EDITOR)
    assert key_of(store, "first").revoke_time is not None
    with pytest.raises(NotFound, match="no member 'carl'"):
        leave(store, "carl")


async def test_a_key_whose_member_is_not_there_is_refused(store: Store) -> None:
    add_key(store, "k", "ada", TOKEN)
    with pytest.raises(Unauthenticated, match="who is no member"):
        await Keys(store, Notifier()).find(TOKEN)


@pytest.mark.parametrize(
    "change", [lambda store, operator: put(store, "ada", EDITOR, operator), lambda store, operator: leave(store, "ada", operator)]
)
def test_the_last_admin_stays_unless_an_operator_says_otherwise(store: Store, change: Callable[..., Any]) -> None:
    put(store, "ada", ADMIN)
    put(store, "bob", EDITOR)
    add_key(store, "k", "ada")
    with pytest.raises(FailedPrecondition, match="ada is the last admin of project 'default'") as caught:
        change(store, False)
    assert caught.value.reason == "LAST_ADMIN"
    assert key_of(store, "k").revoke_time is None
    put(store, "ada", ADMIN)  # to be the same again is no change
    change(store, True)
    put(store, "ada", ADMIN)
    put(store, "bob", ADMIN)
    change(store, False)


def test_no_member_without_a_project(store: Store) -> None:
    with pytest.raises(NotFound, match="no project 'nowhere'"):
        store.write_now(lambda session: members.set_member(session, "nowhere", "ada", "", EDITOR, True))


def test_what_a_members_key_makes_names_the_member() -> None:
    assert Principal("p", "k", "laptop", EDITOR, member="ada").creator == "ada"
    assert Principal("p", "k", "laptop", EDITOR).creator == "laptop"
