"""`luthier member ...`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from cli.command import command
from cli.confirm import confirm
from cli.context import Cli
from cli.failures import NOT_FOUND, Failure
from cli.render.members import members_table
from luthier.client import short_name
from luthier.client.names import full_name
from luthier.v1.admin_pb2 import Role
from luthier.v1.member_pb2 import ListMembersResponse, Member

app = typer.Typer(
    name="member", help="Members: the people and services of a project.", no_args_is_help=True, rich_markup_mode=None
)

NameArgument = Annotated[str, typer.Argument(help="The member's id.", metavar="NAME")]


class MemberRole(StrEnum):
    """The most that a member's keys may do."""

    viewer = "viewer"
    editor = "editor"
    admin = "admin"


@command(app)
def add(
    cli: Cli,
    name: NameArgument,
    role: Annotated[MemberRole, typer.Option(help="The most that its keys may do.")] = MemberRole.editor,
    display_name: Annotated[str, typer.Option(help="A person's name for it.")] = "",
) -> None:
    """Add a member; `luthier key create --member NAME` then makes its keys."""
    if _find(cli, name) is not None:
        raise Failure(f"{name} is a member already; `luthier member role` changes what it may do")
    _set(cli, Member(name=_full(cli, name), display_name=display_name), role)


@command(app, "list")
def list_members(cli: Cli) -> None:
    """List the project's members and their roles."""
    members = list(cli.client.list_members())
    cli.out.answer(ListMembersResponse(members=members), members_table(members))


@command(app)
def role(
    cli: Cli, name: NameArgument, role: Annotated[MemberRole, typer.Argument(help="The most that its keys may do from now on.")]
) -> None:
    """Change a member's role, which holds for its keys at once."""
    member = _find(cli, name)
    if member is None:
        raise Failure(f"there is no member {name}; `luthier member list` shows those there are", NOT_FOUND)
    _set(cli, member, role)


@command(app)
def remove(cli: Cli, name: NameArgument, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Remove a member and revoke its keys. What it made stays."""
    confirm(cli, f"removing {name} and revoking its keys", yes)
    answer = cli.client.remove_member(name)
    keys = ", ".join(short_name(key.name) for key in answer.revoked_keys)
    cli.out.answer(answer, f"removed {name}; " + (f"revoked {keys}" if keys else "it had no keys"))


def _set(cli: Cli, member: Member, role: MemberRole) -> None:
    member.role = Role.Value(f"ROLE_{role.value.upper()}")
    member = cli.client.set_member(member)
    cli.out.answer(member, members_table([member]))


def _find(cli: Cli, name: str) -> Member | None:
    return next((member for member in cli.client.list_members() if member.name == _full(cli, name)), None)


def _full(cli: Cli, name: str) -> str:
    return full_name(cli.project, "members", name)
