"""Members by the command line."""

from luthier.v1.admin_pb2 import ROLE_ADMIN, ROLE_EDITOR, ROLE_VIEWER
from luthier.v1.member_pb2 import Member
from tests.support.fake_services import FakeCoordinator


def test_a_member_is_added_once_and_given_another_role(luthier, fake: FakeCoordinator) -> None:
    ran = luthier("member", "add", "ada", "--display-name", "Ada L.", "-o", "json")
    assert (ran.status, ran.json["name"], ran.json["role"]) == (0, "projects/default/members/ada", "ROLE_EDITOR")
    assert "is a member already" in luthier("member", "add", "ada", "--role", "admin").stderr
    assert luthier("member", "role", "ada", "admin").status == 0
    sent = [call.request.member for call in fake.called("SetMember")]
    assert [member.role for member in sent] == [ROLE_EDITOR, ROLE_ADMIN]
    assert {member.display_name for member in sent} == {"Ada L."}
    assert luthier("member", "role", "bob", "viewer").status == 3
    assert luthier("member", "role", "ada", "operator").status == 2


def test_members_are_listed_and_leave_with_their_keys(luthier, fake: FakeCoordinator) -> None:
    fake.members["projects/default/members/ada"] = Member(name="projects/default/members/ada", role=ROLE_VIEWER)
    heading, row = luthier("member", "list").stdout.splitlines()
    assert heading.split() == ["member", "role", "name", "added"]
    assert row.split()[:2] == ["ada", "viewer"]
    luthier("key", "create", "laptop", "--member", "ada")
    assert fake.called("CreateKey")[0].request.key.member == "ada"
    assert luthier("key", "list").stdout.splitlines()[1].split()[2] == "ada"
    assert luthier("member", "remove", "ada").status == 2
    assert luthier("member", "remove", "ada", "--yes").stdout == "removed ada; revoked k-1\n"
    assert luthier("member", "list", "-o", "json").json["members"] == []
