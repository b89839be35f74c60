"""Making Serve run what the endpoints say. The whole config is rendered each time, because Serve deletes what it leaves out."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from sqlmodel import Session, col, select

from common.errors import Unavailable
from coordinator import messages
from coordinator.cluster.ray_cluster import RayCluster
from coordinator.cluster.serve_config import (
    GATEWAY_APP,
    GATEWAY_CPUS,
    LOOPBACK_HOSTS,
    AppStatus,
    EndpointEntry,
    GatewaySpec,
    KeyEntry,
    ModelApp,
    RouteEntry,
    Snapshot,
    read_status,
    render,
)
from coordinator.notify import Notifier
from coordinator.scheduling.model import Demand
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.leader import Leadership
from coordinator.store.tables import now
from luthier.v1 import admin_pb2, endpoint_pb2

log = logging.getLogger(__name__)

GATEWAY = Demand(GATEWAY_CPUS)
"""What the gateway holds."""

PERIOD = 2.0
"""Seconds between looks at Serve while something is on its way."""

IDLE_PERIOD = 10.0
"""Seconds between looks at Serve while everything is as desired, where only this coordinator changes what is."""

DEPLOYING, READY, FAILED, DELETING = (
    endpoint_pb2.EndpointState.Name(state)
    for state in (
        endpoint_pb2.ENDPOINT_STATE_DEPLOYING,
        endpoint_pb2.ENDPOINT_STATE_READY,
        endpoint_pb2.ENDPOINT_STATE_FAILED,
        endpoint_pb2.ENDPOINT_STATE_DELETING,
    )
)


class Deployer:
    """Renders Serve's config from the endpoints and keys, sends it when it changed, and writes down how Serve fares.

    Runs in the coordinator's event loop as one task. What was sent last is kept only to save sending it again: a fresh process
    sends once more, which changes nothing in Serve.
    """

    def __init__(
        self,
        store: Store,
        cluster: RayCluster,
        notifier: Notifier,
        leadership: Leadership,
        host: str,
        port: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment` is what the gateway and all replicas find in theirs."""
        self._store = store
        self._leadership = leadership
        self._epoch = leadership.epoch
        # On PostgreSQL another coordinator may record a deployment or revoke a key, and nothing tells this one.
        self._idle = IDLE_PERIOD if store.kind == "sqlite" else PERIOD
        self._cluster = cluster
        self._notifier = notifier
        self._gateway = GatewaySpec(host=host, port=port, runtime_env={"env_vars": dict(environment)} if environment else {})
        self._sent = ""
        self._announced: frozenset[str] = frozenset()
        self.url = f"http://{'127.0.0.1' if host in ('', '0.0.0.0') else host}:{port}/v1"  # noqa: S104 (a comparison)
        self.gateway_state = "not_started"

    async def run(self) -> None:
        """Go round until cancelled. A round that fails is logged and tried again."""
        while not self._notifier.closing.is_set():
            period = PERIOD
            try:
                period = PERIOD if await self.round() else self._idle
            except Unavailable as error:
                self.gateway_state = "unreachable" if self._sent else "not_started"
                self._sent = ""
                log.warning("%s", error)
            except Exception:
                log.exception("a round of the deployer failed")
            await self._notifier.wait("endpoints", period)

    async def round(self) -> bool:
        """Send what changed and look at what Serve made of it. True while something is still on its way.

        A coordinator that follows only looks.
        """
        epoch = self._leadership.epoch
        if epoch != self._epoch:
            self._epoch, self._sent = epoch, ""  # what another sent meanwhile is not known here
        endpoints, keys = await self._store.read(_read)
        if not epoch:
            details = await asyncio.to_thread(self._cluster.serve_details) if endpoints else {}
            self._tell_gateway(endpoints, read_status(details))
            return False
        if not endpoints and not self._sent and not await self._left_over():
            return False
        details = await asyncio.to_thread(self._cluster.serve_details) if endpoints or self._sent else {}
        status = read_status(details)
        # What the gateway knew when the status was read: a route that it is only now told of does not answer yet.
        gateway = status.get(GATEWAY_APP)
        known = self._announced if gateway is not None and gateway.state == "RUNNING" else frozenset[str]()
        await self._send(endpoints, keys, status)
        changed = await self._leadership.write(lambda session: _write_down(session, endpoints, status, known), epoch)
        if changed:
            # A route that became ready, or an endpoint that is gone, changes what the gateway has to know.
            endpoints, keys = await self._store.read(_read)
            await self._send(endpoints, keys, status)
            self._notifier.notify("scheduler")
        self._tell_gateway(endpoints, status)
        return any(endpoint.state not in (READY, FAILED) for endpoint in endpoints)

    async def _left_over(self) -> bool:
        """Whether Serve runs something from before this process began, though no endpoint is wanted."""
        if self._sent or not self._cluster.address:
            return False
        details = await asyncio.to_thread(self._cluster.serve_details)
        return bool(details.get("applications"))

    async def _send(
        self, endpoints: Sequence[tables.Endpoint], keys: Sequence[tables.ApiKey], status: Mapping[str, AppStatus]
    ) -> None:
        config = desired_config(self._gateway, endpoints, keys, status)
        text = json.dumps(config, sort_keys=True)
        if text != self._sent:
            await self._leadership.confirm(self._epoch)
            await asyncio.to_thread(self._cluster.deploy, config)
            self._sent = text
        self._announced = frozenset(
            app.name for endpoint in endpoints for _, app in apps_of(endpoint) if app.name in status and status[app.name].ready
        )

    def _tell_gateway(self, endpoints: Sequence[tables.Endpoint], status: Mapping[str, AppStatus]) -> None:
        gateway = status.get(GATEWAY_APP)
        if gateway is not None and gateway.ready:
            self.gateway_state = "running"
        else:
            self.gateway_state = "starting" if endpoints else "not_started"


def desired_config(
    gateway: GatewaySpec,
    endpoints: Sequence[tables.Endpoint],
    keys: Sequence[tables.ApiKey],
    status: Mapping[str, AppStatus],
) -> dict[str, Any]:
    """Serve's whole config. Without endpoints it is empty, which takes the gateway down too."""
    apps: list[ModelApp] = []
    entries = []
    for endpoint in endpoints:
        if endpoint.state == DELETING:
            continue
        routes = []
        for route, app in apps_of(endpoint):
            apps.append(app)
            if app.name in status and status[app.name].ready:
                routes.append(RouteEntry(app.name, route.weight, route.model_version))
        created = int(endpoint.create_time.timestamp())
        entries.append(EndpointEntry(endpoint.project_id, endpoint.id, created, tuple(routes)))
    loopback = gateway.host in LOOPBACK_HOSTS
    snapshot = Snapshot([_key(row) for row in keys], entries, LOOPBACK_HOSTS if loopback else ())
    config = render(gateway, apps, snapshot)
    if not endpoints:
        config["applications"] = []
    return config


def apps_of(endpoint: tables.Endpoint) -> list[tuple[endpoint_pb2.Route, ModelApp]]:
    """Each route of an endpoint with the application that answers it."""
    desired = messages.parse(endpoint.desired["endpoint"], endpoint_pb2.Endpoint())
    pairs = []
    for route in desired.routes:
        artifact = endpoint.desired["artifacts"][route.model_version]
        base = artifact.get("base", {})
        app = ModelApp(
            artifact_uri=artifact["uri"],
            artifact_sha256=artifact["content_hash"],
            base_uri=base.get("uri", ""),
            base_sha256=base.get("content_hash", ""),
            chat_template_sha256=artifact.get("chat_template_sha256", ""),
            cpus=desired.resources.cpus,
            gpus=desired.resources.gpus,
            min_replicas=desired.autoscaling.min_replicas,
            max_replicas=desired.autoscaling.max_replicas,
            target_ongoing_requests=desired.autoscaling.target_ongoing_requests,
        )
        pairs.append((route, app))
    return pairs


def _key(row: tables.ApiKey) -> KeyEntry:
    role = admin_pb2.Role.Name(admin_pb2.Role.ValueType(row.role))
    expires = row.expire_time.timestamp() if row.expire_time else None
    return KeyEntry(row.token_sha256, row.project_id, row.id, role, expires, row.scopes)


def _read(session: Session) -> tuple[Sequence[tables.Endpoint], Sequence[tables.ApiKey]]:
    endpoints = session.exec(select(tables.Endpoint).order_by(tables.Endpoint.project_id, tables.Endpoint.id)).all()
    keys = session.exec(select(tables.ApiKey).where(col(tables.ApiKey.revoke_time).is_(None))).all()
    return endpoints, keys


def _write_down(
    session: Session, seen: Sequence[tables.Endpoint], status: Mapping[str, AppStatus], known: frozenset[str]
) -> bool:
    """Record what was observed of each endpoint, unless its desired state changed meanwhile. True if anything changed.

    `known` are the applications that the gateway leads to: an endpoint is READY once its replicas and the way to them are.
    """
    changed = False
    for old in seen:
        row = session.get(tables.Endpoint, (old.project_id, old.id))
        if row is None or row.generation != old.generation:
            continue
        names = [(route.model_version, app.name) for route, app in apps_of(row)]
        if row.state == DELETING:
            if not _still_runs(session, row, [name for _, name in names], status):
                session.delete(row)
                changed = True
            continue
        ready = {version: status[name].ready_replicas if name in status else 0 for version, name in names}
        state, error = _state(row, [status.get(name) for _, name in names])
        if state == READY and row.state != READY and not known.issuperset(name for _, name in names):
            state = DEPLOYING
        if (state, error, ready) != (row.state, row.error, row.ready_replicas):
            row.state, row.error, row.ready_replicas = state, error, ready
            row.version, row.update_time = row.version + 1, now()
            session.add(row)
            changed = True
    return changed


def _state(row: tables.Endpoint, apps: Sequence[AppStatus | None]) -> tuple[str, str]:
    failed = next((app for app in apps if app is not None and app.failed), None)
    if failed is not None:
        return FAILED, failed.message.strip()[-2000:] or "Serve could not start it"
    least = messages.parse(row.desired["endpoint"], endpoint_pb2.Endpoint()).autoscaling.min_replicas
    if all(app is not None and app.ready_replicas >= min(least, 1) and app.ready for app in apps):
        return READY, ""
    return DEPLOYING, ""


def _still_runs(session: Session, row: tables.Endpoint, names: Sequence[str], status: Mapping[str, AppStatus]) -> bool:
    """Whether an application of an endpoint that is being deleted is up, not counting those that others share."""
    others = session.exec(select(tables.Endpoint)).all()
    shared = {
        app.name
        for other in others
        if (other.project_id, other.id) != (row.project_id, row.id) and other.state != DELETING
        for _, app in apps_of(other)
    }
    return any(name in status for name in names if name not in shared)
