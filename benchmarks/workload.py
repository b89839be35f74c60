"""A synthetic month of a shared cluster: who submits what, when, and how long it really takes. Seeded: the same seed, the same
month.

The shapes follow what is published about shared GPU clusters in general: most jobs are small and short, most of the time is spent
by the few that are large; people work by day and on weekdays, and submit in bursts; limits on time are guessed far too high.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from coordinator.scheduling.model import Demand, Node, Shape, Terms, Waiting

HOUR = 3600.0
DAY = 24 * HOUR
START = 1_767_225_600.0
"""Thursday, 1 January 2026, 0:00 UTC."""

NODE = Demand(96, 8)
CPU_NODE = Demand(96)

GANGS = {1: 0.45, 2: 0.12, 4: 0.12, 8: 0.16, 16: 0.07, 32: 0.04, 64: 0.025, 128: 0.01, 256: 0.005}
"""GPUs of a gang, and how often it comes."""

CPU_ONLY = 0.1
"""Part of the jobs without GPUs: evaluations, imports, ingests."""

ELASTIC = 0.1
PRIORITIES = {-10: 0.15, 0: 0.75, 10: 0.1}
GUARANTEED = 0.5
"""Part of the cluster that quotas guarantee to projects; the rest is shared."""


@dataclass(frozen=True)
class Job:
    """A job as submitted, and `seconds`, the truth about it: how long it takes with all its workers."""

    waiting: Waiting
    seconds: float


@dataclass(frozen=True)
class Month:
    """A cluster, its projects, and what they submit, in the order of time."""

    nodes: list[Node]
    terms: dict[str, Terms]
    jobs: list[Job]
    seconds: float


def make(nodes: int, jobs: int, days: float, projects: int = 50, load: float = 0.9, seed: int = 1) -> Month:
    """Make one. `load` is the part of all GPU-hours that the jobs would take with all their workers."""
    chance = random.Random(seed)
    cluster = [Node(f"node-{number:04}", CPU_NODE if number % 10 == 9 else NODE) for number in range(nodes)]
    cpus, gpus = sum(node.total.cpus for node in cluster), sum(node.total.gpus for node in cluster)
    demand = [1 / (rank + 1) ** 0.8 for rank in range(projects)]
    shares = [4.0 if rank % 5 == 0 else 1.0 for rank in range(projects)]
    terms = {}
    for rank, share in enumerate(shares):
        part = GUARANTEED * share / sum(shares)
        terms[f"project-{rank:02}"] = Terms(f"project-{rank:02}", share, Demand(math.floor(cpus * part), math.floor(gpus * part)))
    largest = max(size for size in GANGS if size <= max(gpus / 4, 1))
    drawn: list[Job] = []
    while len(drawn) < jobs:
        moment = _arrival(chance, days * DAY)
        project = chance.choices(list(terms), demand)[0]
        shape = _shape(chance, largest)
        priority = chance.choices(list(PRIORITIES), list(PRIORITIES.values()))[0]
        for _ in range(min(1 + int(chance.expovariate(1 / 3)), jobs - len(drawn))):
            seconds = min(max(chance.lognormvariate(math.log(1.2 * HOUR), 1.4), 300.0), 4 * DAY)
            waiting = Waiting("", project, priority, START + moment, shape)
            drawn.append(Job(waiting, seconds))
            moment = min(moment + chance.expovariate(1 / 20), days * DAY)
    scale = load * gpus * days * DAY / max(sum(job.seconds * job.waiting.shape.total().gpus for job in drawn), 1.0)
    drawn.sort(key=lambda job: (job.waiting.since, job.waiting.project))
    return Month(cluster, terms, [_finish(chance, number, job, scale) for number, job in enumerate(drawn)], days * DAY)


def _arrival(chance: random.Random, seconds: float) -> float:
    while True:
        moment = chance.uniform(0, seconds)
        day, hour = divmod(moment / HOUR, 24)
        busy = 0.25 + 0.75 * math.exp(-(((hour - 14) / 4) ** 2))
        weekend = (int(day) + 3) % 7 >= 5
        if chance.random() < busy * (0.4 if weekend else 1.0):
            return moment


def _shape(chance: random.Random, largest: int) -> Shape:
    if chance.random() < CPU_ONLY:
        return Shape(Demand(chance.choice([1, 2, 4, 8, 16, 32])))
    size = min(chance.choices(list(GANGS), list(GANGS.values()))[0], largest)
    worker = Demand(chance.choice([4.0, 8.0, 8.0, 10.0]), 1.0)
    least = max(size // 4, 1) if chance.random() < ELASTIC else size
    return Shape(Demand(1.0), worker, size, least)


def _finish(chance: random.Random, number: int, job: Job, scale: float) -> Job:
    """Give it its name and its time limit: above the truth by a factor, in whole hours; one in ten has none."""
    seconds = job.seconds * scale
    shape, waiting = job.waiting.shape, job.waiting
    # An elastic job has to finish with its least workers, too.
    worst = seconds * shape.most / max(shape.least, 1) if shape.most else seconds
    limit = math.ceil(worst * (1.1 + chance.expovariate(0.7)) / HOUR) * HOUR
    expected = None if chance.random() < 0.1 else limit
    return Job(Waiting(f"job-{number:06}", waiting.project, waiting.priority, waiting.since, shape, expected), seconds)
