"""A synthetic month of a 1,000-node cluster with 100,000 jobs, under the scheduler itself, under FIFO and under plain priority.

`python -m benchmarks.simulate` runs the month three times, writes results/simulate.json and draws results/simulate.png;
`--draw` draws the picture again from the result file.
"""

from __future__ import annotations

import argparse
import bisect
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.policies import POLICIES
from benchmarks.report import RESULTS, keep, machine
from benchmarks.simulation import Outcome, Record, Simulation
from benchmarks.workload import DAY, HOUR, START, Month, make

COMMAND = "python -m benchmarks.simulate"
NODES, JOBS, DAYS, SEED = 1000, 100_000, 30.0, 1
PERIOD_SECONDS = 600.0
"""Least time between two rounds of decisions. A coordinator takes a second; here it keeps three months within minutes."""

CLASSES: dict[str, Callable[[Record], bool]] = {
    "all": lambda record: _gpus(record) >= 0,
    "CPUs only": lambda record: _gpus(record) == 0,
    "1 to 8 GPUs": lambda record: 1 <= _gpus(record) <= 8,
    "16 to 64 GPUs": lambda record: 16 <= _gpus(record) <= 64,
    "128 and 256 GPUs": lambda record: _gpus(record) >= 128,
    "priority 10": lambda record: record.job.waiting.priority == 10,
    "priority 0": lambda record: record.job.waiting.priority == 0,
    "priority -10": lambda record: record.job.waiting.priority == -10,
}


def _gpus(record: Record) -> float:
    return record.job.waiting.shape.total().gpus


def main() -> None:
    """Simulate, keep the result and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="only draw the kept result")
    if not parser.parse_args().draw:
        before = machine()
        month = make(NODES, JOBS, DAYS, seed=SEED)
        result: dict[str, Any] = {
            "what": "a synthetic month under three policies",
            "nodes": NODES,
            "jobs": JOBS,
            "days": DAYS,
            "seed": SEED,
            "period_seconds": PERIOD_SECONDS,
            "machine": before,
            "policies": {},
        }
        for name, policy in POLICIES.items():
            started = time.process_time()
            outcome = Simulation(month, policy, PERIOD_SECONDS).run()
            result["policies"][name] = {**summary(month, outcome), "cpu_seconds": round(time.process_time() - started, 1)}
            print(name, {key: value for key, value in result["policies"][name].items() if key != "over_time"}, flush=True)
            keep("simulate", COMMAND, result)
    draw(json.loads((RESULTS / "simulate.json").read_text()))


def summary(month: Month, outcome: Outcome) -> dict[str, Any]:
    """The figures of one policy. Waiting is from submission to the first start, in hours."""
    records = outcome.records.values()
    inside = [sample for sample in outcome.samples if sample.time <= month.seconds]
    unfair = [(sample.jain, after) for sample, after in _spans(inside) if sample.jain is not None]
    return {
        "ended": sum(record.end is not None for record in records),
        "utilisation": _mean((sample.gpus, after) for sample, after in _spans(inside)),
        "all_ended_after_days": round(max(record.end or 0.0 for record in records) / DAY, 2),
        "waiting_hours": {name: _waits([record for record in records if holds(record)]) for name, holds in CLASSES.items()},
        "jain_of_waiting_projects": _mean(unfair),
        "worst_project_mean_slowdown": round(max(_slowdowns(records).values()), 2),
        "median_project_mean_slowdown": round(statistics.median(_slowdowns(records).values()), 2),
        "longest_queue": max(sample.waiting for sample in outcome.samples),
        "rounds": outcome.rounds,
        "preemptions": outcome.preemptions,
        "jobs_preempted": sum(record.preempted > 0 for record in records),
        "most_preempted_times": max(record.preempted for record in records),
        "lost_gpu_hours": round(sum(record.lost_gpu_seconds for record in records) / HOUR),
        "held_gpu_hours": round(sum(outcome.gpu_seconds.values()) / HOUR),
        "over_time": _over_time(inside),
    }


def _waits(records: Sequence[Record]) -> dict[str, float]:
    hours = sorted(((record.first_start or 0.0) - (record.job.waiting.since - START)) / HOUR for record in records)
    if not hours:
        return {}
    at = {"median": 0.5, "p95": 0.95, "p99": 0.99}
    found = {name: round(hours[min(int(part * len(hours)), len(hours) - 1)], 2) for name, part in at.items()}
    return {"jobs": len(hours), "mean": round(statistics.fmean(hours), 2), **found, "max": round(hours[-1], 2)}


def _slowdowns(records: Iterable[Record]) -> dict[str, float]:
    """Mean over a project's jobs of the time from submission to end over that which it takes alone (ten minutes at least)."""
    by_project: dict[str, list[float]] = {}
    for record in records:
        if record.end is not None:
            taken = record.end - (record.job.waiting.since - START)
            by_project.setdefault(record.job.waiting.project, []).append(max(taken / max(record.job.seconds, 600.0), 1.0))
    return {project: statistics.fmean(values) for project, values in by_project.items()}


def _spans(samples: Sequence[Any]) -> Iterable[tuple[Any, float]]:
    """Each sample but the first, with the time before it that it stands for."""
    return ((sample, sample.time - before.time) for before, sample in pairwise(samples))


def _mean(rows: Iterable[tuple[float | None, float]]) -> float | None:
    known = [(value, weight) for value, weight in rows if value is not None]
    total = sum(weight for _, weight in known)
    return round(sum(value * weight for value, weight in known) / total, 4) if total else None


def _over_time(samples: Sequence[Any]) -> dict[str, list[float]]:
    """Every sixth hour: the day, the part of GPUs held on average since, and the jobs that wait."""
    times = [sample.time for sample in samples]
    rows: dict[str, list[float]] = {"day": [], "gpus": [], "waiting": []}
    for step in range(1, int(samples[-1].time / (6 * HOUR)) + 1):
        first, last = (bisect.bisect_right(times, hour * 6 * HOUR) for hour in (step - 1, step))
        part = samples[first:last]
        if part:
            rows["day"].append(step / 4)
            rows["gpus"].append(round(statistics.fmean(sample.gpus for sample in part), 4))
            rows["waiting"].append(round(statistics.fmean(sample.waiting for sample in part), 1))
    return rows


def draw(result: dict[str, Any]) -> None:
    """The picture: GPUs in use and jobs waiting over the month, and waiting time by size of job."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    names = {"luthier": "Luthier", "priority": "plain priority", "fifo": "FIFO"}
    colours = {"luthier": "#0b6e4f", "priority": "#c1666b", "fifo": "#8d99ae"}
    policies = [name for name in names if name in result["policies"]]
    figure, (use, queue, wait) = pyplot.subplots(3, 1, figsize=(10, 12), layout="constrained")
    for name in policies:
        rows = result["policies"][name]["over_time"]
        mean = result["policies"][name]["utilisation"]
        use.plot(rows["day"], [100 * value for value in rows["gpus"]], color=colours[name], label=f"{names[name]} ({mean:.1%})")
        queue.plot(rows["day"], rows["waiting"], color=colours[name], label=names[name])
    use.set(ylabel="GPUs held, % (six-hour mean)", ylim=(0, 102), title="GPUs in use (mean of the month in brackets)")
    queue.set(xlabel="day of the month", ylabel="jobs waiting", title="Queue")
    queue.set_yscale("symlog", linthresh=10)
    classes = [name for name in CLASSES if all(result["policies"][each]["waiting_hours"][name] for each in policies)]
    width = 0.8 / len(policies)
    for number, name in enumerate(policies):
        hours = result["policies"][name]["waiting_hours"]
        places = [at + (number - (len(policies) - 1) / 2) * width for at in range(len(classes))]
        p95 = [max(hours[each]["p95"], 0.01) for each in classes]
        wait.bar(places, p95, width * 0.92, color=colours[name], label=f"{names[name]}: 95th percentile")
        most = [hours[each]["max"] for each in classes]
        wait.scatter(places, most, marker="v", s=26, color=colours[name], edgecolor="black", linewidth=0.6, zorder=3)
    wait.scatter([], [], marker="v", color="white", edgecolor="black", label="longest wait")
    wait.set_yscale("log")
    wait.set_ylim(0.05, max(result["policies"][name]["waiting_hours"]["all"]["max"] for name in policies) * 6)
    wait.set(ylabel="hours from submission to start", title="Waiting time by class of job")
    wait.set_xticks(range(len(classes)), [name.replace(" GPUs", "\nGPUs").replace("priority ", "priority\n") for name in classes])
    for axes in (use, queue, wait):
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, loc="lower right" if axes is use else "upper left", ncols=2 if axes is wait else 1)
    figure.suptitle(
        f"{result['jobs']:,} jobs on {result['nodes']:,} nodes in {result['days']:g} days (synthetic, seed {result['seed']})"
    )
    path = RESULTS / "simulate.png"
    figure.savefig(path, dpi=110)
    print(path)


if __name__ == "__main__":
    main()
