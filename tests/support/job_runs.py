"""Jobs in a store as a test sees and sets them, and an agent that claims and reports as a driver would."""

from __future__ import annotations

from sqlmodel import Session

from coordinator.cluster.launcher import submission_id
from coordinator.cluster.ray_cluster import Submission
from coordinator.jobs import report
from coordinator.jobs.tokens import claim_token
from coordinator.store import tables
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2
from tests.support.fake_ray import FakeRay

SECRET = "s" * 40


def secret_of(store: Store) -> str:
    return store.read_now(lambda session: session.get_one(tables.StackFact, "secret").value)


def now_of(store: Store, job: tables.Job) -> tables.Job:
    return store.read_now(lambda session: session.get_one(tables.Job, job.uid))


def run_of(store: Store, job: tables.Job, run: int = 1) -> tables.JobRun:
    return store.read_now(lambda session: session.get_one(tables.JobRun, (job.uid, run)))


def set_columns(store: Store, job: tables.Job, **values: object) -> None:
    def work(session: Session) -> None:
        row = session.get_one(tables.Job, job.uid)
        for name, value in values.items():
            setattr(row, name, value)
        session.add(row)

    store.write_now(work)


class Agent:
    """Claims a run and reports on it, in order, as its driver would."""

    def __init__(self, store: Store, job: tables.Job, run: int = 1) -> None:
        self.store, self.uid, self.run, self.number = store, job.uid, run, 0
        token = claim_token(secret_of(store), job.uid, run)
        request = agent_pb2.ClaimRunRequest(job_uid=job.uid, run=run, claim_token=token, session_secret=SECRET)
        self.job = store.write_now(lambda session: report.claim(session, secret_of(store), request))

    def say(self, **body: object) -> tables.Job:
        self.number += 1
        said = agent_pb2.Report(sequence=self.number, **body)  # type: ignore[arg-type]
        request = agent_pb2.ReportRequest(job_uid=self.uid, run=self.run, source="driver", session_secret=SECRET, reports=[said])
        return self.store.write_now(lambda session: report.apply(session, request))[0]

    def saved(self, step: int) -> tables.Job:
        return self.say(checkpoint=job_pb2.Checkpoint(step=step, uri=f"mem://{self.run}/{step}", manifest_sha256="a" * 64))

    def ends(self, state: str, reason: str = "UNSPECIFIED", code: str = "") -> tables.Job:
        outcome = agent_pb2.OutcomeReport(
            state=job_pb2.JobState.Value(f"JOB_STATE_{state}"), end_reason=job_pb2.EndReason.Value(f"END_REASON_{reason}")
        )
        if code:
            outcome.error.CopyFrom(job_pb2.JobError(code=code, message=code.lower(), source="rank-0"))
        return self.say(outcome=outcome)


def leaves(ray: FakeRay, job: tables.Job, run: int = 1) -> None:
    """The process of a run is gone, as Ray sees it."""
    ray.jobs[submission_id(job.uid, run)] = Submission("SUCCEEDED", "")
