"""What a link holds until it can be sent: bounded, in order, the less important given up first."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from luthier.agent.v1 import agent_pb2
from luthier.v1 import job_pb2

BATCH_BYTES = 900_000
LINE_LIMIT = 8_000
LOG_BYTES = 2_000_000
MAX_METRICS = 20_000


class Spool:
    """Reports that have not been sent yet. Not thread-safe: the link's lock guards it.

    Progress, trials and standings keep their latest word; the oldest log lines go first, with a line that says how many; figures
    are thinned to every second step. Phases, checkpoints, failures and the outcome are never given up, and nothing follows an
    outcome.
    """

    def __init__(self, run: int, source: str) -> None:
        self._run = run
        self._source = source
        self._queue: deque[agent_pb2.Report] = deque()
        self._progress: agent_pb2.Report | None = None
        self._lines: deque[job_pb2.LogLine] = deque()
        self._line_bytes = 0
        self._dropped = 0
        self._metrics = 0
        self._singly: deque[agent_pb2.Report] = deque()
        self._ended = False
        self.more = False

    def __len__(self) -> int:
        return len(self._singly) + len(self._queue) + len(self._lines) + (self._progress is not None)

    def add(self, report: agent_pb2.Report) -> None:
        """Queue a report that is not a log line."""
        body = report.WhichOneof("body")
        if self._ended:
            return
        if body == "progress":
            self._progress = report
            return
        if body in ("phase", "outcome") and self._progress is not None:
            # Progress of the phase that ends must not arrive after the phase that begins.
            self._queue.append(self._progress)
            self._progress = None
        if body == "trial":
            self._queue = deque(held for held in self._queue if not (held.HasField("trial") and held.trial.id == report.trial.id))
        if body == "standing":
            self._queue = deque(held for held in self._queue if not held.HasField("standing"))
        if body == "outcome":
            self._flush_lines()
            self._ended = True
        self._queue.append(report)
        if body == "metrics":
            self._metrics += 1
            if self._metrics > MAX_METRICS:
                self._thin_metrics()

    def add_log(self, level: str, message: str, when: float) -> None:
        """Queue a log line."""
        if self._ended:
            return
        line = job_pb2.LogLine(run=self._run, source=self._source, level=level, message=message[:LINE_LIMIT])
        line.time.FromNanoseconds(int(when * 1e9))
        self._lines.append(line)
        self._line_bytes += line.ByteSize()
        while self._line_bytes > LOG_BYTES:
            self._line_bytes -= self._lines.popleft().ByteSize()
            self._dropped += 1

    def put_back(self, reports: Sequence[agent_pb2.Report], *, singly: bool) -> None:
        """Return reports to the front of the queue; `singly` makes each a batch of its own."""
        (self._singly if singly else self._queue).extendleft(reversed(reports))

    def take(self) -> list[agent_pb2.Report]:
        """Remove and return the next batch, oldest first and below a megabyte. `more` says whether it left a backlog."""
        if self._singly:
            alone = self._singly.popleft()
            self.more = bool(self._singly or self._queue)
            return [alone]
        if not self._ended:
            self._flush_lines()
            if self._progress is not None:
                self._queue.append(self._progress)
                self._progress = None
        batch: list[agent_pb2.Report] = []
        size = 0
        while self._queue and (not batch or size + self._queue[0].ByteSize() < BATCH_BYTES):
            report = self._queue.popleft()
            size += report.ByteSize() + 8
            self._metrics -= report.HasField("metrics")
            batch.append(report)
        self.more = bool(self._queue)
        return batch

    def _flush_lines(self) -> None:
        if self._dropped:
            note = job_pb2.LogLine(
                run=self._run,
                source=self._source,
                level="warning",
                message=f"{self._dropped} older log lines were dropped while the coordinator was away",
            )
            note.time.GetCurrentTime()
            self._lines.appendleft(note)
            self._dropped = 0
        while self._lines:
            report = agent_pb2.Report(time=_stamp(self._lines[0].time))
            size = 0
            while self._lines and size < BATCH_BYTES // 2:
                line = self._lines.popleft()
                size += line.ByteSize()
                report.log.lines.append(line)
            self._queue.append(report)
        self._line_bytes = 0

    def _thin_metrics(self) -> None:
        kept: deque[agent_pb2.Report] = deque()
        number = 0
        for report in self._queue:
            if report.HasField("metrics"):
                number += 1
                if number % 2:
                    continue
            kept.append(report)
        self._queue = kept
        self._metrics = sum(report.HasField("metrics") for report in kept)


def _stamp(time: Timestamp) -> Timestamp:
    stamp = Timestamp()
    stamp.CopyFrom(time)
    return stamp
