"""When a waiting job may start: an estimate from the expected ends of what runs.

Jobs start in the order of the queue as soon as the totals allow; nodes, limits and later arrivals are left out. So it is neither
the earliest nor the latest start, but what a person would work out from the same table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

from coordinator.scheduling.board import Release
from coordinator.scheduling.model import Waiting
from coordinator.scheduling.needs import Need

FORESEEN = 1000
"""So many places of the queue get an estimate. Further behind it would say more about jobs not yet submitted."""


def starts(
    now: float, first: float, free: tuple[int, int], running: Iterable[Release], waiting: Sequence[tuple[Waiting, Need]]
) -> dict[str, float]:
    """Estimated starts by uid, in seconds of the epoch, up to the first job that waits for an end that nobody knows.

    `first` is the reserved start of the first of them, `free` what is free before it in ten-thousandths.
    """
    cpus, gpus = free
    ends = [
        (max(each.end, now), sum(part[1] for part in each.parts), sum(part[2] for part in each.parts))
        for each in running
        if each.end < math.inf
    ]
    heapify(ends)
    moment = max(now, first)
    while ends and ends[0][0] <= moment:
        _, some_cpus, some_gpus = heappop(ends)
        cpus, gpus = cpus + some_cpus, gpus + some_gpus
    known: dict[str, float] = {}
    for job, need in waiting:
        while (need.cpus > cpus or need.gpus > gpus) and ends:
            end, some_cpus, some_gpus = heappop(ends)
            moment = max(moment, end)
            cpus, gpus = cpus + some_cpus, gpus + some_gpus
        if need.cpus > cpus or need.gpus > gpus:
            break
        known[job.uid] = moment
        cpus, gpus = cpus - need.cpus, gpus - need.gpus
        if job.expected_seconds is not None:
            heappush(ends, (moment + job.expected_seconds, need.cpus, need.gpus))
    return known
