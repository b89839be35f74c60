"""Scopes: what a key may touch within its role, for every call of the contract."""

from __future__ import annotations

import pytest

from common import scopes
from common.errors import PermissionDenied
from coordinator.services import principal
from coordinator.services.admin import not_beyond
from coordinator.services.principal import ADMIN, NEEDS, NOUNS, VIEWER, Principal, check_scope, scope_of


def key(*held: str) -> Principal:
    return Principal("p", "k", "k", ADMIN, held)


def admitted(held: tuple[str, ...]) -> set[str]:
    found = set()
    for method in NEEDS:
        try:
            check_scope(key(*held), method)
            found.add(method.rpartition("/")[2])
        except PermissionDenied:
            pass
    return found


def test_every_call_of_the_contract_has_a_noun() -> None:
    for method in NEEDS:
        needed = scope_of(method)
        assert needed is not None, f"{method} is missing in NOUNS"
        assert needed == "" or not scopes.problem(needed), method
    assert {noun for noun in NOUNS.values() if noun} <= set(scopes.NOUNS)


def test_calls_that_look_are_those_that_viewers_may_make() -> None:
    reads = {method for method in NEEDS if (scope_of(method) or "").endswith(scopes.READ)}
    assert {method for method, role in NEEDS.items() if role == VIEWER and scope_of(method)} <= reads
    assert {method.rpartition("/")[2] for method in reads if NEEDS[method] > VIEWER} <= {"ListKeys", "ListMembers"}


def test_a_call_that_is_not_listed_is_refused_to_keys_with_scopes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_scope(key(), "/luthier.v1.NewService/New")
    with pytest.raises(PermissionDenied, match="a scope for this call"):
        check_scope(key("jobs"), "/luthier.v1.NewService/New")


def test_a_scope_opens_its_noun_and_nothing_else() -> None:
    assert admitted(()) == {method.rpartition("/")[2] for method in NEEDS}
    jobs = admitted(("jobs",))
    assert {"CreateJob", "GetJob", "DeleteJob", "TailLogs", "GetStatus"} <= jobs
    assert not jobs & {"ListDatasets", "CreateKey", "SetSecret", "GetProject", "ListEndpoints"}
    looking = admitted(("jobs:read",))
    assert {"GetJob", "WatchJobs", "TailLogs"} <= looking
    assert not looking & {"CreateJob", "CancelJob", "UpdateJob", "DeleteJob", "PauseJob"}
    assert admitted(("endpoints/desk",)) == {"GetStatus"}
    assert admitted(("datasets:read", "models")) >= {"ListDatasets", "UploadModel"}


def test_the_error_names_the_scope() -> None:
    with pytest.raises(PermissionDenied, match=r"lacks the scope jobs:read; it has models, secrets:read") as caught:
        check_scope(key("models", "secrets:read"), "/luthier.v1.JobService/GetJob")
    assert caught.value.reason == "SCOPE_MISSING"


@pytest.mark.parametrize(
    ("held", "wanted", "more"),
    [
        ((), (), []),
        ((), ("jobs",), []),
        (("jobs",), (), ["all"]),
        (("jobs",), ("jobs:read",), []),
        (("jobs:read",), ("jobs",), ["jobs"]),
        (("endpoints",), ("endpoints/a", "endpoints:read"), []),
        (("endpoints/a",), ("endpoints/a", "endpoints/b", "endpoints"), ["endpoints/b", "endpoints"]),
        (("endpoints:read",), ("endpoints/a",), ["endpoints/a"]),
    ],
)
def test_no_key_makes_or_revokes_one_with_more(held: tuple[str, ...], wanted: tuple[str, ...], more: list[str]) -> None:
    assert scopes.beyond(held, wanted) == more
    if more:
        with pytest.raises(PermissionDenied) as caught:
            not_beyond(key(*held), wanted, "key.scopes", "makes")
        assert [violation.field for violation in caught.value.violations] == ["key.scopes"]
    else:
        not_beyond(key(*held), wanted, "key.scopes", "makes")


@pytest.mark.parametrize("scope", ["", "job", "jobs:write", "jobs/a", "endpoints/", "endpoints/A B", "endpoints/a:read", ":read"])
def test_what_is_no_scope_is_told(scope: str) -> None:
    assert scopes.problem(scope)


def test_the_interceptor_asks() -> None:
    from coordinator.services import interceptor

    assert interceptor.check_scope is principal.check_scope
