"""`luthier secret ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cli.command import command
from cli.confirm import confirm
from cli.context import Cli
from cli.failures import USAGE, Failure
from cli.render.secrets import secrets_table
from luthier.v1.secret_pb2 import ListSecretsResponse

app = typer.Typer(
    name="secret", help="Secrets: values that jobs need and nobody may read.", no_args_is_help=True, rich_markup_mode=None
)

NameArgument = Annotated[str, typer.Argument(help="The secret's name.", metavar="NAME")]


@command(app, "set")
def set_secret(
    cli: Cli,
    name: NameArgument,
    from_file: Annotated[
        Path | None, typer.Option(help="File with the value; else it is asked for, or read from a pipe.")
    ] = None,
) -> None:
    """Make a secret, or replace its value. A line's end at its end does not belong to it; no command shows it again."""
    secret = cli.client.set_secret(name, read_value(name, from_file))
    cli.out.answer(secret, secrets_table([secret]))


@command(app, "list")
def list_secrets(cli: Cli) -> None:
    """List the project's secrets by name, without their values."""
    secrets = list(cli.client.list_secrets())
    cli.out.answer(ListSecretsResponse(secrets=secrets), secrets_table(secrets))


@command(app)
def delete(cli: Cli, name: NameArgument, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Remove a secret; refused while a job that has not ended refers to it."""
    confirm(cli, f"deleting secret {name}", yes)
    cli.client.delete_secret(name)
    cli.out.line({"deleted": name}, f"deleted {name}")


def read_value(name: str, file: Path | None) -> str:
    """The value of a secret: from a file, from whoever sits there without showing it, or from a pipe. Never from an argument."""
    if file is None and sys.stdin.isatty():
        return str(typer.prompt(f"value of {name}", hide_input=True, err=True))
    try:
        text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise Failure(f"{file or 'the value'} is not text in UTF-8; encode it, for example with base64", USAGE) from None
    return text.removesuffix("\n").removesuffix("\r")
