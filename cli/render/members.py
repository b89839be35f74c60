"""Members as tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from cli.render.text import ago, enum_text, plain_table
from luthier.client import short_name
from luthier.v1.admin_pb2 import Role
from luthier.v1.member_pb2 import Member


def members_table(members: Iterable[Member]) -> Table:
    """Members, one a row."""
    table = plain_table("member", "role", "name", "added")
    for member in members:
        table.add_row(
            short_name(member.name), enum_text(Role.Name(member.role), "ROLE_"), member.display_name, ago(member.create_time)
        )
    return table
