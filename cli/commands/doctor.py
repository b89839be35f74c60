"""`luthier doctor`."""

from __future__ import annotations

import typer
from rich.table import Table
from rich.text import Text

from cli import machine
from cli.command import command
from cli.context import Cli
from cli.failures import explain
from luthier.client import LuthierError


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    command(app)(doctor)


def doctor(cli: Cli) -> None:
    """Check this machine and the running stack, and say what to do. Exit status 1 where something needed is missing."""
    own = (cli.stack.port, cli.stack.gateway_port) if cli.stack else ()
    checks = [*machine.examine(cli.home, own), stack_check(cli)]
    table = Table("", "check", "what to do", box=None, pad_edge=False)
    for check in checks:
        mark = Text("ok", "green") if check.ok else Text("missing", "red") if check.needed else Text("note", "yellow")
        table.add_row(mark, check.detail, check.advice)
    fine = all(check.ok or not check.needed for check in checks)
    cli.out.answer({"ok": fine, "checks": [check.as_dict() for check in checks]}, table)
    if not fine:
        raise typer.Exit(1)


def stack_check(cli: Cli) -> machine.Check:
    """Whether the coordinator answers and has its Ray."""
    if cli.stack is None and not cli.given_server:
        return machine.Check("stack", True, f"no stack runs in {cli.home}", "`luthier up` starts one", needed=False)
    try:
        status = cli.client.status()
    except LuthierError as error:
        return machine.Check("stack", False, explain(error)[0], "`luthier up` starts what is missing", needed=False)
    if not status.ray.connected:
        detail = f"the coordinator at {cli.server} has no Ray: {status.ray.error or 'still connecting'}"
        return machine.Check(
            "stack", False, detail, "see logs/ray.log in the home; `luthier up` starts what is missing", needed=False
        )
    return machine.Check("stack", True, f"coordinator at {cli.server}, Ray at {status.ray.address}", needed=False)
