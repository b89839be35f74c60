"""`luthier key ...`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated

import typer

from cli.command import command
from cli.context import Cli
from cli.render.admin import keys_table
from cli.values import duration
from luthier.client.names import full_name
from luthier.v1 import admin_pb2
from luthier.v1.admin_pb2 import Key, Role

app = typer.Typer(name="key", help="API keys.", no_args_is_help=True, rich_markup_mode=None)


class RoleName(StrEnum):
    """What a key may do."""

    query = "query"
    viewer = "viewer"
    editor = "editor"
    admin = "admin"
    operator = "operator"


@command(app)
def create(
    cli: Cli,
    name: Annotated[str, typer.Argument(help="A person's name for it; its role where absent.")] = "",
    role: Annotated[
        RoleName, typer.Option(help="What it may do. An operator's runs the stack: projects, and the keys of all of them.")
    ] = RoleName.editor,
    expires_in: Annotated[str, typer.Option(help="How long it counts, for example 30m, 12h or 90d. For ever where absent.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="All that it may touch, within its role: jobs, datasets, models, endpoints, secrets, keys, members, projects; "
            "jobs:read and the like for looking only; endpoints/NAME for querying one. May be repeated."
        ),
    ] = None,
    member: Annotated[str, typer.Option(help="Whose it is: it may do no more than the member, and ends when that leaves.")] = "",
    requests_per_minute: Annotated[int, typer.Option(min=0, help="Requests to endpoints in a minute; 0 for any number.")] = 0,
    tokens_per_minute: Annotated[int, typer.Option(min=0, help="Tokens at endpoints in a minute; 0 for any number.")] = 0,
) -> None:
    """Make a key of a project (--project). Its secret is shown now and never again."""
    wanted = Role.Value(f"ROLE_{role.value.upper()}")
    key = Key(display_name=name or role.value, role=wanted, scopes=scope, member=member)
    key.requests_per_minute, key.tokens_per_minute = requests_per_minute, tokens_per_minute
    if expires_in:
        key.expire_time.FromDatetime(datetime.now(UTC) + timedelta(seconds=duration(expires_in, "--expires-in")))
    answer = cli.client.admin.CreateKey(admin_pb2.CreateKeyRequest(parent=cli.client.parent, key=key))
    if not cli.json:
        cli.out.say("this is the only time that the key is shown")
    cli.out.answer(answer, answer.token)


@command(app, "list")
def list_keys(cli: Cli) -> None:
    """List the project's keys, newest first, without their secrets."""
    keys = list(cli.client.list_keys())
    cli.out.answer(admin_pb2.ListKeysResponse(keys=keys), keys_table(keys))


@command(app)
def revoke(cli: Cli, key: Annotated[str, typer.Argument(help="The key's id, as `luthier key list` shows it.")]) -> None:
    """End a key for good."""
    name = full_name(cli.project, "keys", key)
    revoked = cli.client.admin.RevokeKey(admin_pb2.RevokeKeyRequest(name=name)).key
    cli.out.answer(revoked, keys_table([revoked]))
