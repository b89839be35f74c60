"""`luthier endpoint ...`."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.command import command
from cli.context import Cli
from cli.failures import Failure
from cli.gateway import ask
from cli.render.endpoints import endpoint_view, endpoints_table, rollout_text
from cli.render.text import when
from luthier.client import short_name
from luthier.v1.endpoint_pb2 import (
    Autoscaling,
    Endpoint,
    EndpointState,
    ListEndpointsResponse,
    ReplicaResources,
    Rollout,
    RolloutAction,
    RolloutState,
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
    scale_to_zero: Annotated[
        bool,
        typer.Option("--scale-to-zero", help="Let all replicas go when nobody asks; the next request starts one."),
    ] = False,
    idle_seconds: Annotated[float | None, typer.Option(help="Seconds of little to do after which replicas go; 300.")] = None,
    cpus: Annotated[float | None, typer.Option(help="Logical CPUs that each replica holds; 0.5 where absent.")] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs that each replica holds.")] = None,
    canary: Annotated[
        bool,
        typer.Option("--canary", help="Lead traffic there step by step, and back by itself where the new versions do worse."),
    ] = False,
    steps: Annotated[str, typer.Option(help="With --canary: percentages, rising to 100.", metavar="5,25,50,100")] = "",
    min_requests: Annotated[int | None, typer.Option(help="With --canary: answers that a step needs; 50 where absent.")] = None,
    step_seconds: Annotated[float | None, typer.Option(help="With --canary: least seconds of a step; 60 where absent.")] = None,
    max_error_rate: Annotated[float | None, typer.Option(help="With --canary: most failures; 0.05 where absent.")] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option(help="With --canary: most of its p95 by the old one's; 2 where absent, 0 for any.")
    ] = None,
    min_feedback: Annotated[float | None, typer.Option(help="With --canary: least mean feedback, 0 to 1.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it answers, or until the canary's end.")] = False,
    timeout: Seconds = 600,
    validate_only: Annotated[bool, typer.Option("--validate-only", help="Check everything and record nothing.")] = False,
) -> None:
    """Deploy model versions behind the gateway, or change what is deployed."""
    desired = Endpoint(routes=routes(model))
    if min_replicas or max_replicas or target_requests:
        desired.autoscaling.CopyFrom(
            Autoscaling(min_replicas=min_replicas, max_replicas=max_replicas, target_ongoing_requests=target_requests)
        )
    desired.autoscaling.scale_to_zero = scale_to_zero
    if idle_seconds is not None:
        desired.autoscaling.downscale_seconds = idle_seconds
    if cpus is not None or gpus is not None:
        desired.resources.CopyFrom(ReplicaResources(cpus=cpus, gpus=gpus))
    wishes = {
        "min_requests": min_requests,
        "max_error_rate": max_error_rate,
        "max_latency_ratio": max_latency_ratio,
        "min_feedback_score": min_feedback,
    }
    given = {name: value for name, value in wishes.items() if value is not None}
    if canary:
        desired.rollout.CopyFrom(Rollout(steps=percentages(steps), **given))  # type: ignore[arg-type]
        if step_seconds is not None:
            desired.rollout.min_duration.FromMilliseconds(round(step_seconds * 1000))
    elif given or steps or step_seconds is not None:
        raise Failure("--steps, --min-requests and the like are for --canary", status=2)
    found = cli.client.deploy_endpoint(endpoint, desired, validate_only=validate_only)
    if wait and canary and not validate_only:
        found = follow(cli, found)
    elif wait and not validate_only:
        with cli.out.busy(f"starting {endpoint}"):
            found = cli.client.wait_ready(endpoint, timeout)
    cli.out.answer(found, endpoint_view(found))
    if canary and wait and found.rollout_status.state != RolloutState.ROLLOUT_STATE_PROMOTED:
        raise typer.Exit(1)


def percentages(text: str) -> list[int]:
    """`5,25,100` as numbers; none of an empty text."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdigit() for part in parts):
        raise Failure(f"--steps {text}: not whole numbers with commas between them", status=2)
    return [int(part) for part in parts]


def follow(cli: Cli, deployed: Endpoint) -> Endpoint:
    """Say what happens to an endpoint until no canary is on its way any more; return how it is then."""
    found, told = deployed, _latest(deployed)
    with cli.out.busy(f"the canary of {short_name(deployed.name)}"):
        for found in cli.client.watch_endpoint(short_name(deployed.name)):
            for event in found.events:
                if event.time.ToNanoseconds() > told:
                    cli.out.say(f"{when(event.time)}  {event.message}")
            told = max(told, _latest(found))
            if found.rollout_status.state != RolloutState.ROLLOUT_STATE_PROGRESSING:
                break
    return found


def _latest(endpoint: Endpoint) -> int:
    """When something last happened to it, in nanoseconds."""
    return max((event.time.ToNanoseconds() for event in endpoint.events), default=0)


@command(app)
def traffic(
    cli: Cli,
    endpoint: NameArgument,
    model: Annotated[list[str], typer.Option(help="Model version and weight, tickets@1=9; all of them.")],
) -> None:
    """Share the traffic otherwise. Replicas that are there stay."""
    found = cli.client.update_endpoint(endpoint, Endpoint(routes=routes(model)), "routes")
    cli.out.answer(found, endpoint_view(found))


@command(app)
def promote(cli: Cli, endpoint: NameArgument) -> None:
    """Lead all traffic to the canary now."""
    found = cli.client.update_endpoint(endpoint, action=RolloutAction.ROLLOUT_ACTION_PROMOTE)
    cli.out.answer(found, endpoint_view(found))


@command(app)
def rollback(cli: Cli, endpoint: NameArgument) -> None:
    """Lead all traffic back to what answered before the canary."""
    found = cli.client.update_endpoint(endpoint, action=RolloutAction.ROLLOUT_ACTION_ROLL_BACK)
    cli.out.answer(found, endpoint_view(found))


@command(app)
def watch(cli: Cli, endpoint: NameArgument) -> None:
    """Follow an endpoint until it is gone, or until Ctrl-C; with --output json one state a line."""
    told = 0
    for found in cli.client.watch_endpoint(endpoint):
        if cli.json:
            cli.out.line(found, "")
            continue
        for event in found.events:
            if event.time.ToNanoseconds() > told:
                told = event.time.ToNanoseconds()
                cli.out.line(event, f"{when(event.time)}  {event.message}")
        if found.rollout_status.state == RolloutState.ROLLOUT_STATE_PROGRESSING and found.rollout_status.message:
            cli.out.say(rollout_text(found.rollout_status))


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
