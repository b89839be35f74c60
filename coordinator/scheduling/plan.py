"""Which queued jobs may start: a pure function of the queue, what is held, and what the cluster has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from coordinator.scheduling.model import Demand


@dataclass(frozen=True)
class Waiting:
    """A queued job."""

    uid: str
    priority: int
    since: datetime
    demand: Demand


@dataclass(frozen=True)
class Decision:
    """What becomes of a queued job, and why. `position` is its place in the queue, 1 for the next."""

    uid: str
    start: bool
    position: int
    reason: str


def plan(queue: Sequence[Waiting], held: Demand, capacity: Demand | None) -> list[Decision]:
    """Decide for every queued job, in the order of the queue: priority first, then age.

    A job starts with all it needs or not at all. The first job that has to wait for others holds its place: nothing behind it
    starts, so that a large job is not starved by small ones. A job that the cluster could never hold waits beside the queue.
    `capacity` is None while the cluster does not answer.
    """
    free = (capacity - held) if capacity is not None else Demand()
    head_waits = False
    decisions = []
    position = 0
    for job in sorted(queue, key=lambda job: (-job.priority, job.since, job.uid)):
        if capacity is None:
            position += 1
            decisions.append(Decision(job.uid, False, position, "the Ray cluster to answer"))
        elif not job.demand.fits(capacity):
            reason = f"a larger cluster: needs {job.demand}, the cluster has {capacity}"
            decisions.append(Decision(job.uid, False, position + 1, reason))
        elif head_waits:
            position += 1
            decisions.append(Decision(job.uid, False, position, "its turn: jobs ahead of it in the queue"))
        elif job.demand.fits(free):
            free = free - job.demand
            decisions.append(Decision(job.uid, True, 0, f"{job.demand} are free"))
        else:
            head_waits = True
            position += 1
            decisions.append(
                Decision(job.uid, False, position, f"{job.demand}; {max(free.cpus, 0):g} CPUs and {free.gpus:g} GPUs are free")
            )
    return decisions
