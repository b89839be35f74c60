"""Jobs that between them take every transition of the table, and how each has to end whatever happens to the coordinator."""

from __future__ import annotations

from dataclasses import dataclass, replace

from google.protobuf.duration_pb2 import Duration

from luthier.v1 import job_pb2, training_pb2

STARTING, RUNNING, PAUSING, PAUSED = (f"JOB_STATE_{state}" for state in ("STARTING", "RUNNING", "PAUSING", "PAUSED"))
WAITING = "told why it waits"
"""No state, but an event that its watcher has seen."""

SUCCEEDED, FAILED, CANCELLED = (f"JOB_STATE_{state}" for state in ("SUCCEEDED", "FAILED", "CANCELLED"))
ENDS = (SUCCEEDED, FAILED, CANCELLED)

CPUS = 16
"""Logical CPUs of the cluster; a plan holds 1.25 of them, or nearly all."""


@dataclass(frozen=True)
class Plan:
    """One job. `steps` are states to wait for and what to call then; `acts` what its runs do, the last one for all further runs.

    The words `tell` and `go` in the steps write the files that its agent waits for; without `tell` among them the agent is told
    at once.
    """

    name: str
    acts: tuple[str, ...] = ("succeed",)
    steps: tuple[tuple[str, str], ...] = ()
    ends: str = SUCCEEDED
    reason: str = "COMPLETED"
    runs: int = 1
    attempt: int = 0
    retries: int = 2
    workers: int = 1
    priority: int = 0
    lingers: float = 0.2
    follower: Plan | None = None

    @property
    def deleted(self) -> bool:
        """Whether it is deleted in the end."""
        return any(call == "delete" for _, call in self.steps)

    def job(self) -> job_pb2.Job:
        """The job as it is submitted."""
        spec = training_pb2.FinetuneSpec(base="builtin:tiny", dataset="rows", method="full", workers=self.workers)
        job = job_pb2.Job(finetune=spec, priority=self.priority, display_name=self.name, time_limit=Duration(seconds=3600))
        job.retry.max_retries = self.retries
        return job


FOLLOWS = Plan("follows")
NEVER_FOLLOWS = Plan("follows what fails", ends=CANCELLED, reason="DEPENDENCY", runs=0)

PLANS = (
    # The slow ones first.
    Plan("deaf to its cancellation", ("be deaf",), ((RUNNING, "cancel"),), CANCELLED, "USER"),
    Plan("loses a worker and is slow to leave", ("lose a worker", "succeed"), runs=2, attempt=1, lingers=7.0),
    Plan("dies once", ("die", "succeed"), runs=2, attempt=1),
    Plan("dies unclaimed once", ("die unclaimed", "succeed"), runs=2, attempt=1),
    Plan("cancelled in the queue", steps=((WAITING, "cancel"),), ends=CANCELLED, reason="USER", runs=0, workers=15, priority=-50),
    Plan("succeeds", follower=FOLLOWS),
    Plan("succeeds and is deleted", steps=((SUCCEEDED, "delete"), ("", "delete data"), ("", "delete model"))),
    Plan("fails", ("fail",), ends=FAILED, reason="BAD_DATA", follower=NEVER_FOLLOWS),
    Plan("paused and resumed", ("pause", "succeed"), ((RUNNING, "pause"), (PAUSED, "update"), (PAUSED, "resume")), runs=2),
    Plan(
        "resumed before it has paused",
        ("pause when let", "succeed"),
        ((RUNNING, "pause"), (PAUSING, "resume"), ("", "go")),
        runs=2,
        lingers=2.5,
    ),
    Plan("paused for good", ("pause",), ((RUNNING, "pause"),), PAUSED, "UNSPECIFIED"),
    Plan("cancelled while paused", ("pause",), ((RUNNING, "pause"), (PAUSED, "cancel")), CANCELLED, "USER"),
    Plan("cancelled while it pauses", ("pause when let",), ((RUNNING, "pause"), (PAUSING, "cancel")), CANCELLED, "USER"),
    Plan("succeeds instead of pausing", ("succeed at a pause",), ((RUNNING, "pause"),)),
    Plan("fails instead of pausing", ("fail at a pause",), ((RUNNING, "pause"),), FAILED, "BAD_DATA"),
    Plan(
        "dies where it should pause",
        ("die unclaimed", "succeed"),
        ((STARTING, "pause"), ("", "tell"), (PAUSED, "resume")),
        runs=2,
    ),
    Plan("cancelled in its work", ("go on until cancelled",), ((RUNNING, "cancel"),), CANCELLED, "USER"),
    Plan("cancelled before its claim", steps=((STARTING, "cancel"), (CANCELLED, "tell")), ends=CANCELLED, reason="USER"),
    Plan("dies unclaimed for good", ("die unclaimed",), ends=FAILED, reason="AGENT_LOST", retries=0),
    Plan("dies for good", ("die",), ends=FAILED, reason="AGENT_LOST", retries=0),
)


def numbered(plan: Plan, number: int) -> Plan:
    """The same plan for a further job."""
    follower = numbered(plan.follower, number) if plan.follower is not None else None
    return replace(plan, name=f"{plan.name} #{number}", follower=follower)
