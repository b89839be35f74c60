"""Keys with scopes as callers see them."""

from __future__ import annotations

import pytest

from luthier.client import Client, InvalidArgument, PermissionDenied
from luthier.v1 import admin_pb2
from tests.support.coordinator_process import CoordinatorProcess


def make(client: Client, *scopes: str, role: admin_pb2.Role.ValueType = admin_pb2.ROLE_ADMIN) -> admin_pb2.CreateKeyResponse:
    key = admin_pb2.Key(display_name="scoped", role=role, scopes=scopes)
    return client.admin.CreateKey(admin_pb2.CreateKeyRequest(parent=client.parent, key=key))


def test_a_key_is_kept_to_its_scopes(coordinator: CoordinatorProcess, client: Client) -> None:
    made = make(client, "jobs:read", "datasets", "jobs:read")
    assert list(made.key.scopes) == ["datasets", "jobs:read"]
    assert next(key for key in client.list_keys() if key.name == made.key.name).scopes == ["datasets", "jobs:read"]
    with coordinator.client(made.token) as scoped:
        list(scoped.list_jobs())
        list(scoped.list_datasets())
        scoped.status()
        for call, scope in (
            (lambda: scoped.cancel_job("ft-1"), "jobs"),
            (lambda: list(scoped.list_models()), "models:read"),
            (lambda: scoped.set_secret("x", "some-value"), "secrets"),
            (lambda: make(scoped, "datasets"), "keys"),
        ):
            with pytest.raises(PermissionDenied, match=f"lacks the scope {scope}; it has datasets, jobs:read") as caught:
                call()
            assert caught.value.reason == "SCOPE_MISSING"


def test_no_key_makes_or_revokes_one_with_wider_scopes(coordinator: CoordinatorProcess, client: Client) -> None:
    everything = make(client).key
    with coordinator.client(make(client, "keys", "endpoints").token) as scoped:
        made = make(scoped, "endpoints/desk", role=admin_pb2.ROLE_QUERY)
        assert list(made.key.scopes) == ["endpoints/desk"]
        for wanted in ((), ("jobs:read",), ("keys", "models")):
            with pytest.raises(PermissionDenied, match=r"key\.scopes: a key with the scopes endpoints, keys makes none with"):
                make(scoped, *wanted)
        with pytest.raises(PermissionDenied, match="revokes none with all"):
            scoped.admin.RevokeKey(admin_pb2.RevokeKeyRequest(name=everything.name))
        scoped.admin.RevokeKey(admin_pb2.RevokeKeyRequest(name=made.key.name))


def test_bad_scopes_are_named(client: Client) -> None:
    with pytest.raises(InvalidArgument) as caught:
        make(client, "jobs", "job", "endpoints/A")
    assert [violation.field for violation in caught.value.violations] == ["key.scopes[1]", "key.scopes[2]"]
