"""What a desired state comes to: each route with the application that answers it, and the adapter that it answers with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator import messages
from coordinator.cluster.gateway import GatewayReport
from coordinator.cluster.serve_config import AdapterEntry, AppStatus, ModelApp, RouteEntry
from luthier.v1 import endpoint_pb2

Document = Mapping[str, Any]
"""A desired state as it is kept: `endpoint`, the message, and `artifacts`, what its model versions stand for."""


@dataclass(frozen=True)
class Part:
    """A route on its application. Adapters of one base share its replicas, where resources and scaling are the same."""

    route: endpoint_pb2.Route
    app: ModelApp
    adapter: AdapterEntry | None

    def entry(self, weight: int | None = None) -> RouteEntry:
        """As the gateway is told, with another weight than its own if one is given."""
        route = self.route
        chosen = route.weight if weight is None else weight
        return RouteEntry(self.app.name, chosen, route.model_version, self.adapter, route.shadow, dict(route.headers))


@dataclass(frozen=True)
class View:
    """What Serve and the gateway said in this round; no report where the gateway does not answer."""

    status: Mapping[str, AppStatus]
    report: GatewayReport | None = None

    def ready(self, part: Part) -> bool:
        """Whether a route could answer, by a replica that it has or, where it may sleep, by one that the request starts."""
        app = self.status.get(part.app.name)
        if app is None or not (app.ready or self.asleep(part)):
            return False
        return part.adapter is None or self._said(part) == ""

    def asleep(self, part: Part) -> bool:
        """Whether a route's application runs without any replica, as it may when nobody asks: the next request starts one.

        Serve says RUNNING once the first replica was there, so that it has shown that it can start.
        """
        app = self.status.get(part.app.name)
        return part.app.min_replicas == 0 and app is not None and app.state == "RUNNING" and app.ready_replicas == 0

    def unknown(self, part: Part) -> bool:
        """Whether the application of a route is ready, but nobody has said whether its adapter applies."""
        app = self.status.get(part.app.name)
        return app is not None and app.ready and part.adapter is not None and self._said(part) is None

    def failed(self, part: Part) -> str:
        """Why a route cannot answer for good; empty where it can or may."""
        app = self.status.get(part.app.name)
        if app is not None and app.failed:
            return app.message.strip()[-2000:] or "Serve could not start it"
        return self._said(part) or ""

    def replicas(self, part: Part) -> int:
        """How many replicas answer for a route."""
        app = self.status.get(part.app.name)
        return app.ready_replicas if app is not None and self.ready(part) else 0

    def _said(self, part: Part) -> str | None:
        if part.adapter is None or self.report is None:
            return None
        return self.report.adapters.get(f"{part.app.name}/{part.adapter.name}")


def parts_of(document: Document) -> list[Part]:
    """The routes of a desired state; none of an empty one."""
    if not document:
        return []
    desired = messages.parse(document["endpoint"], endpoint_pb2.Endpoint())
    return [_part(desired, route, document["artifacts"][route.model_version]) for route in desired.routes]


def _part(desired: endpoint_pb2.Endpoint, route: endpoint_pb2.Route, artifact: Mapping[str, Any]) -> Part:
    base = artifact.get("base", {})
    template = artifact.get("chat_template_sha256", "")
    app = ModelApp(
        artifact_uri=base.get("uri") or artifact["uri"],
        artifact_sha256=base.get("content_hash", "") if base.get("uri") else artifact["content_hash"],
        # Of an adapter, the template is compared when it is tried.
        chat_template_sha256="" if base.get("uri") else template,
        cpus=desired.resources.cpus,
        gpus=desired.resources.gpus,
        min_replicas=0 if desired.autoscaling.scale_to_zero else desired.autoscaling.min_replicas,
        max_replicas=desired.autoscaling.max_replicas,
        target_ongoing_requests=desired.autoscaling.target_ongoing_requests,
        upscale_s=desired.autoscaling.upscale_seconds if desired.autoscaling.HasField("upscale_seconds") else 10.0,
        downscale_s=desired.autoscaling.downscale_seconds if desired.autoscaling.HasField("downscale_seconds") else 300.0,
    )
    adapter = AdapterEntry(artifact["uri"], artifact["content_hash"], template) if base.get("uri") else None
    return Part(route, app, adapter)


def apps_of(*documents: Document) -> list[ModelApp]:
    """The applications of some desired states."""
    return [part.app for document in documents for part in parts_of(document)]


def candidates(parts: Iterable[Part]) -> list[tuple[str, AdapterEntry]]:
    """The adapters that are to be tried on their applications."""
    return [(part.app.name, part.adapter) for part in parts if part.adapter is not None]


def versions(parts: Sequence[Part]) -> set[str]:
    """The model versions of some routes."""
    return {part.route.model_version for part in parts}
