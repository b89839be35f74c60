"""How the run of a job becomes a Ray job."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from common.placement import selector_of
from coordinator import messages
from coordinator.cluster.ray_cluster import RayCluster
from coordinator.jobs.tokens import claim_token
from coordinator.store.tables import Job
from luthier.v1 import job_pb2


def submission_id(uid: str, run: int) -> str:
    """Ray's id of a run. Made of job and run, so that Ray itself refuses to start a run twice."""
    return f"luthier-{uid}-r{run}"


def run_of_submission(name: str) -> tuple[str, int]:
    """Job and run of such an id; empty and 0 for one that is not of this form."""
    uid, _, run = name.removeprefix("luthier-").rpartition("-r")
    return (uid, int(run)) if name.startswith("luthier-") and run.isdecimal() else ("", 0)


class Launcher:
    """Submits runs. The entrypoint holds nothing that a user wrote; what the agent needs travels over gRPC after its claim."""

    def __init__(
        self,
        cluster: RayCluster,
        coordinator_address: str,
        agent_python: str,
        stack_secret: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment` is what else agents find in theirs: paths of files and addresses, nothing secret."""
        self.cluster = cluster
        self._environment = dict(environment or {})
        self._address = coordinator_address
        self._entrypoint = f"{shlex.quote(agent_python)} -m agents"
        self._secret = stack_secret

    def launch(self, job: Job) -> bool:
        """Submit the job's present run; False where Ray has it already. Blocks; raises Unavailable."""
        environment = {
            "LUTHIER_COORDINATOR": self._address,
            "LUTHIER_JOB_UID": job.uid,
            "LUTHIER_RUN": str(job.run),
            "LUTHIER_CLAIM_TOKEN": claim_token(self._secret, job.uid, job.run),
            "RAY_JOB_STOP_SIGNAL": "SIGINT",
            "RAY_JOB_STOP_WAIT_TIME_S": "30",
            **self._environment,
        }
        selector = selector_of(messages.parse(job.placement, job_pb2.Placement()))
        return self.cluster.submit(submission_id(job.uid, job.run), self._entrypoint, environment, selector)
