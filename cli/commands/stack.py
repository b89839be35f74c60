"""`luthier up`, `down`, `status` and `nodes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli.command import command
from cli.context import Cli
from cli.failures import FAILED, Failure
from cli.render.admin import nodes_table, status_table
from cli.stack import lifecycle
from cli.stack.state import StackState
from luthier.client import LuthierError
from luthier.v1.admin_pb2 import GetStatusResponse


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    command(app)(up)
    command(app)(down)
    command(app)(status)
    command(app)(nodes)


def up(
    cli: Cli,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the coordinator. 7420, or a free one where that is taken.")
    ] = None,
    gateway_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the HTTP gateway. 8000, or a free one where that is taken.")
    ] = None,
    num_cpus: Annotated[
        int | None, typer.Option(min=1, help="Logical CPUs of the local Ray. Cores plus two where absent.")
    ] = None,
    ray_address: Annotated[
        str, typer.Option(help="Join the Ray cluster with this dashboard, http://head:8265, and start none.")
    ] = "",
    ray_token_path: Annotated[Path | None, typer.Option(help="File with the token of the cluster to join.")] = None,
    storage_uri: Annotated[str, typer.Option(help="Where artifacts are kept; a folder in the home where absent.")] = "",
) -> None:
    """Start a whole local stack: Ray, the coordinator and, with the first endpoint, the gateway."""
    wishes = lifecycle.Wishes(port, gateway_port, num_cpus, ray_address, ray_token_path, storage_uri)
    state = lifecycle.up(cli.home, wishes, cli.out.say)
    cli.out.answer(_summary(cli.home, state), None if cli.json else _summary_text(cli.home, state))


def _summary(home: Path, state: StackState) -> dict[str, Any]:
    coordinator, ray = state.coordinator_process, state.ray_process
    return {
        "home": str(home),
        "coordinator": {"address": state.server, "pid": coordinator.pid if coordinator else None},
        "gateway": {"url": state.gateway_url},
        "ray": {"address": state.ray.address, "pid": ray.pid if ray else None},
        "admin_key_path": str(home / "admin.key"),
    }


def _summary_text(home: Path, state: StackState) -> str:
    flag = "" if home == Path("~/.luthier").expanduser().resolve() else f" --home {home}"
    return "\n".join(
        (
            f"coordinator  {state.server}",
            f"gateway      {state.gateway_url}  (answers with the first endpoint)",
            f"ray          {state.ray.address}",
            f"admin key    {home / 'admin.key'}",
            f"next         luthier doctor{flag} | luthier demo | luthier train --help | luthier down{flag}",
        )
    )


def down(cli: Cli) -> None:
    """Stop everything of the local stack; data, models and logs stay."""
    stopped = lifecycle.down(cli.home, cli.out.say)
    answer = {"home": str(cli.home), "stopped": stopped}
    text = f"stopped {len(stopped)} processes of {cli.home}" if stopped else f"nothing of {cli.home} was running"
    cli.out.answer(answer, None if cli.json else text)


def nodes(cli: Cli) -> None:
    """List the nodes of the Ray cluster, and the labels by which jobs can ask for them."""
    answer: GetStatusResponse = cli.client.status()
    if not answer.ray.connected:
        raise Failure(answer.ray.error or "the Ray cluster does not answer", FAILED)
    cli.out.answer(answer.ray, nodes_table(answer.ray.each_node))


def status(cli: Cli) -> None:
    """Tell what runs, and where. Exit status 5 where no coordinator answers."""
    try:
        answer: GetStatusResponse = cli.client.status()
    except LuthierError:
        if cli.stack is not None and not cli.given_server:
            cli.out.say(f"the stack of {cli.home} should run at {cli.stack.server}; `luthier up` starts what is missing")
        raise
    cli.out.answer(answer, status_table(answer))
