"""What the gateway knows: keys, endpoints and hosts. The coordinator pushes it; without the coordinator the last one holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common import scopes
from serving.gateway.traffic import Traffic
from serving.wire import AdapterRef

ROLES = frozenset({"query", "viewer", "editor", "admin", "operator"})


@dataclass(frozen=True)
class Key:
    """A key without its secret."""

    project: str
    key: str
    role: str
    expire_time: float | None = None
    scopes: frozenset[str] = frozenset()  # empty: whatever the role allows
    requests_per_minute: int = 0  # 0: as many as it likes
    tokens_per_minute: int = 0

    def may_query(self, endpoint: str) -> bool:
        """Whether its scopes allow to query an endpoint."""
        return scopes.allowed(self.scopes, scopes.endpoint(endpoint))

    def may_see(self, endpoint: str) -> bool:
        """Whether its scopes allow to know of an endpoint."""
        return self.may_query(endpoint) or scopes.allowed(self.scopes, scopes.ENDPOINTS + scopes.READ)


@dataclass(frozen=True)
class Route:
    """A model application and its part of the traffic."""

    app: str
    weight: int = 1
    model_version: str = ""
    adapter: AdapterRef | None = None  # where the application's model answers with one
    shadow: bool = False  # gets a copy of what the others are asked; its answers are thrown away
    headers: Mapping[str, str] = field(default_factory=dict)  # who sends all of them gets this route and no other


@dataclass(frozen=True)
class Endpoint:
    """What answers to one model id. No routes: nothing is ready yet."""

    project: str
    endpoint: str
    create_time: int = 0
    routes: tuple[Route, ...] = ()
    aliases: Mapping[str, frozenset[str]] = field(default_factory=dict)  # versions that an alias stands for, of its models

    def name(self, route: Route) -> str:
        """What the counts of one of its routes are found by."""
        return Traffic.name(self.project, self.endpoint, route.model_version)


@dataclass(frozen=True)
class Snapshot:
    """All of it at one moment; replaced whole."""

    keys: Mapping[str, Key] = field(default_factory=dict)  # by SHA-256 of the token, in hex
    endpoints: Mapping[tuple[str, str], Endpoint] = field(default_factory=dict)  # by project and endpoint id
    allowed_hosts: frozenset[str] = frozenset()  # empty: any
    version: str = ""  # the coordinator's own word for it
    coordinator: str = ""  # SHA-256 of the token that the coordinator asks with; empty: nobody may
    candidates: frozenset[tuple[str, AdapterRef]] = frozenset()  # adapters that are to be tried before traffic is led to them

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Snapshot:
        """Read Serve's user_config; raises ValueError or KeyError where it is malformed, and Serve keeps the previous one."""
        keys = {digest: _key(key) for digest, key in config.get("keys", {}).items()}
        endpoints = {}
        for entry in config.get("endpoints", ()):
            routes = tuple(_route(route) for route in entry["routes"])
            if any(route.weight < 0 for route in routes):
                raise ValueError(f"endpoint {entry['endpoint']} has a negative weight")
            aliases = {alias: frozenset(versions) for alias, versions in entry.get("aliases", {}).items()}
            endpoint = Endpoint(entry["project"], entry["endpoint"], int(entry.get("create_time", 0)), routes, aliases)
            endpoints[endpoint.project, endpoint.endpoint] = endpoint
        candidates = frozenset((each["app"], AdapterRef(**each["adapter"])) for each in config.get("candidates", ()))
        hosts = frozenset(host.lower() for host in config.get("allowed_hosts", ()))
        return cls(keys, endpoints, hosts, config.get("version", ""), config.get("coordinator", ""), candidates)

    def apps(self) -> frozenset[str]:
        """Return the applications that some route leads to."""
        led_to = {route.app for endpoint in self.endpoints.values() for route in endpoint.routes}
        return frozenset(led_to | {app for app, _ in self.candidates})

    def adapters(self) -> frozenset[tuple[str, AdapterRef]]:
        """Return the applications with the adapters that they answer with, or are to be tried with."""
        led_to = {
            (route.app, route.adapter) for endpoint in self.endpoints.values() for route in endpoint.routes if route.adapter
        }
        return self.candidates | led_to

    def names(self) -> frozenset[str]:
        """Return what the counts of all routes are found by."""
        return frozenset(endpoint.name(route) for endpoint in self.endpoints.values() for route in endpoint.routes)


def _key(entry: Mapping[str, Any]) -> Key:
    return Key(
        entry["project"],
        entry["key"],
        _role(entry["role"]),
        entry.get("expire_time"),
        frozenset(entry.get("scopes", ())),
        int(entry.get("requests_per_minute", 0)),
        int(entry.get("tokens_per_minute", 0)),
    )


def _route(entry: Mapping[str, Any]) -> Route:
    adapter = AdapterRef(**entry["adapter"]) if entry.get("adapter") else None
    headers = {name.lower(): value for name, value in (entry.get("headers") or {}).items()}
    return Route(
        entry["app"], int(entry.get("weight", 1)), entry.get("model_version", ""), adapter, bool(entry.get("shadow")), headers
    )


def _role(value: str) -> str:
    role = str(value).lower().removeprefix("role_")
    if role not in ROLES:
        raise ValueError(f"{value!r} is not a role")
    return role
