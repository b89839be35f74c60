"""Endpoints as tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cli.render.text import ago, facts, number, plain_table, state_text, when
from luthier.client import short_name
from luthier.v1.endpoint_pb2 import Endpoint, EndpointState, RolloutState, RolloutStatus, Route, RouteFigures

EVENTS_SHOWN = 8


def endpoints_table(endpoints: Iterable[Endpoint]) -> Table:
    """Endpoints, one a line."""
    table = plain_table("endpoint", "state", "answers", "replicas", "canary", "url", "changed")
    for endpoint in endpoints:
        answers = endpoint.serving or endpoint.routes
        table.add_row(
            short_name(endpoint.name),
            state_text(EndpointState.Name(endpoint.state)),
            ", ".join(f"{route.model_version} {route.weight}" if len(answers) > 1 else route.model_version for route in answers),
            str(sum(route.ready_replicas for route in endpoint.routes)),
            _canary(endpoint),
            endpoint.url,
            ago(endpoint.update_time),
        )
    return table


def endpoint_view(endpoint: Endpoint) -> Group:
    """Everything about an endpoint."""
    scaling, resources, rollout = endpoint.autoscaling, endpoint.resources, endpoint.rollout_status
    changing = endpoint.serving and list(endpoint.serving) != [_plain(route) for route in endpoint.routes]
    parts: list[RenderableType] = [
        facts(
            [
                ("endpoint", short_name(endpoint.name)),
                ("state", state_text(EndpointState.Name(endpoint.state))),
                ("error", Text(endpoint.error, "red") if endpoint.error else ""),
                ("url", endpoint.url),
                *((f"route {index}", _route(route)) for index, route in enumerate(endpoint.routes, 1)),
                ("answers now", ", ".join(route.model_version for route in endpoint.serving) if changing else ""),
                ("canary", rollout_text(rollout) if rollout.state else ""),
                ("replicas", f"{scaling.min_replicas} to {scaling.max_replicas}" if scaling.max_replicas else ""),
                ("cpus", number(resources.cpus) if resources.HasField("cpus") else ""),
                ("gpus", number(resources.gpus) if resources.HasField("gpus") else ""),
                ("changed", when(endpoint.update_time)),
            ]
        )
    ]
    if rollout.state == RolloutState.ROLLOUT_STATE_PROGRESSING and rollout.HasField("canary"):
        parts += ["", figures({"canary": rollout.canary, "before it": rollout.stable})]
    if endpoint.events:
        table = plain_table("when", "what happened")
        for event in endpoint.events[-EVENTS_SHOWN:]:
            table.add_row(when(event.time), event.message)
        parts += ["", table]
    return Group(*parts)


def figures(sides: Mapping[str, RouteFigures]) -> Table:
    """How routes did since the step began."""
    table = plain_table("routes", "answers", "failed", "p95", "feedback")
    for name, each in sides.items():
        table.add_row(
            name,
            str(each.requests),
            f"{each.errors / each.requests:.1%}" if each.requests else "",
            f"{each.p95_seconds:.2f} s" if each.requests else "",
            f"{each.feedback_score:.2f} of {each.feedback}" if each.feedback else "",
        )
    return table


def rollout_text(rollout: RolloutStatus) -> str:
    """A rollout on one line."""
    versions = ", ".join(route.model_version for route in rollout.routes)
    state = RolloutState.Name(rollout.state).removeprefix("ROLLOUT_STATE_").lower().replace("_", " ")
    share = f" at {rollout.percent}%" if rollout.state == RolloutState.ROLLOUT_STATE_PROGRESSING else ""
    return f"{versions} {state}{share}" + (f": {rollout.message}" if rollout.message else "")


def _canary(endpoint: Endpoint) -> str:
    rollout = endpoint.rollout_status
    if rollout.state != RolloutState.ROLLOUT_STATE_PROGRESSING:
        return ""
    return f"{', '.join(route.model_version for route in rollout.routes)} {rollout.percent}%"


def _route(route: Route) -> str:
    what = [route.model_version, f"weight {route.weight}"]
    if route.shadow:
        what[1] = "shadow: gets a copy"
    elif route.headers:
        what[1] = "for " + ", ".join(f"{name}: {value}" for name, value in sorted(route.headers.items()))
    return ", ".join([*what, f"{route.ready_replicas} replicas ready"])


def _plain(route: Route) -> Route:
    """A route without what was observed of it."""
    plain = Route()
    plain.CopyFrom(route)
    plain.ready_replicas = 0
    return plain
