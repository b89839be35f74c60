"""What the gateway knows: keys, endpoints and hosts. The coordinator pushes it; without the coordinator the last one holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common import scopes

ROLES = frozenset({"query", "viewer", "editor", "admin", "operator"})


@dataclass(frozen=True)
class Key:
    """A key without its secret."""

    project: str
    key: str
    role: str
    expire_time: float | None = None
    scopes: frozenset[str] = frozenset()  # empty: whatever the role allows

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


@dataclass(frozen=True)
class Endpoint:
    """What answers to one model id. No routes: nothing is ready yet."""

    project: str
    endpoint: str
    create_time: int = 0
    routes: tuple[Route, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """All of it at one moment; replaced whole."""

    keys: Mapping[str, Key] = field(default_factory=dict)  # by SHA-256 of the token, in hex
    endpoints: Mapping[tuple[str, str], Endpoint] = field(default_factory=dict)  # by project and endpoint id
    allowed_hosts: frozenset[str] = frozenset()  # empty: any

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Snapshot:
        """Read Serve's user_config; raises ValueError or KeyError where it is malformed, and Serve keeps the previous one."""
        keys = {
            digest: Key(key["project"], key["key"], _role(key["role"]), key.get("expire_time"), frozenset(key.get("scopes", ())))
            for digest, key in config.get("keys", {}).items()
        }
        endpoints = {}
        for entry in config.get("endpoints", ()):
            routes = tuple(
                Route(route["app"], int(route.get("weight", 1)), route.get("model_version", "")) for route in entry["routes"]
            )
            if any(route.weight < 0 for route in routes):
                raise ValueError(f"endpoint {entry['endpoint']} has a negative weight")
            endpoint = Endpoint(entry["project"], entry["endpoint"], int(entry.get("create_time", 0)), routes)
            endpoints[endpoint.project, endpoint.endpoint] = endpoint
        return cls(keys, endpoints, frozenset(host.lower() for host in config.get("allowed_hosts", ())))

    def apps(self) -> frozenset[str]:
        """Return the applications that some route leads to."""
        return frozenset(route.app for endpoint in self.endpoints.values() for route in endpoint.routes)


def _role(value: str) -> str:
    role = str(value).lower().removeprefix("role_")
    if role not in ROLES:
        raise ValueError(f"{value!r} is not a role")
    return role
