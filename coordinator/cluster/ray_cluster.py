"""The Ray cluster as the coordinator sees it: over the dashboard's HTTP only, so that it never joins the cluster itself.

Ray's own client library is used, imported on first use in a worker thread: that takes seconds, and the server answers before.
Every call here blocks and may fail; callers run it off the event loop and outside of transactions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import Unavailable
from coordinator.cluster import tell_autoscaler
from coordinator.jobs.resources import DRIVER_CPUS
from coordinator.scheduling.model import Demand, Node

ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
"""Ray's words for a job that has ended."""

TELL_SECONDS = 15.0
"""How long Ray's GCS may take to be told something."""


@dataclass(frozen=True)
class Capacity:
    """What the cluster has. `memory` is what Ray lets programs have of a node's, in bytes by the node's id, as far as told."""

    nodes: tuple[Node, ...]
    memory: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> Demand:
        """All nodes together."""
        return sum((node.total for node in self.nodes), Demand())


@dataclass(frozen=True)
class Submission:
    """A Ray job as Ray sees it."""

    status: str
    message: str

    @property
    def ended(self) -> bool:
        """Whether its processes are gone."""
        return self.status in ENDED


class RayCluster:
    """One cluster at one dashboard address (`http://host:8265`)."""

    def __init__(self, address: str, token_path: Path | None, gcs_address: str = "") -> None:
        """`gcs_address` is host:port of Ray's GCS, by which its autoscaler is told what is wanted; empty where there is none."""
        self.address = address
        self.gcs_address = gcs_address
        # Ray reads its authentication from the environment only. Said explicitly: since 2.59 it turns itself on where a token
        # file happens to lie in the user's home.
        os.environ["RAY_AUTH_MODE"] = "token" if token_path else "disabled"
        if token_path:
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_path)
        self._lock = threading.Lock()
        self._jobs: Any = None
        self._serve: Any = None

    def _job_client(self) -> Any:
        with self._lock:
            if self._jobs is None:
                from ray.job_submission import JobSubmissionClient

                self._jobs = self._answering(JobSubmissionClient, self.address)
            return self._jobs

    def _serve_client(self) -> Any:
        with self._lock:
            if self._serve is None:
                from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

                self._serve = self._answering(ServeSubmissionClient, self.address)
            return self._serve

    def _answering(self, call: Any, *arguments: Any, **options: Any) -> Any:
        """Call into Ray; whatever goes wrong on the way is Unavailable, in one line."""
        if not self.address:
            raise Unavailable("no Ray cluster is configured; start the stack with `luthier up`", "RAY_UNAVAILABLE")
        try:
            return call(*arguments, **options)
        except Exception as error:
            text = str(error).strip().splitlines()
            reason = text[0][:300] if text else type(error).__name__
            raise Unavailable(f"the Ray cluster at {self.address} does not answer: {reason}", "RAY_UNAVAILABLE") from error

    def capacity(self) -> Capacity:
        """Nodes alive and what they have together."""
        response = self._answering(
            self._job_client()._do_request,
            "GET",
            "/api/v0/nodes?detail=true&limit=10000&timeout=10&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE",
        )
        if response.status_code != 200:
            raise Unavailable(f"Ray's dashboard answers {response.status_code} for its nodes", "RAY_UNAVAILABLE")
        nodes = response.json()["data"]["result"]["result"]
        memory = {str(node["node_id"]): int((node.get("resources_total") or {}).get("memory", 0)) for node in nodes}
        return Capacity(tuple(Node(str(node["node_id"]), _total(node), _labels(node)) for node in nodes), memory)

    def submit(self, submission_id: str, entrypoint: str, env: dict[str, str], selector: Mapping[str, str]) -> bool:
        """Start an agent as a Ray job on a node with certain labels.

        False where that submission exists already, which makes launching twice harmless.
        """
        client = self._job_client()
        try:
            client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env={"env_vars": env},
                entrypoint_num_cpus=DRIVER_CPUS,
                entrypoint_label_selector=dict(selector) or None,
            )
        except Exception as error:
            if "already exists" in str(error):
                return False
            return bool(self._answering(_raise, error))
        return True

    def submissions(self) -> dict[str, Submission]:
        """All Ray jobs that were submitted with an id, by that id."""
        details = self._answering(self._job_client().list_jobs)
        return {
            each.submission_id: Submission(str(getattr(each.status, "value", each.status)), each.message or "")
            for each in details
            if each.submission_id
        }

    def stop(self, submission_id: str) -> None:
        """Ask Ray to end a job: a signal first, SIGKILL after Ray's own grace. Unknown and ended ones are left alone."""
        client = self._job_client()
        try:
            client.stop_job(submission_id)
        except RuntimeError as error:
            if "does not exist" not in str(error):
                self._answering(_raise, error)

    def log_tail(self, submission_id: str, lines: int = 30) -> list[str]:
        """Last lines of what a job's driver printed."""
        text: str = self._answering(self._job_client().get_job_logs, submission_id)
        return text.splitlines()[-lines:]

    def request_resources(self, bundles: Sequence[tuple[Mapping[str, float], Mapping[str, str]]]) -> None:
        """Tell Ray's autoscaler what the cluster should be able to hold: resources of one node each, and labels of that node.

        Takes the place of what was told before. Ray keeps it in its GCS, which forgets it when it is restarted.
        """
        wanted = [{"resources": dict(resources), "label_selector": dict(labels)} for resources, labels in bundles]
        command = [sys.executable, "-m", tell_autoscaler.__name__, self.gcs_address]
        try:
            done = subprocess.run(
                command, input=json.dumps(wanted), capture_output=True, text=True, timeout=TELL_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            why = f"Ray's GCS at {self.gcs_address} does not answer within {TELL_SECONDS:g} s"
            raise Unavailable(why, "RAY_UNAVAILABLE") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
            raise Unavailable(f"Ray's GCS at {self.gcs_address} does not take it: {reason}", "RAY_UNAVAILABLE")

    def deploy(self, config: dict[str, Any]) -> None:
        """Make Serve run exactly what the config says; what it leaves out is taken down."""
        self._answering(self._serve_client().deploy_applications, config)

    def serve_details(self) -> dict[str, Any]:
        """What Serve runs now; empty applications where it was never started."""
        details: dict[str, Any] = self._answering(self._serve_client().get_serve_details)
        return details


def _total(node: dict[str, Any]) -> Demand:
    resources = node.get("resources_total") or {}
    return Demand(float(resources.get("CPU", 0)), float(resources.get("GPU", 0)))


def _labels(node: dict[str, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in (node.get("labels") or {}).items()}


def _raise(error: Exception) -> None:
    raise error
