"""A Serve and a gateway that do what they are told, at the pace of the test: for what the deployer makes of endpoints."""

from __future__ import annotations

from typing import Any

from coordinator.cluster.gateway import GatewayReport
from coordinator.cluster.serve_config import GATEWAY_APP
from coordinator.endpoints.reconcile import Deployer
from coordinator.endpoints.rollout import BUCKETS
from coordinator.notify import Notifier
from coordinator.store.database import Store
from coordinator.store.leader import Leadership
from tests.support.fake_ray import FakeRay


class FakeServing:
    """`settle` brings up what was sent last; requests are counted by `serve`, where the gateway leads to."""

    def __init__(self, ray: FakeRay) -> None:
        self.ray = ray
        self.ready: dict[str, int] = {}
        self.broken: dict[str, str] = {}
        self.unfit: dict[str, str] = {}
        self.asleep: set[str] = set()
        self.knows: dict[str, Any] = {}
        self.started = "first"
        self.in_flight: dict[str, int] = {}
        self.counts: dict[str, dict[str, Any]] = {}

    @property
    def config(self) -> dict[str, Any]:
        """What was sent last."""
        return self.ray.configs[-1]

    @property
    def apps(self) -> set[str]:
        """The model applications of what was sent last."""
        return {app["name"] for app in self.config["applications"]} - {GATEWAY_APP}

    def settle(self, gateway: bool = True, models: bool = True) -> None:
        """Start and stop what the config says; `gateway` learns of its snapshot, `models` are started."""
        wanted = {app["name"] for app in self.config["applications"]}
        self.ready = {name: n for name, n in self.ready.items() if name in wanted}
        for app in self.config["applications"]:
            if app["name"] == GATEWAY_APP and gateway:
                self.knows = app["deployments"][0]["user_config"]
                self.ready[GATEWAY_APP] = 1
            elif app["name"] != GATEWAY_APP and models and app["name"] not in self.broken:
                least = app["deployments"][0]["autoscaling_config"]["min_replicas"]
                self.ready[app["name"]] = least
                # One that may go to none is not there at first, and then goes.
                if not least and self.ray.details.get("applications", {}).get(app["name"], {}).get("status") == "RUNNING":
                    self.asleep.add(app["name"])
        self.ray.details = {"applications": {name: self._app(name) for name in wanted}}

    def _app(self, name: str) -> dict[str, Any]:
        replicas = [{"state": "RUNNING"}] * self.ready.get(name, 0)
        up = bool(replicas) or name in self.asleep
        state = "DEPLOY_FAILED" if name in self.broken else "RUNNING" if up else "DEPLOYING"
        return {"status": state, "message": self.broken.get(name, ""), "deployments": {"x": {"replicas": replicas}}}

    def report(self) -> GatewayReport | None:
        """What the gateway says."""
        if not self.knows:
            return None
        pairs = [(each["app"], each["adapter"]["sha256"]) for each in self.knows["candidates"]]
        adapters = {f"{app}/{name}": self.unfit.get(name, "") for app, name in pairs if self.ready.get(app)}
        return GatewayReport(self.knows["version"], adapters, self.started, self.in_flight, self.counts)

    def routes(self, endpoint: str = "desk") -> dict[str, int]:
        """Weights by model version, as the gateway knows them."""
        (entry,) = [each for each in self.knows["endpoints"] if each["endpoint"] == endpoint]
        return {route["model_version"]: route["weight"] for route in entry["routes"]}

    def serve(
        self, version: str, requests: int, errors: int = 0, seconds: float = 0.2, feedback: tuple[int, float] = (0, 0)
    ) -> None:
        """Count answers of a route."""
        counts = self.counts.setdefault(
            f"default/desk/{version}",
            {"requests": 0, "errors": 0, "buckets": [0] * (len(BUCKETS) + 1), "feedback": 0, "feedback_sum": 0.0},
        )
        counts["requests"] += requests
        counts["errors"] += errors
        counts["buckets"][next((n for n, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))] += requests
        counts["feedback"] += feedback[0]
        counts["feedback_sum"] += feedback[0] * feedback[1]

    def restart_gateway(self) -> None:
        """A gateway begins anew: it counts from nothing."""
        self.started, self.counts = self.started + "+", {}


def deployer_of(store: Store, serving: FakeServing, leadership: Leadership) -> Deployer:
    """A deployer as a coordinator that was just started has it."""
    return Deployer(
        store,
        serving.ray,
        Notifier(),
        leadership,
        "127.0.0.1",
        8000,
        "secret",
        report=serving.report,  # type: ignore[arg-type]
    )
