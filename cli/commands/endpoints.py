"""`luthier endpoint ...`."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.command import command
from cli.context import Cli
from cli.failures import Failure
from cli.gateway import ask
from cli.render.registry import endpoint_view, endpoints_table
from luthier.client import short_name
from luthier.v1.endpoint_pb2 import (
    Autoscaling,
    Endpoint,
    EndpointState,
    ListEndpointsResponse,
    ReplicaResources,
    Route,
)

app = typer.Typer(name="endpoint", help="Endpoints: models that answer.", no_args_is_help=True, rich_markup_mode=None)

NameArgument = Annotated[str, typer.Argument(help="The endpoint's name, which OpenAI clients give as model.", metavar="ENDPOINT")]
Seconds = Annotated[float, typer.Option(min=1, help="With --wait: give up after this many seconds.")]


def routes(models: list[str]) -> list[Route]:
    """`tickets@1` or `tickets@1=90` as routes."""
    found = []
    for model in models:
        version, equals, weight = model.partition("=")
        if equals and not weight.isdigit():
            raise Failure(f"--model {model}: the weight {weight!r} is not a whole number", status=2)
        found.append(Route(model_version=version, weight=int(weight) if equals else 0))
    return found


@command(app)
def deploy(
    cli: Cli,
    endpoint: NameArgument,
    model: Annotated[
        list[str],
        typer.Option(
            help="Model version, tickets@1. Several share the traffic by weight: --model tickets@1=9 --model tickets@2=1."
        ),
    ],
    min_replicas: Annotated[int, typer.Option(help="Replicas that are always there; 1 where absent.")] = 0,
    max_replicas: Annotated[int, typer.Option(help="Most replicas; the same as --min-replicas where absent.")] = 0,
    target_requests: Annotated[float, typer.Option(help="Requests in progress per replica that scaling aims at.")] = 0,
    cpus: Annotated[float | None, typer.Option(help="Logical CPUs that each replica holds; 0.5 where absent.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs that each replica holds.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it answers.")] = False,
    timeout: Seconds = 600,
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Check everything and record nothing.")] = False,
) -> None:
    """Deploy model versions behind the gateway, or change what is deployed."""
    desired = Endpoint(routes=routes(model))
    if min_replicas or max_replicas or target_requests:
        desired.autoscaling.CopyFrom(
            Autoscaling(min_replicas=min_replicas, max_replicas=max_replicas, target_ongoing_requests=target_requests)
        )
    if cpus is not None or gpus is not None:
        desired.resources.CopyFrom(ReplicaResources(cpus=cpus, gpus=gpus))
    found = cli.client.deploy_endpoint(endpoint, desired, validate_only=validate_only)
    if wait and not validate_only:
        with cli.out.busy(f"starting {endpoint}"):
            found = cli.client.wait_ready(endpoint, timeout)
    cli.out.answer(found, endpoint_view(found))


@command(app, "list")
def list_endpoints(cli: Cli) -> None:
    """List endpoints by name."""
    endpoints = list(cli.client.list_endpoints())
    cli.out.answer(ListEndpointsResponse(endpoints=endpoints), endpoints_table(endpoints))


@command(app)
def show(cli: Cli, endpoint: NameArgument) -> None:
    """Show everything about an endpoint."""
    found = cli.client.get_endpoint(endpoint)
    cli.out.answer(found, endpoint_view(found))


@command(app)
def query(
    cli: Cli,
    endpoint: NameArgument,
    text: Annotated[str, typer.Argument(help="What to ask.")],
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer while it is written.")] = False,
    system: Annotated[str, typer.Option(help="System message to put before it.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")] = 0.0,
) -> None:
    """Ask an endpoint over HTTP, the way an OpenAI client does."""
    found = cli.client.get_endpoint(endpoint)
    if found.state != EndpointState.ENDPOINT_STATE_READY:
        state = EndpointState.Name(found.state).removeprefix("ENDPOINT_STATE_").lower()
        cli.out.say(f"the endpoint is {state}, so it may not answer" + (f": {found.error}" if found.error else ""))
    ask(cli, found.url, short_name(found.name), text, system, stream, max_tokens, temperature)


@command(app)
def delete(
    cli: Cli,
    endpoint: NameArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until its replicas are gone.")] = False,
    timeout: Seconds = 300,
) -> None:
    """Take an endpoint down."""
    found = cli.client.delete_endpoint(endpoint)
    if wait:
        with cli.out.busy(f"stopping {endpoint}"):
            cli.client.wait_gone(endpoint, timeout)
    cli.out.answer(found, f"{endpoint} is gone" if wait else f"{endpoint} is being taken down")
