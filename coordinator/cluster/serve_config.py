"""Ray Serve's declarative configuration from the endpoints wanted, and its status document read back. Pure: no Ray, no I/O.

The configuration is rendered whole each time, because Serve deletes what it leaves out.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

GATEWAY_APP = "gateway"
GATEWAY_CPUS = 0.1
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class GatewaySpec:
    """The HTTP side. Serve takes host and port only when it starts; to change them it has to be shut down first."""

    host: str = "127.0.0.1"
    port: int = 8000
    max_body_bytes: int = 4 * 2**20
    max_in_flight: int = 512
    request_timeout_s: float = 600.0
    runtime_env: Mapping[str, Any] = field(default_factory=dict)  # of the gateway and of all models


@dataclass(frozen=True)
class ModelApp:
    """One model version with its resources and scaling. Equal ones share their replicas, whatever endpoints they serve."""

    artifact_uri: str
    artifact_sha256: str  # of the artifact's manifest
    base_uri: str = ""  # where the artifact is an adapter
    base_sha256: str = ""
    cpus: float = 0.5
    gpus: float = 0.0
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float = 4.0
    chat_template_sha256: str = ""  # as on record, for the replicas to compare
    upscale_s: float = 10.0
    downscale_s: float = 300.0

    def __post_init__(self) -> None:
        # Numbers of proto and database come as int or float; the name must not depend on which.
        for name in ("cpus", "gpus", "target_ongoing_requests", "upscale_s", "downscale_s"):
            object.__setattr__(self, name, float(getattr(self, name)))

    @property
    def name(self) -> str:
        """Name of the Serve application: stable, and another one for anything that replicas cannot change as they run."""
        fields = asdict(self)
        # Endpoints from before these were known keep their replicas.
        for known_later in ("chat_template_sha256", "upscale_s", "downscale_s"):
            if fields[known_later] == type(self).__dataclass_fields__[known_later].default:
                del fields[known_later]
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return f"m-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class KeyEntry:
    """An API key that counts; revoked ones are left out."""

    token_sha256: str  # hex
    project: str
    key: str
    role: str  # query, viewer, editor or admin, with or without the prefix ROLE_
    expire_time: float | None = None  # seconds since 1970
    scopes: Sequence[str] = ()  # none: whatever the role allows
    requests_per_minute: int = 0  # 0: as many as it likes
    tokens_per_minute: int = 0


@dataclass(frozen=True)
class AdapterEntry:
    """A LoRA adapter on the model of an application, as serving/wire.py has it."""

    uri: str
    sha256: str  # of its manifest
    chat_template_sha256: str = ""

    @property
    def name(self) -> str:
        """What the gateway's report calls it."""
        return self.sha256 or self.uri


@dataclass(frozen=True)
class RouteEntry:
    """An application and its part of the traffic."""

    app: str
    weight: int = 1
    model_version: str = ""
    adapter: AdapterEntry | None = None
    shadow: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EndpointEntry:
    """An endpoint and those of its routes that are ready. Without any, the gateway answers 503 for it."""

    project: str
    endpoint: str
    create_time: int = 0  # seconds since 1970
    routes: tuple[RouteEntry, ...] = ()
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)  # versions that aliases of its models stand for


@dataclass(frozen=True)
class Snapshot:
    """What the gateway is to know. A change reaches it without restarting anything."""

    keys: Sequence[KeyEntry] = ()
    endpoints: Sequence[EndpointEntry] = ()
    allowed_hosts: Sequence[str] = LOOPBACK_HOSTS  # names in the Host header; empty accepts any
    coordinator: str = ""  # SHA-256 of the token that the coordinator asks the gateway with
    candidates: Sequence[tuple[str, AdapterEntry]] = ()  # applications, and adapters that they are to try

    def user_config(self) -> dict[str, Any]:
        """Return it as Serve's user_config. Its `version` is a hash of the rest."""
        keys = {
            key.token_sha256.lower(): {
                "project": key.project,
                "key": key.key,
                "role": key.role,
                "expire_time": key.expire_time,
                "scopes": sorted(key.scopes),
                "requests_per_minute": key.requests_per_minute,
                "tokens_per_minute": key.tokens_per_minute,
            }
            for key in sorted(self.keys, key=lambda key: key.token_sha256)
        }
        endpoints = [
            {
                "project": entry.project,
                "endpoint": entry.endpoint,
                "create_time": entry.create_time,
                "routes": [asdict(route) for route in entry.routes],
                "aliases": {alias: sorted(versions) for alias, versions in sorted(entry.aliases.items())},
            }
            for entry in sorted(self.endpoints, key=lambda entry: (entry.project, entry.endpoint))
        ]
        tried = sorted({(app, adapter.name): (app, adapter) for app, adapter in self.candidates}.items())
        config = {
            "keys": keys,
            "endpoints": endpoints,
            "allowed_hosts": sorted(set(self.allowed_hosts)),
            "coordinator": self.coordinator,
            "candidates": [{"app": app, "adapter": asdict(adapter)} for _, (app, adapter) in tried],
        }
        text = json.dumps(config, sort_keys=True, separators=(",", ":"))
        return config | {"version": hashlib.sha256(text.encode()).hexdigest()[:16]}


@dataclass(frozen=True)
class AppStatus:
    """How a Serve application stands. `state` is Serve's own word: DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, DELETING …"""

    state: str
    message: str = ""
    ready_replicas: int = 0

    @property
    def ready(self) -> bool:
        """Whether it answers. While Serve repairs or scales it, the replicas that are left do."""
        return self.ready_replicas > 0 and self.state not in ("DELETING", "NOT_STARTED")

    @property
    def failed(self) -> bool:
        """Whether it could not be started."""
        return self.state == "DEPLOY_FAILED"


def render(gateway: GatewaySpec, apps: Sequence[ModelApp], snapshot: Snapshot) -> dict[str, Any]:
    """Return the body of PUT /api/serve/applications/. The same input gives the same bytes, in whatever order it comes."""
    unique = sorted({app.name: app for app in apps}.items())
    return {
        # One proxy, beside the gateway replica; further nodes hold model replicas only.
        "proxy_location": "HeadOnly",
        "http_options": {"host": gateway.host, "port": gateway.port},
        "applications": [_gateway(gateway, snapshot), *(_model(gateway, name, app) for name, app in unique)],
    }


def read_status(details: Mapping[str, Any]) -> dict[str, AppStatus]:
    """Read the answer of GET /api/serve/applications/ into a status for each application."""
    found: dict[str, AppStatus] = {}
    for name, app in (details.get("applications") or {}).items():
        deployments = list((app.get("deployments") or {}).values())
        running = [
            sum(replica.get("state") == "RUNNING" for replica in deployment.get("replicas") or ()) for deployment in deployments
        ]
        messages = [app.get("message") or "", *(deployment.get("message") or "" for deployment in deployments)]
        message = next((text for text in messages if text.strip()), "")
        found[name] = AppStatus(str(app.get("status", "NOT_STARTED")), message, min(running, default=0))
    return found


def _gateway(gateway: GatewaySpec, snapshot: Snapshot) -> dict[str, Any]:
    return {
        "name": GATEWAY_APP,
        "route_prefix": "/",
        "import_path": "serving.app:build_gateway",
        "runtime_env": dict(gateway.runtime_env),
        "args": {
            "max_body_bytes": gateway.max_body_bytes,
            "max_in_flight": gateway.max_in_flight,
            "request_timeout_s": gateway.request_timeout_s,
        },
        "deployments": [
            {
                "name": "Gateway",
                "num_replicas": 1,
                # Above what the gateway itself lets in, so that its own refusal is what clients see.
                "max_ongoing_requests": 2 * gateway.max_in_flight,
                "user_config": snapshot.user_config(),
                "ray_actor_options": {"num_cpus": GATEWAY_CPUS, "num_gpus": 0.0},
                "graceful_shutdown_wait_loop_s": 1.0,
                "graceful_shutdown_timeout_s": 20.0,
                "health_check_period_s": 5.0,
                "health_check_timeout_s": 30.0,
            }
        ],
    }


def _model(gateway: GatewaySpec, name: str, app: ModelApp) -> dict[str, Any]:
    return {
        "name": name,
        "route_prefix": None,
        "import_path": "serving.app:build_model",
        "runtime_env": dict(gateway.runtime_env),
        "args": {
            "artifact_uri": app.artifact_uri,
            "artifact_sha256": app.artifact_sha256,
            "base_uri": app.base_uri,
            "base_sha256": app.base_sha256,
            "device": "cuda" if app.gpus > 0 else "cpu",
            "threads": max(1, int(app.cpus)),
            "chat_template_sha256": app.chat_template_sha256,
        },
        "deployments": [
            {
                "name": "Model",
                "autoscaling_config": {
                    "min_replicas": app.min_replicas,
                    # One that may go to none shows first that it can start.
                    "initial_replicas": max(1, app.min_replicas),
                    "max_replicas": app.max_replicas,
                    "target_ongoing_requests": app.target_ongoing_requests,
                    "upscale_delay_s": app.upscale_s,
                    "downscale_delay_s": app.downscale_s,
                    # What is averaged must not reach further back than what is waited for.
                    "look_back_period_s": (looking := min(30.0, max(2.0, app.downscale_s))),
                    "metrics_interval_s": min(10.0, looking / 2),
                },
                # Twice the target: a replica keeps a batch waiting while scaling catches up.
                "max_ongoing_requests": max(16, math.ceil(2 * app.target_ongoing_requests)),
                "max_queued_requests": 256,
                # A model that cannot be loaded fails for good soon, rather than after Serve's twenty tries.
                "max_constructor_retry_count": 3,
                "ray_actor_options": {"num_cpus": app.cpus, "num_gpus": app.gpus},
                "graceful_shutdown_wait_loop_s": 1.0,
                "graceful_shutdown_timeout_s": 60.0,
                "health_check_period_s": 5.0,
                "health_check_timeout_s": 60.0,
            }
        ],
    }
