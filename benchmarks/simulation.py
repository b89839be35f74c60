"""Runs a month through a policy: events in order of time, a round of decisions where something changed.

What is simulated: a job runs as long as it takes with the workers it got (an elastic one with half of its workers twice as long).
A preempted job gives its place up after `SAVING_SECONDS` and later goes on from its last checkpoint, of which there is one every
`CHECKPOINT_SECONDS`: what it did since is counted as lost, as if none could save in time. Coming back costs `RESTART_SECONDS`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from benchmarks.policies import Policy
from benchmarks.workload import START, Job, Month
from coordinator.scheduling.model import Decision, Demand, Holding, Situation, Terms, Waiting
from coordinator.scheduling.order import HALF_LIFE_SECONDS

SAVING_SECONDS = 60.0
RESTART_SECONDS = 120.0
CHECKPOINT_SECONDS = 1800.0


@dataclass
class Record:
    """What became of a job. Times are seconds of the simulation; `work` is what is left of it, in worker-seconds."""

    job: Job
    work: float
    first_start: float | None = None
    end: float | None = None
    preempted: int = 0
    lost_gpu_seconds: float = 0.0


@dataclass
class Sample:
    """A moment: the part of all GPUs that was held since the last, jobs waiting, and fairness between the projects that wait."""

    time: float
    gpus: float
    waiting: int
    jain: float | None


@dataclass
class Outcome:
    """All that is known at the end."""

    records: dict[str, Record]
    samples: list[Sample] = field(default_factory=list)
    rounds: int = 0
    preemptions: int = 0
    gpu_seconds: dict[str, float] = field(default_factory=dict)


class Simulation:
    """One month under one policy. `period` is the least time between two rounds, in seconds."""

    def __init__(self, month: Month, policy: Policy, period: float = 60.0) -> None:
        self.month = month
        self.policy = policy
        self.period = period
        self.now = 0.0
        self.outcome = Outcome({job.waiting.uid: Record(job, job.seconds * _speed(job.waiting, None)) for job in month.jobs})
        self.queue: dict[str, Waiting] = {}
        self.running: dict[str, Holding] = {}
        self._events: list[tuple[float, int, str, str]] = []
        self._count = 0
        self._decayed = dict.fromkeys(month.terms, Demand())
        self._measured = self._looked = 0.0
        self._held = dict.fromkeys(month.terms, Demand())
        self._used = dict.fromkeys(month.terms, Demand())
        self._counted = dict.fromkeys(month.terms, 0.0)
        self._cluster = sum((node.total for node in month.nodes), Demand())
        for job in month.jobs:
            self._at(job.waiting.since - START, "submit", job.waiting.uid)

    def run(self) -> Outcome:
        """Go on until every job has ended."""
        due: float | None = None
        while self._events:
            self.now = self._events[0][0]
            if due is not None and due < self.now:
                self.now = due
            else:
                _, _, kind, uid = heappop(self._events)
                if self._happens(kind, uid) and due is None:
                    due = math.ceil(self.now / self.period) * self.period
            if due is not None and self.now >= due and not (self._events and self._events[0][0] <= self.now):
                self._round()
                due = None
        self._measure()
        return self.outcome

    def _happens(self, kind: str, uid: str) -> bool:
        """Apply an event; whether it changes anything."""
        record = self.outcome.records[uid]
        if kind == "submit":
            self.queue[uid] = record.job.waiting
            return True
        run, _, attempt = kind.partition(" ")
        if uid not in self.running or record.preempted != int(attempt) + (run == "stop"):
            return False
        holding = self.running.pop(uid)
        self._count_until_now(holding.project)
        self._held[holding.project] -= holding.held
        if run == "end":
            record.work = 0.0
            record.end = self.now
        else:
            self._give_up(record, holding)
        return True

    def _give_up(self, record: Record, holding: Holding) -> None:
        ran = max(self.now - (holding.started - START) - (RESTART_SECONDS if record.preempted > 1 else 0.0), 0.0)
        saved = math.floor(ran / CHECKPOINT_SECONDS) * CHECKPOINT_SECONDS
        record.work = max(record.work - saved * _speed(record.job.waiting, holding.workers), 1.0)
        record.lost_gpu_seconds += (self.now - (holding.started - START) - saved) * holding.held.gpus
        self.queue[holding.uid] = record.job.waiting

    def _round(self) -> None:
        self._measure()
        if self.now - self._looked >= CHECKPOINT_SECONDS / 2:
            self._looked = self.now
            self.running = {uid: self._unsaved(each) for uid, each in self.running.items()}
        found = self.policy(self.situation())
        self.outcome.rounds += 1
        for decision in found.decisions:
            if decision.start:
                self._begin(decision)
        for preemption in found.preemptions:
            record, holding = self.outcome.records[preemption.uid], self.running[preemption.uid]
            self.running[preemption.uid] = replace(holding, stopping=True)
            self._at(self.now + SAVING_SECONDS, f"stop {record.preempted}", preemption.uid)
            record.preempted += 1
            self.outcome.preemptions += 1

    def _unsaved(self, holding: Holding) -> Holding:
        """With the work that is at stake now. Looked at twice between two checkpoints."""
        return replace(holding, unsaved_seconds=(START + self.now - holding.started) % CHECKPOINT_SECONDS)

    def situation(self) -> Situation:
        """What the policy is asked about."""
        now = START + self.now
        terms = {name: self._terms(name) for name in self.month.terms}
        return Situation(now, list(self.queue.values()), list(self.running.values()), self.month.nodes, terms)

    def _terms(self, name: str) -> Terms:
        return replace(self.month.terms[name], decayed=self._decayed[name])

    def _begin(self, decision: Decision) -> None:
        waiting = self.queue.pop(decision.uid)
        record = self.outcome.records[decision.uid]
        if record.first_start is None:
            record.first_start = self.now
        seconds = record.work / _speed(waiting, decision.workers) + (RESTART_SECONDS if record.preempted else 0.0)
        end = None if waiting.expected_seconds is None else START + self.now + max(waiting.expected_seconds, seconds)
        self.running[decision.uid] = Holding(
            decision.uid,
            waiting.project,
            waiting.priority,
            waiting.shape,
            decision.workers,
            START + self.now,
            end,
            preemptible=True,
            since=waiting.since,
            spots=decision.spots,
        )
        self._count_until_now(waiting.project)
        self._held[waiting.project] += self.running[decision.uid].held
        self._at(self.now + seconds, f"end {record.preempted}", decision.uid)

    def _count_until_now(self, project: str) -> None:
        passed = self.now - self._counted[project]
        self._counted[project] = self.now
        held, used = self._held[project], self._used[project]
        self._used[project] = Demand(used.cpus + held.cpus * passed, used.gpus + held.gpus * passed)

    def _measure(self) -> None:
        """Count what was held since the last round, and how it is shared among the projects that wait for more."""
        passed, self._measured = self.now - self._measured, self.now
        fade = 0.5 ** (passed / HALF_LIFE_SECONDS)
        total = 0.0
        for name in self.month.terms:
            self._count_until_now(name)
            used, before = self._used[name], self._decayed[name]
            self._used[name] = Demand()
            self._decayed[name] = Demand(before.cpus * fade + used.cpus, before.gpus * fade + used.gpus)
            self.outcome.gpu_seconds[name] = self.outcome.gpu_seconds.get(name, 0.0) + used.gpus
            total += used.gpus
        wait = {each.project for each in self.queue.values()}
        shares = [self._dominant(self._held[name]) / self.month.terms[name].share for name in sorted(wait)]
        fair = jain(shares) if len(shares) > 1 else None
        self.outcome.samples.append(
            Sample(self.now, total / (self._cluster.gpus * passed) if passed else 0.0, len(self.queue), fair)
        )

    def _dominant(self, held: Demand) -> float:
        return max(held.cpus / self._cluster.cpus, held.gpus / self._cluster.gpus)

    def _at(self, time: float, kind: str, uid: str) -> None:
        self._count += 1
        heappush(self._events, (time, self._count, kind, uid))


def jain(values: list[float]) -> float | None:
    """Jain's index of fairness: 1 where all have the same, 1/n where one has everything; None where nobody has anything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def _speed(waiting: Waiting, workers: int | None) -> float:
    """Work a second: the number of workers, or one for a job that is all driver."""
    return float((waiting.shape.most if workers is None else workers) or 1)
