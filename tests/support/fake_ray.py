"""A cluster that does what a test says, with the same calls as `RayCluster`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.errors import Unavailable
from coordinator.cluster.ray_cluster import Capacity, Submission
from coordinator.scheduling.model import Demand, Node


class FakeRay:
    """Remembers submissions; a test sets their status and what fails."""

    address = "http://fake"

    def __init__(self, cpus: float = 4.0) -> None:
        self.cpus = cpus
        self.jobs: dict[str, Submission] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.labels: dict[str, str] = {}
        self.selectors: dict[str, dict[str, str]] = {}
        self.gcs_address = ""
        self.requested: list[list[tuple[dict[str, float], dict[str, str]]]] = []
        self.refused: list[str] = []
        self.stopped: list[str] = []
        self.down = False
        self.logs = ["line one", "last line"]
        self.configs: list[dict[str, Any]] = []
        self.details: dict[str, Any] = {"applications": {}}

    def _answer(self) -> None:
        if self.down:
            raise Unavailable("the Ray cluster does not answer")

    def capacity(self) -> Capacity:
        self._answer()
        return Capacity((Node("only", Demand(self.cpus, 0.0), self.labels),))

    def submit(self, submission_id: str, entrypoint: str, env: dict[str, str], selector: Mapping[str, str]) -> bool:
        self._answer()
        if submission_id in self.jobs:
            self.refused.append(submission_id)
            return False
        self.jobs[submission_id] = Submission("RUNNING", "")
        self.environments[submission_id] = env
        self.selectors[submission_id] = dict(selector)
        return True

    def submissions(self) -> dict[str, Submission]:
        self._answer()
        return dict(self.jobs)

    def stop(self, submission_id: str) -> None:
        self._answer()
        self.stopped.append(submission_id)
        self.jobs[submission_id] = Submission("STOPPED", "")

    def log_tail(self, submission_id: str, lines: int = 30) -> list[str]:
        self._answer()
        return self.logs[-lines:]

    def request_resources(self, bundles: list[tuple[dict[str, float], dict[str, str]]]) -> None:
        self._answer()
        self.requested.append(bundles)

    def deploy(self, config: dict[str, Any]) -> None:
        self._answer()
        self.configs.append(config)

    def serve_details(self) -> dict[str, Any]:
        self._answer()
        return self.details
