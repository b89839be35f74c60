"""The calls of the client about who belongs to a project and what its jobs may know."""

from __future__ import annotations

from collections.abc import Iterator

from luthier.client.names import full_name
from luthier.client.paging import page_through
from luthier.v1 import member_pb2, secret_pb2
from luthier.v1.member_pb2_grpc import MemberServiceStub
from luthier.v1.secret_pb2_grpc import SecretServiceStub


class TenancyCalls:
    """Secrets and members; a part of Client."""

    project: str
    secrets: SecretServiceStub
    members: MemberServiceStub

    def set_secret(self, name: str, value: str) -> secret_pb2.Secret:
        """Make a secret or replace its value; no call returns that again."""
        request = secret_pb2.SetSecretRequest(name=full_name(self.project, "secrets", name), value=value)
        return self.secrets.SetSecret(request).secret

    def list_secrets(self, page_size: int = 100) -> Iterator[secret_pb2.Secret]:
        """The project's secrets by name, without their values."""
        request = secret_pb2.ListSecretsRequest(parent=f"projects/{self.project}", page_size=page_size)
        return page_through(self.secrets.ListSecrets, request, lambda page: page.secrets)

    def delete_secret(self, name: str) -> None:
        """Remove a secret that no job needs any more."""
        self.secrets.DeleteSecret(secret_pb2.DeleteSecretRequest(name=full_name(self.project, "secrets", name)))

    def set_member(self, member: member_pb2.Member) -> member_pb2.Member:
        """Add a member or change its display name and role; its name may be short."""
        wanted = member_pb2.Member()
        wanted.CopyFrom(member)
        wanted.name = full_name(self.project, "members", member.name)
        return self.members.SetMember(member_pb2.SetMemberRequest(member=wanted)).member

    def list_members(self, page_size: int = 100) -> Iterator[member_pb2.Member]:
        """The project's members by id."""
        request = member_pb2.ListMembersRequest(parent=f"projects/{self.project}", page_size=page_size)
        return page_through(self.members.ListMembers, request, lambda page: page.members)

    def remove_member(self, name: str) -> member_pb2.RemoveMemberResponse:
        """Remove a member; its keys are revoked by that, and told."""
        return self.members.RemoveMember(member_pb2.RemoveMemberRequest(name=full_name(self.project, "members", name)))
