"""What a job would need, as a table."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from cli.render.text import duration, facts, number, size, when
from luthier.v1.estimate_pb2 import FIT_DOES_NOT_FIT, FIT_FITS, DurationEstimate, JobEstimate, MemoryEstimate, QueueEstimate


def estimate_view(estimate: JobEstimate) -> Table:
    """Memory, duration and queue, each with what it rests on."""
    rows: list[tuple[str, object]] = []
    if estimate.HasField("memory"):
        rows += _memory(estimate.memory)
    rows += _duration(estimate.duration)
    rows += _queue(estimate.queue)
    return facts(rows)


def _memory(memory: MemoryEstimate) -> list[tuple[str, object]]:
    if memory.fit == FIT_FITS:
        verdict = Text(f"fits: {size(memory.bytes)} of {size(memory.available_bytes)} a worker", "green")
    elif memory.fit == FIT_DOES_NOT_FIT:
        verdict = Text(f"does not fit: {size(memory.bytes)}, a worker can have {size(memory.available_bytes)}", "red")
    else:
        verdict = Text(f"{size(memory.bytes)} a worker; " if memory.bytes else "unknown: ", "yellow")
        verdict.append(memory.reason)
    parts = ", ".join(f"{name} {size(count)}" for name, count in sorted(memory.parts.items(), key=lambda row: -row[1]) if count)
    return [
        ("memory", verdict),
        ("", parts),
        ("", memory.reason if memory.fit in (FIT_FITS, FIT_DOES_NOT_FIT) else ""),
        ("would fit", "\n".join(memory.advice)),
    ]


def _duration(told: DurationEstimate) -> list[tuple[str, object]]:
    steps = f"{told.steps} steps" if told.steps else ""
    if not told.HasField("expected"):
        return [("duration", Text(f"unknown: {told.reason}", "yellow")), ("", steps)]
    spread = f" ({duration(told.low)} to {duration(told.high)})" if told.runs > 1 else ""
    spent = f"{number(told.cpu_seconds / 3600)} CPU-hours"
    spent += f", {number(told.gpu_seconds / 3600)} GPU-hours" if told.gpu_seconds else ""
    return [("duration", f"{duration(told.expected)}{spread}, {steps}"), ("", told.reason), ("would spend", spent)]


def _queue(queue: QueueEstimate) -> list[tuple[str, object]]:
    if queue.starts_at_once:
        return [("queue", Text("starts at once", "green"))]
    place = f"number {queue.position}, " if queue.position else ""
    return [("queue", f"{place}waits for {queue.waiting_for}"), ("may start", when(queue.estimated_start))]
