"""AgentService: what the processes of a run report."""

from __future__ import annotations

from google.protobuf.json_format import ParseDict
from sqlmodel import Session

from common.errors import LuthierError
from coordinator import messages
from coordinator.jobs import report
from coordinator.jobs import secrets as job_secrets
from coordinator.jobs.ending import checkpoints
from coordinator.jobs.states import TERMINAL, EndReason, State
from coordinator.notify import Notifier
from coordinator.services.principal import Context
from coordinator.store import tables
from coordinator.store.database import Store
from coordinator.vault import Vault
from luthier.agent.v1 import agent_pb2, agent_pb2_grpc
from luthier.v1 import job_pb2

REPORT_INTERVAL = 0.5
"""Seconds between the reports of a process."""

RESUME_CHOICES = 3
"""Checkpoints that a run is offered to go on from, should the furthest be damaged."""


class AgentService(agent_pb2_grpc.AgentServiceServicer):
    """Takes claims and reports."""

    def __init__(
        self, store: Store, notifier: Notifier, stack_secret: str, storage_uri: str, vault: Vault, restored: str = ""
    ) -> None:
        """`restored` is what the store's latest restore is known by: runs that were begun after its backup are in none of the
        records, and have folders of the same numbers.
        """
        self._store = store
        self._notifier = notifier
        self._secret = stack_secret
        self._storage = storage_uri
        self._suffix = f"-{restored}" if restored else ""
        self._vault = vault

    async def ClaimRun(self, request: agent_pb2.ClaimRunRequest, context: Context) -> agent_pb2.ClaimRunResponse:
        """See agent.proto."""

        def claim(session: Session) -> tuple[tables.Job, dict[str, str] | LuthierError]:
            row = report.claim(session, self._secret, request)
            return row, job_secrets.hand_over(session, self._vault, row)

        row, secrets = await self._store.write(claim)
        self._notifier.notify(request.job_uid)
        if isinstance(secrets, LuthierError):
            # The run has ended by that, so that its agent has nothing to do.
            self._notifier.notify("scheduler")
            raise secrets
        response = agent_pb2.ClaimRunResponse(
            job=messages.job(row),
            run_uri=f"{self._storage}/jobs/{row.uid}/run-{row.run}{self._suffix}",
            storage_uri=self._storage,
            report_interval=REPORT_INTERVAL,
            labels=row.inputs.get("labels", []),
            trace_parent=row.trace_parent,
            secrets=secrets,
        )
        points = await self._store.read(lambda session: checkpoints(session, row, RESUME_CHOICES))
        response.resume_from.extend(messages.checkpoint(row, point) for point in points)
        if row.kind == "finetune":
            job_run = await self._store.read(lambda session: session.get_one(tables.JobRun, (row.uid, row.run)))
            response.job.finetune.workers = job_run.workers or response.job.finetune.workers
        for role, artifact in row.inputs.get("artifacts", {}).items():
            ParseDict(artifact, response.inputs[role])
        return response

    async def Report(self, request: agent_pb2.ReportRequest, context: Context) -> agent_pb2.ReportResponse:
        """See agent.proto."""
        row, last = await self._store.write(lambda session: report.apply(session, request))
        if request.reports:
            self._notifier.notify(row.uid)
            if State(row.state) in TERMINAL:
                self._notifier.notify("scheduler")
        response = agent_pb2.ReportResponse(acknowledged=last)
        response.wish, response.wish_reason = wish_of(row)
        return response


def wish_of(job: tables.Job) -> tuple[agent_pb2.Wish.ValueType, job_pb2.EndReason.ValueType]:
    """What an agent should do, and why; the strongest of what is wished."""
    for wish, moment, reason in (
        (agent_pb2.WISH_CANCEL, job.cancel_time, job.cancel_reason),
        (agent_pb2.WISH_PAUSE, job.pause_time, job.pause_reason),
        (agent_pb2.WISH_FINISH, job.finish_time, job.finish_reason),
    ):
        if moment is not None:
            return wish, EndReason(reason).proto
    return agent_pb2.WISH_UNSPECIFIED, job_pb2.END_REASON_UNSPECIFIED
