"""Asking before something is gone for good."""

from __future__ import annotations

import sys

import typer

from cli.context import Cli
from cli.failures import USAGE, Failure


def confirm(cli: Cli, what: str, yes: bool) -> None:
    """Ask whether to go on, unless `yes`. Raises Failure where the answer is no, or where nobody is there to ask."""
    if yes:
        return
    if cli.json or not sys.stdin.isatty():
        raise Failure(f"{what} is for good; add --yes where nobody can be asked", status=USAGE)
    if not typer.confirm(f"{what}; it cannot be brought back. Go on?", err=True):
        raise Failure("nothing was deleted")
