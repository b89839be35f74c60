"""In which order the queue is served: entitlement, priority with ageing, and fair share.

1. What fits into its project's quota together with what the project holds goes first: a quota is guaranteed, so that it is not
   lent out while its owner waits. Once a job of a project does not fit any more, none behind it counts as covered either: a small
   job never uses up a quota that a larger one of its project, ahead of it, waits for.
2. Then by effective priority: the job's own, and one point for every `AGEING_SECONDS` that it has waited.
3. Within an effective priority by fair share: weighted dominant-resource fairness (Ghodsi et al., 2011). The next job is one of
   the project with the smallest dominant share: of all resources the largest part of the cluster that it holds now, held lately,
   and would hold with its jobs ahead in the queue, over its weight.
4. Within a project by effective priority, then age, then uid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from coordinator.scheduling import explain
from coordinator.scheduling.model import Demand, Holding, Situation, Terms, Waiting
from coordinator.scheduling.needs import HUGE, TICKS, Need, Needs, demand, ticks

AGEING_SECONDS = 6 * 3600.0
"""Waiting so long is worth one point of priority."""

HALF_LIFE_SECONDS = 24 * 3600.0
"""Half-life of `Terms.decayed`."""

_LATELY = TICKS * math.log(2) / HALF_LIFE_SECONDS
"""From CPU-seconds of decayed usage to ten-thousandths of a CPU held lately: what is held for long comes to what is held now."""


@dataclass(slots=True)
class Account:
    """A project in one round, in ten-thousandths. `promised` is what goes to its jobs that wait with a place reserved.

    A job of which `room_cpus` and `room_gpus` are less than it needs is kept back by the limit (`beyond_limit` says how).
    """

    terms: Terms
    quota: tuple[int, int]
    limit: tuple[int, int]
    spent: tuple[bool, bool]
    held: list[int] = field(default_factory=lambda: [0, 0])
    promised: list[int] = field(default_factory=lambda: [0, 0])
    stuck: list[bool] = field(default_factory=lambda: [False, False])
    room_cpus: int = HUGE
    room_gpus: int = HUGE

    @classmethod
    def of(cls, terms: Terms) -> Account:
        """Open the account of a project that holds nothing yet."""
        limit = (HUGE, HUGE) if terms.limit is None else (ticks(terms.limit.cpus), ticks(terms.limit.gpus))
        left = terms.budget_left
        spent = (False, False) if left is None else (left.cpus <= 0, left.gpus <= 0)
        account = cls(terms, (ticks(terms.quota.cpus), ticks(terms.quota.gpus)), limit, spent)
        account._measure()
        return account

    def take(self, cpus: int, gpus: int) -> None:
        """It holds so much more."""
        self.held[0] += cpus
        self.held[1] += gpus
        self._measure()

    def promise(self, cpus: int, gpus: int) -> None:
        """So much more is kept for a job of it that waits."""
        self.promised[0] += cpus
        self.promised[1] += gpus
        self._measure()

    def left(self, bound: tuple[int, int]) -> tuple[int, int]:
        """What it may still take before it reaches its quota or limit."""
        return bound[0] - self.held[0] - self.promised[0], bound[1] - self.held[1] - self.promised[1]

    def _measure(self) -> None:
        if self.limit != (HUGE, HUGE):
            left = self.left(self.limit)
            self.room_cpus, self.room_gpus = (0 if stuck else most for stuck, most in zip(self.stuck, left, strict=True))

    def out_of_budget(self, need: Need) -> str:
        """Why its budget lets the job start nothing, empty where it does."""
        for index, used in enumerate((need.cpus, need.gpus)):
            if used and self.spent[index]:
                return explain.budget(cpus=index == 0)
        return ""

    def beyond_limit(self, need: Need) -> str:
        """Why its limit keeps a job back that needs more than there is room for.

        What is behind such a job in its project, and needs the resource that is short, waits with it: else small jobs would keep
        a large one out for ever.
        """
        for index, used in enumerate((need.cpus, need.gpus)):
            if used and self.stuck[index]:
                return explain.turn_in_project(cpus=index == 0)
        left = self.left(self.limit)
        self.stuck = [self.stuck[0] or need.cpus > left[0], self.stuck[1] or need.gpus > left[1]]
        self._measure()
        total = need.shape.total(need.least)
        return explain.limit(total, self.terms.limit or Demand(), demand(*self.held), demand(*self.promised))

    def workers(self, need: Need, bound: tuple[int, int]) -> int:
        """How many workers of an elastic job a quota or limit has room for; at least the least."""
        if need.least == need.most:
            return need.most
        left = self.left(bound)
        return max(need.fit(left[0] - need.driver_cpus, left[1] - need.driver_gpus), need.least)


Row = tuple[bool, int, float, float, str, Waiting, Need, Account]
"""A job's place in the order: whether it is beyond its quota, its level (less is sooner), its project's share, its time and uid;
then the job. Plain tuples, because there are many of them.
"""


@dataclass(slots=True, eq=False)
class Queued:
    """A job in its place. `covered` says that it fits into its project's quota."""

    job: Waiting
    need: Need
    account: Account
    covered: bool


def accounts(situation: Situation, needs: Mapping[str, Need]) -> dict[str, Account]:
    """The projects, with what they hold. `needs` are those of the holdings, by uid."""
    known = {project: Account.of(terms) for project, terms in situation.terms.items()}
    for job in situation.queue:
        if job.project not in known:
            known[job.project] = Account.of(Terms(job.project))
    for holding in situation.holding:
        account = known.get(holding.project)
        if account is None:
            account = known[holding.project] = Account.of(Terms(holding.project))
        account.take(*needs[holding.uid].part(holding.workers, True))
    return known


class Cover(Enum):
    """How much of what a project holds lies within its quota: all, the least it can run with, or not even that."""

    WHOLE = 2
    LEAST = 1
    NONE = 0


def covers(holdings: Sequence[Holding], needs: Mapping[str, Need], known: Mapping[str, Account]) -> dict[str, Cover]:
    """What the quotas cover of all that is held.

    A quota covers what cannot be preempted first, then what started first; what does not fit into the rest of it is borrowed. So
    a job that is covered stays covered while nothing of its project ends that started before it. An elastic job that has more
    than the quota has room for may be covered with its least number of workers.
    """
    left = {project: list(account.quota) for project, account in known.items()}
    found = {}
    for holding in sorted(holdings, key=lambda each: (each.stopping, each.preemptible, each.started, each.uid)):
        need, rest = needs[holding.uid], left[holding.project]
        found[holding.uid] = Cover.NONE
        for cover, workers in ((Cover.WHOLE, holding.workers), (Cover.LEAST, min(need.least, holding.workers))):
            cpus, gpus = need.part(workers, True)
            if cpus <= rest[0] and gpus <= rest[1]:
                rest[0] -= cpus
                rest[1] -= gpus
                found[holding.uid] = cover
                break
    return found


def effective(priority: int, since: float, now: float) -> float:
    """Priority with age, in points."""
    return priority + max(now - since, 0.0) / AGEING_SECONDS


def arrange(
    situation: Situation, needs: Needs, known: Mapping[str, Account], cluster: tuple[int, int]
) -> tuple[list[Row], list[tuple[Waiting, str]]]:
    """The queue in its order, and the jobs that wait beside it, with their reasons: they hold nobody up."""
    now = situation.now
    asked = needs.asked
    jobs: dict[str, list[tuple[int, float, str, Waiting, Need]]] = {project: [] for project in known}
    bound = {project for project, account in known.items() if account.terms.limit or account.terms.budget_left}
    barred: dict[tuple[str, Need], str] = {}
    beside: list[tuple[Waiting, str]] = []
    for job in situation.queue:
        project, since = job.project, job.since
        need = asked(job.shape)
        reason = need.never
        if not reason and project in bound:
            reason = barred.get((project, need))
            if reason is None:
                reason = barred[project, need] = _barred(need, known[project])
        if not reason and job.not_before > now:
            reason = explain.pause(job.not_before)
        if reason:
            beside.append((job, reason))
        else:
            points = int((now - since) / AGEING_SECONDS) if now > since else 0
            jobs[project].append((-job.priority - points, since, job.uid, job, need))
    rows: list[Row] = []
    for project, own in jobs.items():
        own.sort()
        _by_share(rows, own, known[project], cluster)
    rows.sort()
    beside.sort(key=lambda row: (-row[0].priority, row[0].since, row[0].uid))
    return rows, beside


def _barred(need: Need, account: Account) -> str:
    """Why a project's limit or budget never lets a job of this shape start, empty where they do."""
    if need.cpus > account.limit[0] or need.gpus > account.limit[1]:
        return explain.limit_too_low(need.shape.total(need.least), account.terms.limit or Demand())
    return account.out_of_budget(need)


def _by_share(
    rows: list[Row], jobs: Sequence[tuple[int, float, str, Waiting, Need]], account: Account, cluster: tuple[int, int]
) -> None:
    """Add a project's jobs to the order, each with the share that the project has once those ahead of it run.

    A job that its project's limit keeps back is not counted: it takes nothing from the others.
    """
    weight = max(account.terms.share, 1e-9)
    per_cpu, per_gpu = (1 / (amount * weight) if amount else 0.0 for amount in cluster)
    past_cpus, past_gpus = account.terms.decayed.cpus * _LATELY * per_cpu, account.terms.decayed.gpus * _LATELY * per_gpu
    held_cpus, held_gpus = account.held
    quota_cpus, quota_gpus = account.quota
    limit_cpus, limit_gpus = account.limit
    beyond = False
    for level, since, uid, job, need in jobs:
        share, share_gpus = held_cpus * per_cpu + past_cpus, held_gpus * per_gpu + past_gpus
        if share_gpus > share:
            share = share_gpus
        cpus, gpus = held_cpus + need.cpus, held_gpus + need.gpus
        beyond = beyond or cpus > quota_cpus or gpus > quota_gpus
        rows.append((beyond, level, share, since, uid, job, need, account))
        if cpus <= limit_cpus and gpus <= limit_gpus:
            held_cpus, held_gpus = cpus, gpus
