"""A coordinator's AgentService in this process, over real gRPC: keeps what is reported, and can go away and come back."""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent import futures
from typing import Any

import grpc

from luthier.agent.v1 import agent_pb2, agent_pb2_grpc
from luthier.v1 import job_pb2

TOKEN = "claim-token"


class FakeCoordinator(agent_pb2_grpc.AgentServiceServicer):
    """Takes one run of one job, with the coordinator's own rules for numbers, claims and stale runs.

    `reports` holds, by source, what was applied; `calls` every request as it came. State outlives `stop` and `start`, which keeps
    the port.
    """

    def __init__(self, claim: agent_pb2.ClaimRunResponse | None = None, job_uid: str = "job-1", run: int = 1) -> None:
        self.job_uid = job_uid
        self.run = run
        self.claim = claim or agent_pb2.ClaimRunResponse(report_interval=0.05)
        self.secret = ""
        self.reports: dict[str, list[agent_pb2.Report]] = defaultdict(list)
        self.calls: list[agent_pb2.ReportRequest] = []
        # The traceparent that each call came with; empty where it had none.
        self.traces: list[str] = []
        self.wish = agent_pb2.WISH_UNSPECIFIED
        self.wish_reason = job_pb2.END_REASON_UNSPECIFIED
        self.stale = False
        # Answers that get lost: the reports are applied, and the caller sees UNAVAILABLE.
        self.lose_answers = 0
        self.refuse_message = ""
        self.address = ""
        self._changed = threading.Condition()
        self._server: Any = None

    def start(self) -> FakeCoordinator:
        """Listen, on the same port as before if there was one."""
        self._server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        agent_pb2_grpc.add_AgentServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = self.address or f"127.0.0.1:{port}"
        self._server.start()
        return self

    def stop(self) -> None:
        """Go away, as a killed process does."""
        if self._server is not None:
            self._server.stop(0).wait()
            self._server = None

    def __enter__(self) -> FakeCoordinator:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_for(self, source: str, body: str, timeout: float = 10.0) -> agent_pb2.Report:
        """Wait for a report of a kind from a source and return the first."""

        def found() -> agent_pb2.Report | None:
            return next((report for report in self.reports[source] if report.WhichOneof("body") == body), None)

        with self._changed:
            report = self._changed.wait_for(found, timeout)
        assert report is not None, f"no {body} from {source}; there are { {k: len(v) for k, v in self.reports.items()} }"
        return report

    def of(self, source: str, body: str) -> list[Any]:
        """The bodies of one kind that a source reported, in order."""
        with self._changed:
            return [getattr(report, body) for report in self.reports[source] if report.WhichOneof("body") == body]

    @property
    def outcome(self) -> agent_pb2.OutcomeReport | None:
        """The run's outcome, if it has one."""
        return next(iter(self.of("driver", "outcome")), None)

    def ClaimRun(self, request: agent_pb2.ClaimRunRequest, context: Any) -> agent_pb2.ClaimRunResponse:
        """See agent.proto."""
        if request.claim_token != TOKEN or len(request.session_secret) < 32:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "this token does not claim this run")
        if request.run != self.run or self.stale:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this run no longer counts")
        if self.secret and self.secret != request.session_secret:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "this run is claimed already")
        self.secret = request.session_secret
        self._maybe_lose(context)
        return self.claim

    def Report(self, request: agent_pb2.ReportRequest, context: Any) -> agent_pb2.ReportResponse:
        """See agent.proto."""
        with self._changed:
            self.calls.append(request)
            self.traces.append(dict(context.invocation_metadata()).get("traceparent", ""))
            if request.session_secret != self.secret:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, "wrong session secret")
            applied = self.reports[request.source]
            fresh = [report for report in request.reports if report.sequence > len(applied)]
            if request.run != self.run or self.stale or (self.outcome and fresh and request.source == "driver"):
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"run {request.run} no longer counts")
            if fresh and fresh[0].sequence != len(applied) + 1:
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"report {len(applied) + 1} is missing")
            if self.refuse_message and any(self.refuse_message in str(report) for report in fresh):
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "this report is invalid")
            applied.extend(fresh)
            self._changed.notify_all()
            self._maybe_lose(context)
            return agent_pb2.ReportResponse(acknowledged=len(applied), wish=self.wish, wish_reason=self.wish_reason)

    def _maybe_lose(self, context: Any) -> None:
        if self.lose_answers:
            self.lose_answers -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
