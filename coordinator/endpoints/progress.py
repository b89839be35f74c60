"""How an endpoint gets from what answers to what is wanted: all at once when it is ready, or step by step by a rollout.

Functions of a row and of what was seen in this round; the caller holds the transaction. `serving` is what the gateway leads to;
it changes only here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from coordinator import messages
from coordinator.cluster.gateway import GatewayReport
from coordinator.cluster.serve_config import RouteEntry
from coordinator.endpoints import rollout as rollouts
from coordinator.endpoints.parts import Part, View, parts_of
from coordinator.endpoints.rollout import Counts
from coordinator.scheduling.model import Demand
from coordinator.store import tables
from luthier.v1 import endpoint_pb2

DEPLOYING, READY, FAILED, DELETING = (
    endpoint_pb2.EndpointState.Name(state)
    for state in (
        endpoint_pb2.ENDPOINT_STATE_DEPLOYING,
        endpoint_pb2.ENDPOINT_STATE_READY,
        endpoint_pb2.ENDPOINT_STATE_FAILED,
        endpoint_pb2.ENDPOINT_STATE_DELETING,
    )
)
PROGRESSING, PROMOTED, ROLLED_BACK = (
    endpoint_pb2.RolloutState.Name(state)
    for state in (
        endpoint_pb2.ROLLOUT_STATE_PROGRESSING,
        endpoint_pb2.ROLLOUT_STATE_PROMOTED,
        endpoint_pb2.ROLLOUT_STATE_ROLLED_BACK,
    )
)
EVENTS_KEPT = 50


def say(row: tables.Endpoint, moment: datetime, message: str) -> None:
    """Add to what happened to an endpoint."""
    row.events = [*row.events, {"time": moment.isoformat(), "message": message}][-EVENTS_KEPT:]


def rolling(row: tables.Endpoint) -> bool:
    """Whether a rollout is on its way."""
    return bool(row.rollout.get("state") == PROGRESSING)


def begin(row: tables.Endpoint, moment: datetime) -> None:
    """Begin the rollout that the desired state asks for; the first step begins once its routes are ready.

    What answers until then goes on being READY.
    """
    routes = [route["model_version"] for route in row.desired["endpoint"]["routes"]]
    row.rollout = {"state": PROGRESSING, "step": -1, "begun": moment.isoformat(), "routes": row.desired["endpoint"]["routes"]}
    say(row, moment, f"a rollout of {', '.join(routes)} begins: starts its replicas")


def announced(row: tables.Endpoint) -> tuple[RouteEntry, ...]:
    """The routes that the gateway is to lead to now."""
    old = parts_of(row.serving)
    if not rolling(row) or row.rollout["step"] < 0:
        return tuple(part.entry() for part in old)
    new, percent = parts_of(row.desired), _percent(row)
    mine, theirs = rollouts.weights([part.route.weight for part in old], [part.route.weight for part in new], percent)
    sides = ((old, mine), (new, theirs))
    return tuple(part.entry(weight) for parts, weights in sides for part, weight in zip(parts, weights, strict=True))


def claim(*documents: Mapping[str, Any]) -> Demand:
    """What the applications of some desired states hold at their least; those that are shared count once."""
    apps = {part.app.name: part.app for document in documents for part in parts_of(document)}
    return sum((Demand(app.cpus, app.gpus).times(app.min_replicas) for app in apps.values()), Demand())  # asleep it holds nothing


def advance(row: tables.Endpoint, view: View, led: bool, moment: datetime) -> bool:
    """Go on from what was seen. True if anything of the row changed.

    `led` says that the gateway goes by the last snapshot that it was sent.
    """
    before = (row.state, row.error, row.ready_replicas, row.serving, row.rollout, row.events)
    if rolling(row):
        _roll(row, view, moment)
    elif row.serving != row.desired:
        _replace(row, view, moment)
    # What begins to answer now is in the next snapshot at the earliest.
    _look(row, view, led and row.serving == before[3])
    row.cpus, row.gpus = (needs := claim(row.desired, row.serving)).cpus, needs.gpus
    return (row.state, row.error, row.ready_replicas, row.serving, row.rollout, row.events) != before


def _replace(row: tables.Endpoint, view: View, moment: datetime) -> None:
    """Lead everybody to what is wanted, once all of it is ready."""
    parts = parts_of(row.desired)
    if parts and all(view.ready(part) for part in parts):
        if row.serving:
            say(row, moment, f"leads to {_told(row.desired)} instead of {_told(row.serving)}")
        else:
            say(row, moment, f"leads to {_told(row.desired)}")
        row.serving = row.desired


def _look(row: tables.Endpoint, view: View, led: bool) -> None:
    parts = parts_of(row.desired)
    error = next((why for part in parts if (why := view.failed(part))), "")
    row.ready_replicas = {part.route.model_version: view.replicas(part) for part in parts}
    if rolling(row):
        error = ""  # sends the rollout back
    if error:
        row.state, row.error = FAILED, error
    elif row.serving == row.desired and _answers(row, parts, view) and (led or row.state == READY):
        row.state, row.error = READY, ""
    elif rolling(row) and row.state == READY and _answers(row, parts_of(row.serving), view):
        pass
    else:
        row.state, row.error = DEPLOYING, ""


def _answers(row: tables.Endpoint, parts: Sequence[Part], view: View) -> bool:
    """Whether all routes answer. Of one that did, a gateway that says nothing about its adapter says nothing against it."""
    return all(view.ready(part) or (row.state == READY and view.unknown(part)) for part in parts)


def _roll(row: tables.Endpoint, view: View, moment: datetime) -> None:
    spec = messages.parse(row.desired["endpoint"], endpoint_pb2.Endpoint()).rollout
    state = dict(row.rollout)
    new = parts_of(row.desired)
    if why := next((why for part in new if (why := view.failed(part))), ""):
        roll_back(row, moment, f"it could not be started: {why}")
        return
    if state["step"] < 0:
        if all(view.ready(part) for part in new):
            _step(row, state, 0, moment)
        return
    _count(row, state, view.report)
    canary, stable = Counts.of(state["canary"]), Counts.of(state["stable"])
    seconds = (moment - datetime.fromisoformat(state["since"])).total_seconds()
    verdict = rollouts.decide(spec, canary, stable, seconds)
    state["message"] = verdict.why
    row.rollout = state
    if verdict.what == "back":
        roll_back(row, moment, verdict.why)
    elif verdict.what == "next" and _percent(row) < 100:
        _step(row, state, state["step"] + 1, moment)
    elif verdict.what == "next":
        promote(row, moment, verdict.why)


def promote(row: tables.Endpoint, moment: datetime, why: str) -> None:
    """All traffic to the new routes, for good."""
    say(row, moment, f"promoted: {_told(row.desired)} answers now instead of {_told(row.serving)}: {why}")
    row.serving = row.desired
    row.rollout = {**row.rollout, "state": PROMOTED, "message": why}


def roll_back(row: tables.Endpoint, moment: datetime, why: str) -> None:
    """All traffic back to the old routes, which are what is wanted again."""
    say(row, moment, f"rolled back: {_told(row.serving)} answers again instead of {_told(row.desired)}: {why}")
    row.rollout = {**row.rollout, "state": ROLLED_BACK, "message": why, "percent": 0}
    row.desired = row.serving
    row.generation += 1


def _step(row: tables.Endpoint, state: dict[str, Any], step: int, moment: datetime) -> None:
    nothing = vars(Counts())
    row.rollout = {**state, "step": step, "since": moment.isoformat(), "canary": nothing, "stable": nothing, "message": ""}
    row.rollout["percent"] = _percent(row)
    say(row, moment, f"{_percent(row)}% of the traffic goes to {_told(row.desired)}")


def _percent(row: tables.Endpoint) -> int:
    return int(row.desired["endpoint"]["rollout"]["steps"][row.rollout["step"]])


def _count(row: tables.Endpoint, state: dict[str, Any], report: GatewayReport | None) -> None:
    """Add what was counted since the last look. A gateway that was started again counts from nothing."""
    if report is None:
        return
    last = state.get("last", {}) if state.get("started") == report.started else {}
    seen: dict[str, Any] = {}
    for side, document in (("canary", row.desired), ("stable", row.serving)):
        total = Counts.of(state[side])
        for part in parts_of(document):
            name = f"{row.project_id}/{row.id}/{part.route.model_version}"
            if told := report.routes.get(name):
                seen[name] = vars(Counts.of(told))
                # What was counted before the rollout, or at the step before, is in the last look; at the first there is none.
                known = Counts.of(last[name]) if name in last else Counts.of(told) if "last" not in state else Counts()
                total += Counts.of(told) - known
        state[side] = vars(total)
    state["last"], state["started"] = seen, report.started


def _told(document: Mapping[str, Any]) -> str:
    return ", ".join(route["model_version"] for route in document.get("endpoint", {}).get("routes", ()))
