"""The report link: how the processes of a run tell the coordinator what happens, and hear what it wants.

Every process has a link of its own, named by its source. Reports wait in memory, are numbered when they are sent, and stay
until they are acknowledged. While the coordinator is away work goes on and the link keeps what it can within bounds.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from agents import concealed
from agents.channel import open_channel
from agents.spool import Spool
from agents.trail import Trail
from common.errors import FailedPrecondition
from common.tracing import HEADER
from luthier.agent.v1 import agent_pb2, agent_pb2_grpc
from luthier.v1 import job_pb2, sweep_pb2, training_pb2

STALE_EXIT_STATUS = 75
CALL_TIMEOUT = 20.0
FIRST_BACKOFF, LAST_BACKOFF = 0.2, 5.0
_STALE = (
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.NOT_FOUND,
)

CHATTER = frozenset({"progress", "metrics", "log", "standing"})

OUR_LOGGERS = ("agents", "common", "serving", "luthier", "__main__")
# Never forwarded to the coordinator: the link must not report on its own failures to report.
logger = logging.getLogger("luthier.link")


@dataclass(frozen=True)
class LinkConfig:
    """What a process needs to open a link. It pickles, so it travels to the ranks of a run."""

    address: str
    job_uid: str
    run: int
    session_secret: str
    interval: float = 1.0
    # W3C traceparent that what the process does belongs to; empty where nobody traces.
    trace_parent: str = ""

    def __repr__(self) -> str:
        return f"LinkConfig({self.address}, {self.job_uid}, run {self.run})"


def claim(
    address: str, job_uid: str, run: int, claim_token: str, *, patience: float = 600.0
) -> tuple[Link, agent_pb2.ClaimRunResponse]:
    """Claim a run and open the driver's link. Retries while the coordinator is away, for at most `patience` seconds.

    Raises FailedPrecondition where the run is not this process's to do: its token was used, or a newer run exists.
    """
    secret = secrets.token_urlsafe(32)
    request = agent_pb2.ClaimRunRequest(job_uid=job_uid, run=run, claim_token=claim_token, session_secret=secret)
    deadline, backoff = time.monotonic() + patience, FIRST_BACKOFF
    with open_channel(address) as channel:
        stub = agent_pb2_grpc.AgentServiceStub(channel)
        while True:
            try:
                response = stub.ClaimRun(request, timeout=CALL_TIMEOUT)
                break
            except grpc.RpcError as error:
                code, details = error.code(), error.details()
                if code in _STALE or code is grpc.StatusCode.INVALID_ARGUMENT or time.monotonic() > deadline:
                    raise FailedPrecondition(
                        f"run {run} of job {job_uid} could not be claimed at {address}: {code.name}: {details}", "CLAIM_REFUSED"
                    ) from error
            backoff = _sleep(backoff)
    config = LinkConfig(address, job_uid, run, secret, response.report_interval or 1.0, response.trace_parent)
    return Link(config, "driver"), response


def exit_as_zombie() -> None:
    """End this process at once: a newer run has taken over, and nothing that this one does counts."""
    sys.stderr.write("luthier: this run is no longer the job's current one; leaving\n")
    sys.stderr.flush()
    os._exit(STALE_EXIT_STATUS)


class Link:
    """One source's reports to the coordinator, sent by a background thread in batches.

    `wish` is what the coordinator wants of the run and `wish_reason` why; `wished` is set once it wants the run to end. A run may
    be told to pause, to finish early, and to end after all: the strongest counts. Where the coordinator refuses the run as stale,
    nothing more is sent and `on_stale` is called from the link's thread. Where there is nothing to report, the link calls every
    `heartbeat` seconds all the same. Its `trail`, where it has one, hears of the phases.
    """

    def __init__(
        self, config: LinkConfig, source: str = "driver", *, on_stale: Callable[[], None] = exit_as_zombie, heartbeat: float = 1.0
    ) -> None:
        self.config = config
        self.source = source
        self.trail: Trail | None = None
        self.wished = threading.Event()
        self.wish: agent_pb2.Wish.ValueType = agent_pb2.WISH_UNSPECIFIED
        self.wish_reason: job_pb2.EndReason.ValueType = job_pb2.END_REASON_UNSPECIFIED
        self.stale = threading.Event()
        self._on_stale = on_stale
        self._heartbeat = heartbeat
        self._last_call = 0.0
        self._ended = False
        self._spool = Spool(config.run, source)
        self._state = threading.Condition()
        self._in_flight: deque[agent_pb2.Report] = deque()
        self._next_sequence = 1
        self._synchronised = False
        self._urgent = False
        self._closing = False
        self._gone = False
        self._refused: grpc.StatusCode | None = None
        self._channel = open_channel(config.address)
        self._stub = agent_pb2_grpc.AgentServiceStub(self._channel)
        self._thread = threading.Thread(target=self._run, name=f"luthier-link-{source}", daemon=True)
        self._thread.start()

    # What happened

    def phase(self, phase: str, message: str = "") -> None:
        """A new phase begins: a word (`training`), and a line for people."""
        if self.trail is not None:
            self.trail.phase(phase)
        self._put(agent_pb2.Report(phase=agent_pb2.PhaseReport(phase=phase, message=message)), urgent=True)

    def progress(self, progress: job_pb2.Progress) -> None:
        """How far the run is. Only the latest word is kept until the next batch."""
        self._put(agent_pb2.Report(progress=progress))

    def metrics(self, step: int, values: Mapping[str, float], trial: str = "") -> None:
        """Figures of one step, for the job's time series."""
        point = job_pb2.MetricPoint(run=self.config.run, step=step, values=dict(values), trial=trial)
        point.time.CopyFrom(_now())
        self._put(agent_pb2.Report(metrics=point))

    def log(self, level: str, message: str, when: float | None = None) -> None:
        """One line of log: level is debug, info, warning or error."""
        self._put_log(level, message, when)

    def checkpoint(self, checkpoint: job_pb2.Checkpoint) -> None:
        """A checkpoint lies in storage, whole."""
        self._put(agent_pb2.Report(checkpoint=checkpoint), urgent=True)

    def engine(self, report: training_pb2.EngineReport) -> None:
        """What really runs."""
        self._put(agent_pb2.Report(engine=report), urgent=True)

    def partial(self, result: job_pb2.JobResult) -> None:
        """A part of the result that is known before the end; a later run need not find it again."""
        self._put(agent_pb2.Report(partial=result), urgent=True)

    def trial(self, trial: sweep_pb2.Trial) -> None:
        """A trial of a sweep changed. Only the latest word on each trial is kept until the next batch."""
        self._put(agent_pb2.Report(trial=trial), urgent=True)

    def failure(self, error: job_pb2.JobError) -> None:
        """This process raised. Evidence for the root cause, not an end of the run."""
        self._put(agent_pb2.Report(failure=error), urgent=True)

    def standing(self, standing: agent_pb2.StandingReport) -> None:
        """Where this process has stood for long; an empty report where it moves again. Only the latest is kept."""
        self._put(agent_pb2.Report(standing=standing), urgent=True)

    def outcome(self, outcome: agent_pb2.OutcomeReport) -> None:
        """End the run, and return once the coordinator has acknowledged it, however long it is away.

        Raises FailedPrecondition where the coordinator refuses the outcome: the run is stale, or the report is invalid.
        """
        self._put(agent_pb2.Report(outcome=outcome), urgent=True)
        with self._state:
            self._state.wait_for(lambda: self._gone or self._refused is not None)
            if self._refused is not None:
                raise FailedPrecondition(f"the coordinator refused the outcome as {self._refused.name}", "REPORT_REFUSED")
            if not self._ended:
                raise FailedPrecondition("the coordinator no longer takes reports of this run", "STALE_RUN")

    # What is wanted

    def stop_locally(self, reason: job_pb2.EndReason.ValueType = job_pb2.END_REASON_USER) -> None:
        """Wish for a stop from within, as a signal does."""
        if not self.wished.is_set():
            self.wish, self.wish_reason = agent_pb2.WISH_CANCEL, reason
            self.wished.set()

    # Life

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until everything so far is acknowledged. False if it was not within `timeout` or the run is stale."""
        with self._state:
            self._urgent = True
            self._state.notify_all()
            self._state.wait_for(lambda: self._gone or not (self._in_flight or self._spool), timeout)
            return not (self._in_flight or self._spool)

    def close(self, timeout: float = 5.0) -> None:
        """Deliver what can be delivered within `timeout` seconds, and stop."""
        with self._state:
            reachable = not self._gone
        if reachable:
            self.flush(timeout)
        with self._state:
            self._closing = True
            self._state.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=2.0)
        self._channel.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The link's own thread

    def _put(self, report: agent_pb2.Report, urgent: bool = False) -> None:
        report.time.CopyFrom(_now())
        concealed.blot_message(report)
        with self._state:
            if self._gone:
                return
            self._spool.add(report)
            if urgent:
                self._urgent = True
                self._state.notify_all()

    def _put_log(self, level: str, message: str, when: float | None) -> None:
        message = concealed.blot(message)
        with self._state:
            if not self._gone:
                self._spool.add_log(level, message, time.time() if when is None else when)

    def _run(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            with self._state:
                waiting = self._in_flight or (self._urgent and self._spool)
                if self._synchronised and not waiting and not self._closing:
                    self._state.wait_for(lambda: self._closing or self._urgent, self.config.interval)
                self._urgent = False
                if self._closing or self._gone:
                    self._gone = True
                    self._state.notify_all()
                    return
                reports = self._next_batch() if self._synchronised else []
            now = time.monotonic()
            if not reports and self._synchronised and now - self._last_call < self._heartbeat:
                continue
            self._last_call = now
            try:
                response = self._send(reports)
            except grpc.RpcError as error:
                if not self._recover(error.code(), error.details() or "", reports):
                    return
                backoff = _sleep(backoff, self._closing_event)
                continue
            except ValueError:  # the channel was closed under a call
                return
            backoff = FIRST_BACKOFF
            self._acknowledge(response)

    def _closing_event(self) -> bool:
        with self._state:
            return self._closing

    def _next_batch(self) -> list[agent_pb2.Report]:
        if not self._in_flight:
            for report in self._spool.take():
                report.sequence = self._next_sequence
                self._next_sequence += 1
                self._in_flight.append(report)
        return list(self._in_flight)

    def _send(self, reports: list[agent_pb2.Report]) -> agent_pb2.ReportResponse:
        request = agent_pb2.ReportRequest(
            job_uid=self.config.job_uid,
            run=self.config.run,
            source=self.source,
            session_secret=self.config.session_secret,
            reports=reports,
        )
        return self._stub.Report(request, timeout=CALL_TIMEOUT, metadata=self._trace(reports))

    def _trace(self, reports: Sequence[agent_pb2.Report]) -> tuple[tuple[str, str], ...]:
        """Has the coordinator count a call to the run's trace, unless all it holds is what a run says all the time."""
        if self.trail is None or not self.trail.traceparent or all(report.WhichOneof("body") in CHATTER for report in reports):
            return ()
        return ((HEADER, self.trail.traceparent),)

    def _acknowledge(self, response: agent_pb2.ReportResponse) -> None:
        with self._state:
            if not self._synchronised:
                # A process that took over this source goes on after the numbers of the one before it.
                self._synchronised = True
                self._next_sequence = response.acknowledged + 1
            while self._in_flight and self._in_flight[0].sequence <= response.acknowledged:
                # Nothing follows an outcome: a coordinator that has ended the run would refuse it as stale.
                if self._in_flight.popleft().HasField("outcome"):
                    self._ended = self._gone = True
            self._urgent = self._urgent or self._spool.more
            self._state.notify_all()
        if self.wished.is_set() or response.wish == agent_pb2.WISH_UNSPECIFIED:
            return
        # The reason first: whoever sees the wish may ask for it.
        self.wish_reason = response.wish_reason or job_pb2.END_REASON_USER
        self.wish = response.wish
        if response.wish == agent_pb2.WISH_CANCEL:
            self.wished.set()

    def _recover(self, code: grpc.StatusCode, details: str, reports: list[agent_pb2.Report]) -> bool:
        """Decide after a failed call whether to go on."""
        if code in _STALE:
            logger.error("the coordinator refuses run %d: %s: %s", self.config.run, code.name, details)
            with self._state:
                self._gone = True
                self._state.notify_all()
            self.stale.set()
            self._on_stale()
            return False
        if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE) and reports:
            self._drop_refused(code, details)
        return True

    def _drop_refused(self, code: grpc.StatusCode, details: str) -> None:
        """One bad report must not hold up the ones behind it: send them one by one, and drop the one that is refused."""
        with self._state:
            first = self._in_flight.popleft()
            rest = list(self._in_flight)
            self._in_flight.clear()
            self._next_sequence = first.sequence
            if rest:
                self._spool.put_back([first, *rest], singly=True)
                return
            logger.error("the coordinator refused a report (%s): %s: %s", first.WhichOneof("body"), code.name, details)
            self._refused = code if first.HasField("outcome") else self._refused
            self._state.notify_all()


class LinkHandler(logging.Handler):
    """Forwards Python logging to the coordinator as log lines; of other people's libraries only warnings and errors."""

    def __init__(self, link: Link, level: int = logging.INFO) -> None:
        super().__init__(level)
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        """Queue one record; never raises and never blocks on the network."""
        if record.name.startswith((logger.name, "grpc")) or (record.levelno < logging.WARNING and not _is_ours(record.name)):
            return
        try:
            self._link.log(_level_name(record.levelno), self.format(record), record.created)
        except Exception:
            self.handleError(record)


def install_logging(link: Link, level: int = logging.INFO) -> None:
    """Send this process's log to stdout and to the coordinator."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, LinkHandler)]:
        root.removeHandler(handler)
    forward = LinkHandler(link, level)
    forward.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    root.addHandler(forward)
    if not any(type(handler) is logging.StreamHandler for handler in root.handlers):
        plain = logging.StreamHandler(sys.stdout)
        plain.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(plain)
    root.setLevel(min(level, root.level or level))
    for noisy in ("httpx", "httpcore", "urllib3", "fsspec", "filelock", "DeepSpeed", "datasets", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in OUR_LOGGERS


def _level_name(number: int) -> str:
    if number >= logging.ERROR:
        return "error"
    if number >= logging.WARNING:
        return "warning"
    return "info" if number >= logging.INFO else "debug"


def _sleep(backoff: float, stop: Callable[[], bool] | None = None) -> float:
    """Sleep for about `backoff` seconds, less where `stop` says so, and return the next backoff."""
    until = time.monotonic() + backoff * random.uniform(0.75, 1.25)
    while (left := until - time.monotonic()) > 0 and not (stop and stop()):
        time.sleep(min(left, 0.2))
    return min(backoff * 2, LAST_BACKOFF)


def _now() -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(time.time_ns())
    return stamp
