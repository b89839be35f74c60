"""One round of the scheduler: how long it takes, and how that grows with the jobs that wait and with the nodes.

Two rounds are measured for each size. `full`: the cluster was filled by the scheduler itself, one job in fifty has just ended,
all others wait on; that is what a coordinator does every second. `burst`: the cluster is empty, and everything that fits starts
at once; its admissions a second are what Kueue's published figure (50,000 workloads in 1,179 s, 42 a second) may stand beside. It
is not the same run: Kueue writes each admission to an API server, and this is the decision alone.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import replace
from typing import Any

from benchmarks.report import Spread, keep, machine
from benchmarks.workload import DAY, START, make
from coordinator.scheduling.model import Decision, Demand, Holding, Plan, Situation, Waiting
from coordinator.scheduling.plan import plan

COMMAND = "python -m benchmarks.schedule"
JOBS = (1_000, 10_000, 100_000)
NODES = (10, 100, 1_000)
PROJECTS = 100
REPEATS = 7


def main() -> None:
    """Measure every size and keep the result. Process time, so that what else the machine does counts little."""
    before = machine()
    rows = []
    for nodes in NODES:
        for jobs in JOBS:
            row = measure(nodes, jobs)
            rows.append(row)
            print(row, flush=True)
    largest = rows[-1]
    result = {
        "what": "seconds of process time of one round, with all its explanations",
        "projects": PROJECTS,
        "repeats": REPEATS,
        "rows": rows,
        "kueue_published_admissions_per_second": 42,
        "machine": before,
    }
    path = keep("schedule", COMMAND, result)
    print(f"{largest['full_s']['median']:.2f} s a round, {largest['burst_admissions_per_s']:.0f} admissions/s", path)


def measure(nodes: int, jobs: int) -> dict[str, Any]:
    """Both rounds at one size."""
    empty = situation(nodes, jobs)
    burst, started = timed(empty)
    full = fill(empty, started)
    times, after = timed(full)
    return {
        "nodes": nodes,
        "jobs_waiting": jobs,
        "full_s": vars(Spread.of(times)),
        "full_started": sum(each.start for each in after.decisions),
        "full_held": len(full.holding),
        "burst_s": vars(Spread.of(burst)),
        "burst_started": sum(each.start for each in started.decisions),
        "burst_admissions_per_s": round(sum(each.start for each in started.decisions) / statistics.median(burst)),
    }


def situation(nodes: int, jobs: int) -> Situation:
    """A queue of the simulator's mixed shapes, all waiting since some time of the last three days, on an empty cluster."""
    month = make(nodes, jobs, 3.0, projects=PROJECTS)
    limit = sum((node.total for node in month.nodes), Demand())
    terms = {
        name: replace(each, limit=Demand(limit.cpus * 0.5, limit.gpus * 0.5), decayed=each.quota.times(int(DAY)))
        for name, each in month.terms.items()
    }
    return Situation(START + 3 * DAY, [job.waiting for job in month.jobs], (), month.nodes, terms)


def timed(asked: Situation) -> tuple[list[float], Plan]:
    """Seconds of each repeat, and the plan."""
    times = []
    found = plan(asked)
    for _ in range(REPEATS):
        gc.collect()
        begun = time.process_time()
        found = plan(asked)
        times.append(time.process_time() - begun)
    return times, found


def fill(asked: Situation, found: Plan) -> Situation:
    """The same queue, refilled to its length, with what was started running but for one in fifty."""
    waiting = {each.uid: each for each in asked.queue}
    started = [each for each in found.decisions if each.start]
    holding = [_hold(waiting[each.uid], each, asked.now) for number, each in enumerate(started) if number % 50]
    again = [replace(waiting[each.uid], uid=f"again-{each.uid}") for each in started]
    running = {each.uid for each in started}
    left = [each for each in asked.queue if each.uid not in running]
    return replace(asked, queue=[*left, *again], holding=holding)


def _hold(waiting: Waiting, decision: Decision, now: float) -> Holding:
    end = None if waiting.expected_seconds is None else now + waiting.expected_seconds
    return Holding(
        waiting.uid,
        waiting.project,
        waiting.priority,
        waiting.shape,
        decision.workers,
        now - 600,
        end,
        preemptible=True,
        unsaved_seconds=600,
        since=waiting.since,
        spots=decision.spots,
    )


if __name__ == "__main__":
    main()
