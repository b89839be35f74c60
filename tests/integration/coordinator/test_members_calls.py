"""Members and their keys as callers see them."""

from __future__ import annotations

import pytest

from luthier.client import Client, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unauthenticated
from luthier.v1 import admin_pb2
from luthier.v1.member_pb2 import Member
from tests.support.coordinator_process import CoordinatorProcess
from tests.support.tenants import make_key


def key_for(client: Client, member: str) -> admin_pb2.CreateKeyResponse:
    key = admin_pb2.Key(display_name=f"{member}'s", role=admin_pb2.ROLE_ADMIN, member=member)
    return client.admin.CreateKey(admin_pb2.CreateKeyRequest(parent=client.parent, key=key))


def test_a_members_role_bounds_its_keys_and_leaving_ends_them(coordinator: CoordinatorProcess, client: Client) -> None:
    client.admin.CreateProject(admin_pb2.CreateProjectRequest(project_id="crew"))
    token = make_key(client, "crew", "admin").token
    with Client(coordinator.address, token, project="crew") as admin:
        made = admin.set_member(Member(name="ada", display_name="Ada", role=admin_pb2.ROLE_EDITOR))
        assert (made.name, made.role) == ("projects/crew/members/ada", admin_pb2.ROLE_EDITOR)
        key = key_for(admin, "ada")
        assert key.key.member == "ada"
        with Client(coordinator.address, key.token, project="crew") as ada:
            ada.set_secret("mine", "some-value")
            with pytest.raises(PermissionDenied, match="role admin"):
                ada.set_member(Member(name="ada", role=admin_pb2.ROLE_ADMIN))
            admin.set_member(Member(name="ada", display_name="Ada", role=admin_pb2.ROLE_VIEWER))
            with pytest.raises(PermissionDenied, match="role editor"):
                ada.set_secret("mine", "another-value")
            assert [member.display_name for member in ada.list_members()] == ["Ada"]
            assert [each.name for each in admin.remove_member("ada").revoked_keys] == [key.key.name]
            with pytest.raises(Unauthenticated, match="was revoked"):
                list(ada.list_members())
        with pytest.raises(NotFound, match="no member 'ada'"):
            key_for(admin, "ada")
        admin.set_member(Member(name="last", role=admin_pb2.ROLE_ADMIN))
        with pytest.raises(FailedPrecondition, match="last admin"):
            admin.remove_member("last")
    client.remove_member("projects/crew/members/last")  # an operator may


def test_bad_members_name_their_field(client: Client) -> None:
    for role in (admin_pb2.ROLE_UNSPECIFIED, admin_pb2.ROLE_QUERY, admin_pb2.ROLE_OPERATOR, 77):
        with pytest.raises(InvalidArgument) as caught:
            client.set_member(Member(name="ada", display_name="x" * 101, role=role))  # type: ignore[arg-type]
        assert [violation.field for violation in caught.value.violations] == ["member.role", "member.display_name"]
    with pytest.raises(InvalidArgument) as caught:
        client.set_member(Member(name="projects/default/members/Ada", role=admin_pb2.ROLE_EDITOR))
    assert [violation.field for violation in caught.value.violations] == ["member.name"]


def test_members_come_in_pages(client: Client) -> None:
    for number in range(5):
        client.set_member(Member(name=f"m-{number}", role=admin_pb2.ROLE_VIEWER))
    assert [member.name[-3:] for member in client.list_members(page_size=2)] == [f"m-{number}" for number in range(5)]
