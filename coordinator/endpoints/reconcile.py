"""Making Serve run what the endpoints say. The whole config is rendered each time, because Serve deletes what it leaves out."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlmodel import Session, col, select

from common.errors import Unavailable
from coordinator.cluster.gateway import GatewayClient, GatewayReport
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
    Snapshot,
    read_status,
    render,
)
from coordinator.endpoints import progress
from coordinator.endpoints.parts import View, apps_of, candidates, parts_of
from coordinator.endpoints.progress import DELETING, FAILED, READY
from coordinator.jobs.tokens import gateway_token, sha256
from coordinator.notify import Notifier
from coordinator.scheduling.model import Demand
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.store.leader import Leadership
from coordinator.store.tables import now
from luthier.v1 import admin_pb2

log = logging.getLogger(__name__)

GATEWAY = Demand(GATEWAY_CPUS)
"""What the gateway holds."""

PERIOD = 2.0
"""Seconds between looks at Serve while something is on its way."""

IDLE_PERIOD = 10.0
"""Seconds between looks at Serve while everything is as desired, where only this coordinator changes what is."""

LEAVING_SECONDS = 60.0
"""How long an application that nobody is led to any more may take to end what it has in flight."""


@dataclass(frozen=True)
class Records:
    """What is wanted, as recorded."""

    endpoints: Sequence[tables.Endpoint]
    keys: Sequence[tables.ApiKey]
    aliases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # by `project/model`: versions by alias


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
        secret: str,
        environment: Mapping[str, str] | None = None,
        report: Callable[[], GatewayReport | None] | None = None,
    ) -> None:
        """`secret` is the stack's, `environment` what the gateway and all replicas find in theirs."""
        self._store = store
        self._leadership = leadership
        self._epoch = leadership.epoch
        # On PostgreSQL another coordinator may record a deployment or revoke a key, and nothing tells this one.
        self._idle = IDLE_PERIOD if store.kind == "sqlite" else PERIOD
        self._cluster = cluster
        self._notifier = notifier
        self._gateway = GatewaySpec(host=host, port=port, runtime_env={"env_vars": dict(environment)} if environment else {})
        address = f"http://{'127.0.0.1' if host in ('', '0.0.0.0') else host}:{port}"  # noqa: S104 (a comparison)
        self.url = f"{address}/v1"
        token = gateway_token(secret)
        self._token_sha256 = sha256(token)
        self._report = report or GatewayClient(address, token).report
        self._sent = self._version = ""
        self._running: dict[str, ModelApp] = {}
        self._leaving: dict[str, float] = {}
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
        """Look at what Serve and the gateway made of what was sent, and send what follows. True while something is on its way.

        A coordinator that follows only looks.
        """
        epoch = self._leadership.epoch
        if epoch != self._epoch:
            self._epoch, self._sent, self._running, self._leaving = epoch, "", {}, {}  # what another sent is not known here
        records = await self._store.read(_read)
        endpoints = records.endpoints
        if not epoch:
            details = await asyncio.to_thread(self._cluster.serve_details) if endpoints else {}
            self._tell_gateway(endpoints, read_status(details))
            return False
        if not endpoints and not self._sent and not await self._left_over():
            return False
        details = await asyncio.to_thread(self._cluster.serve_details) if endpoints or self._sent else {}
        view = await self._view(read_status(details))
        # A route that the gateway is only now told of does not answer yet.
        led = bool(self._sent) and self._goes_by(view)
        if await self._leadership.write(lambda session: _write_down(session, endpoints, view, led, set(self._running)), epoch):
            records = await self._store.read(_read)
            self._notifier.notify("scheduler")
            self._notifier.notify(*(topic(endpoint.project_id, endpoint.id) for endpoint in endpoints))
        await self._send(records, view)
        self._tell_gateway(records.endpoints, view.status)
        busy = any(endpoint.state not in (READY, FAILED) or progress.rolling(endpoint) for endpoint in records.endpoints)
        return busy or bool(self._leaving)

    async def _view(self, status: Mapping[str, AppStatus]) -> View:
        gateway = status.get(GATEWAY_APP)
        if gateway is None or not gateway.ready:
            return View(status)
        return View(status, await asyncio.to_thread(self._report))

    def _goes_by(self, view: View) -> bool:
        """Whether the gateway goes by the snapshot that was sent last. One that cannot be asked is taken at Serve's word."""
        if view.report is not None:
            return view.report.version == self._version
        gateway = view.status.get(GATEWAY_APP)
        return gateway is not None and gateway.state == "RUNNING"

    async def _left_over(self) -> bool:
        """Whether Serve runs something from before this process began, though no endpoint is wanted."""
        if self._sent or not self._cluster.address:
            return False
        details = await asyncio.to_thread(self._cluster.serve_details)
        return bool(details.get("applications"))

    async def _send(self, records: Records, view: View) -> None:
        wanted = wanted_apps(records.endpoints)
        self._let_go(wanted, view)
        leaving = [self._running[name] for name in self._leaving]
        config = desired_config(self._gateway, records, [*wanted.values(), *leaving], self._token_sha256)
        text = json.dumps(config, sort_keys=True)
        if text != self._sent:
            await self._leadership.confirm(self._epoch)
            await asyncio.to_thread(self._cluster.deploy, config)
            self._sent, self._version = text, _version(config)
        self._running = wanted | {app.name: app for app in leaving}

    def _let_go(self, wanted: Mapping[str, ModelApp], view: View) -> None:
        """Keep applications that nobody is led to any more until the gateway knows, and has nothing in flight there."""
        moment = time.monotonic()
        for name in self._running:
            if name not in wanted:
                self._leaving.setdefault(name, moment + LEAVING_SECONDS)
        for name, deadline in list(self._leaving.items()):
            gone = view.report is None or (self._goes_by(view) and not view.report.in_flight.get(name))
            # In the round in which it begins to leave, the gateway has not been told yet.
            told = deadline - moment < LEAVING_SECONDS
            if name in wanted or moment > deadline or (gone and told):
                del self._leaving[name]

    def _tell_gateway(self, endpoints: Sequence[tables.Endpoint], status: Mapping[str, AppStatus]) -> None:
        gateway = status.get(GATEWAY_APP)
        if gateway is not None and gateway.ready:
            self.gateway_state = "running"
        else:
            self.gateway_state = "starting" if endpoints else "not_started"


def topic(project: str, endpoint: str) -> str:
    """What those who watch an endpoint wait for."""
    return f"endpoint/{project}/{endpoint}"


def wanted_apps(endpoints: Sequence[tables.Endpoint]) -> dict[str, ModelApp]:
    """The applications of what is to answer and of what answers until then, by name."""
    alive = [endpoint for endpoint in endpoints if endpoint.state != DELETING]
    return {app.name: app for endpoint in alive for app in apps_of(endpoint.desired, endpoint.serving)}


def desired_config(gateway: GatewaySpec, records: Records, apps: Sequence[ModelApp], token_sha256: str = "") -> dict[str, Any]:
    """Serve's whole config. Without endpoints it is empty, which takes the gateway down too."""
    entries, tried = [], []
    for endpoint in records.endpoints:
        if endpoint.state == DELETING:
            continue
        routes = progress.announced(endpoint)
        tried += candidates(parts_of(endpoint.desired))
        aliases = _aliases(endpoint.project_id, {route.model_version for route in routes}, records.aliases)
        created = int(endpoint.create_time.timestamp())
        entries.append(EndpointEntry(endpoint.project_id, endpoint.id, created, routes, aliases))
    loopback = gateway.host in LOOPBACK_HOSTS
    keys = [_key(row) for row in records.keys]
    snapshot = Snapshot(keys, entries, LOOPBACK_HOSTS if loopback else (), token_sha256, tried)
    config = render(gateway, apps, snapshot)
    if not records.endpoints:
        config["applications"] = []
    return config


def _version(config: Mapping[str, Any]) -> str:
    """Version of the snapshot in a rendered config; empty where there is none."""
    for app in config["applications"]:
        if app["name"] == GATEWAY_APP:
            return str(app["deployments"][0]["user_config"]["version"])
    return ""


def _aliases(project: str, served: set[str], known: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """What the aliases of the models of some versions stand for, where that is one of these versions."""
    found: dict[str, list[str]] = {}
    for model in {version.partition("@")[0] for version in served}:
        for alias, version in known.get(f"{project}/{model}", {}).items():
            if version in served:
                found.setdefault(alias, []).append(version)
    return found


def _key(row: tables.ApiKey) -> KeyEntry:
    role = admin_pb2.Role.Name(admin_pb2.Role.ValueType(row.role))
    expires = row.expire_time.timestamp() if row.expire_time else None
    limits = (row.requests_per_minute, row.tokens_per_minute)
    return KeyEntry(row.token_sha256, row.project_id, row.id, role, expires, row.scopes, *limits)


def _read(session: Session) -> Records:
    endpoints = session.exec(select(tables.Endpoint).order_by(tables.Endpoint.project_id, tables.Endpoint.id)).all()
    keys = session.exec(select(tables.ApiKey).where(col(tables.ApiKey.revoke_time).is_(None))).all()
    aliases: dict[str, dict[str, str]] = {}
    if endpoints:
        for alias in session.exec(select(tables.ModelAlias)).all():
            named = aliases.setdefault(f"{alias.project_id}/{alias.model_id}", {})
            named[alias.alias] = f"{alias.model_id}@{alias.version}"
    return Records(endpoints, keys, aliases)


def _write_down(session: Session, seen: Sequence[tables.Endpoint], view: View, led: bool, running: set[str]) -> bool:
    """Record what was observed of each endpoint, and what follows, unless its desired state changed meanwhile.

    True if anything changed.
    """
    changed, moment = False, now()
    for old in seen:
        row = session.get(tables.Endpoint, (old.project_id, old.id))
        if row is None or row.generation != old.generation or row.version != old.version:
            continue
        if row.state == DELETING:
            if not _still_runs(session, row, view.status, running):
                session.delete(row)
                changed = True
        elif progress.advance(row, view, led, moment):
            row.version, row.update_time = row.version + 1, moment
            session.add(row)
            changed = True
    return changed


def _still_runs(session: Session, row: tables.Endpoint, status: Mapping[str, AppStatus], running: set[str]) -> bool:
    """Whether an application of an endpoint that is being deleted is up, not counting those that others share."""
    others = session.exec(select(tables.Endpoint)).all()
    shared = wanted_apps([other for other in others if (other.project_id, other.id) != (row.project_id, row.id)])
    names = {app.name for app in apps_of(row.desired, row.serving)} - shared.keys()
    return any(name in status or name in running for name in names)
