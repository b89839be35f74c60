"""AgentService: what the processes of a run report."""

from __future__ import annotations

from google.protobuf.json_format import ParseDict

from coordinator import messages
from coordinator.jobs import report
from coordinator.jobs.states import TERMINAL, EndReason, State
from coordinator.notify import Notifier
from coordinator.services.principal import Context
from coordinator.store.database import Store
from luthier.agent.v1 import agent_pb2, agent_pb2_grpc

REPORT_INTERVAL = 0.5
"""Seconds between the reports of a process."""


class AgentService(agent_pb2_grpc.AgentServiceServicer):
    """Takes claims and reports."""

    def __init__(self, store: Store, notifier: Notifier, stack_secret: str, storage_uri: str) -> None:
        self._store = store
        self._notifier = notifier
        self._secret = stack_secret
        self._storage = storage_uri

    async def ClaimRun(self, request: agent_pb2.ClaimRunRequest, context: Context) -> agent_pb2.ClaimRunResponse:
        """See agent.proto."""
        row = await self._store.write(lambda session: report.claim(session, self._secret, request))
        self._notifier.notify(row.uid)
        response = agent_pb2.ClaimRunResponse(
            job=messages.job(row),
            run_uri=f"{self._storage}/jobs/{row.uid}/run-{row.run}",
            storage_uri=self._storage,
            report_interval=REPORT_INTERVAL,
            labels=row.inputs.get("labels", []),
        )
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
        if row.cancel_time is not None:
            response.wish = agent_pb2.WISH_CANCEL
            response.wish_reason = EndReason(row.cancel_reason).proto
        return response
