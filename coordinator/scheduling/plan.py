"""Which queued jobs start, and why the others wait: a pure function of what there is, what is held and what is asked for.

The jobs are taken in their order (order.py). Each one:

1. waits for its project's limit, holding up only what is behind it in its project; or
2. starts, whole, where there is room that nobody ahead of it was promised (board.py); or
3. is promised room that stopping jobs give back; or
4. has others asked to stop (preempt.py), and is promised their room; or
5. the first that can do none of these is given a reserved start, from the expected ends of what runs; all behind it may start
   only where that does not delay it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property

from coordinator.scheduling import explain, forecast, order, preempt
from coordinator.scheduling.board import Board, Release
from coordinator.scheduling.model import Decision, Holding, Plan, Preemption, Situation, Spot, Waiting
from coordinator.scheduling.needs import Need, Needs, demand, ticks
from coordinator.scheduling.order import Queued
from coordinator.scheduling.packing import Part, Place, Room, Tally, lay_out, parts

ATTEMPTS = 32
"""So many jobs a round may look for victims in vain. Bounds the time of a round; those ahead in the queue look first."""


def plan(situation: Situation, *, explain: bool = True) -> Plan:
    """Decide for every queued job. The same situation gives the same plan, whatever the order of its parts.

    Without `explain` the reasons of waiting jobs are empty and no start is estimated; what starts and who is preempted is the
    same.
    """
    return Round(situation, explain).decide()


class Round:
    """One round of decisions. Made for one call of `plan`."""

    def __init__(self, situation: Situation, explaining: bool = True) -> None:
        self.situation = situation
        self.explaining = explaining
        self.now = situation.now
        self.nodes = sorted(situation.nodes or (), key=lambda node: node.id)
        self.numbers = {node.id: number for number, node in enumerate(self.nodes)}
        self.cluster = (sum(ticks(node.total.cpus) for node in self.nodes), sum(ticks(node.total.gpus) for node in self.nodes))
        self.holdings = sorted(situation.holding, key=lambda holding: holding.uid)
        self.needs = Needs(self.nodes)
        own = {holding.uid: self.needs.of(holding.shape) for holding in self.holdings}
        room = Room(*([ticks(getattr(node.total, kind)) for node in self.nodes] for kind in ("cpus", "gpus")))
        where = lay_out(room, [(each, own[each.uid]) for each in self.holdings], self.numbers)
        self.needs.endpoints_hold(_on_nodes(len(self.nodes), (where[each.uid] for each in self.holdings if each.lasting)))
        self.accounts = order.accounts(situation, own)
        self.covers = order.covers(self.holdings, own, self.accounts)
        self.board = Board(room, [where[each.uid] for each in self.holdings if each.stopping])
        self.running = {
            each.uid: _release(each, where[each.uid]) for each in self.holdings if not each.stopping and not each.lasting
        }
        self.started: list[tuple[Queued, Place, bool]] = []
        self.preemptions: list[Preemption] = []
        self.head: Queued | None = None
        self._no_room: dict[bool, set[Need]] = {False: set(), True: set()}
        self._no_claim: set[Need] = set()
        self._no_victims: set[tuple[str, Need, bool, int]] = set()

    def decide(self) -> Plan:
        """Go through the queue once."""
        queue, beside = order.arrange(self.situation, self.needs, self.accounts, self.cluster)
        waiting: list[tuple[Queued, str]] = []
        if self.nodes:
            for queued in queue:
                reason = self._consider(queued)
                if reason is not None:
                    waiting.append((queued, reason))
            if not waiting:
                self._grow()
        else:
            why = explain.CLUSTER if self.situation.nodes is None else explain.NODE
            waiting = [(queued, why) for queued in queue]
            beside = [(job, why) for job, _ in beside]
        return Plan(self._decisions(queue, waiting, beside), self.preemptions)

    def _consider(self, queued: Queued) -> str | None:
        """Start the job (None), or say what it waits for."""
        need, account = queued.need, queued.account
        if account.terms.limit is not None:
            reason = account.beyond_limit(need)
            if reason:
                return reason
        if self._begin(queued):
            return None
        if self._claim(queued) or self._make_room(queued):
            return explain.MAKING_ROOM
        if self.head is not None:
            return explain.TURN
        self.head = queued
        account.promise(need.cpus, need.gpus)
        reason = self._why_no_room(need) if self.explaining else ""
        self.board.reserve(need, self.now, self.running.values())
        return reason

    def _begin(self, queued: Queued) -> bool:
        need, account, job = queued.need, queued.account, queued.job
        short = self.board.ends_in_time(self.now, job.expected_seconds)
        if need in self._no_room[short]:
            return False
        most = account.workers(need, account.limit)
        if queued.covered:
            # More than its quota covers would make the whole of it borrowed, and somebody else's to reclaim.
            most = min(most, account.workers(need, account.quota))
        place = self.board.begin(need, most, short)
        if place is None:
            self._no_room[False].add(need)
            if short or self.head is None:
                self._no_room[True].add(need)
            return False
        self.started.append((queued, place, self.head is not None))
        taken = parts(need, place)
        account.take(sum(part[1] for part in taken), sum(part[2] for part in taken))
        end = math.inf if job.expected_seconds is None else self.now + job.expected_seconds
        self.running[job.uid] = Release(end, self.now, job.uid, taken)
        return True

    def _claim(self, queued: Queued) -> bool:
        """Promise the job room that is being made already."""
        need = queued.need
        if self.board.made is None or need in self._no_claim:
            return False
        taken = self.board.claim(need)
        if taken is None:
            self._no_claim.add(need)
            return False
        queued.account.promise(need.cpus, need.gpus)
        # Nobody knows when it will end.
        self.running[queued.job.uid] = Release(math.inf, self.now, queued.job.uid, taken)
        return True

    def _make_room(self, queued: Queued) -> bool:
        """Ask others to stop for the job, if the rules let it, and promise it their room."""
        job, need = queued.job, queued.need
        key = (job.project, need, queued.covered, job.priority)
        if len(self._no_victims) >= ATTEMPTS or key in self._no_victims or not self._could_preempt(queued):
            return False
        points = order.effective(job.priority, job.since, self.now)
        victims = preempt.choose(queued, points, self.candidates, self.board)
        if not victims:
            self._no_victims.add(key)
            return False
        self.board.free_up(victim.release for victim in victims)
        for victim in victims:
            del self.running[victim.holding.uid]
            self.candidates.remove(victim)
            why = "reclaims its project's quota" if queued.covered and job.project != victim.holding.project else "has priority"
            self.preemptions.append(Preemption(victim.holding.uid, job.uid, f"{job.uid}, which {why}, needs its place"))
        self._no_claim.clear()
        return self._claim(queued)

    def _could_preempt(self, queued: Queued) -> bool:
        return bool(self.candidates) and (queued.covered or queued.job.priority > self._lowest)

    @cached_property
    def candidates(self) -> list[preempt.Candidate]:
        """Whom somebody might ask to stop."""
        return preempt.candidates(self.holdings, self.running, self.covers, self.cluster, self.now)

    @cached_property
    def _lowest(self) -> int:
        return min(each.holding.priority for each in self.candidates)

    def _grow(self) -> None:
        """Nobody waits: elastic jobs that were held to their quotas may borrow after all."""
        for queued, place, _ in self.started:
            need = queued.need
            more = min(need.most, queued.account.workers(need, queued.account.limit)) if queued.covered else 0
            have = sum(workers for _, workers, _ in place)
            if more > have:
                place.extend(self.board.grow(need, more - have))

    def _why_no_room(self, need: Need) -> str:
        room = self.board.open
        fit = Tally(need, room.cpus, room.gpus).room
        return explain.room(need.shape, demand(room.free_cpus, room.free_gpus), demand(*room.largest()), max(fit, 0))

    def _decisions(
        self, queue: Sequence[Queued], waiting: Sequence[tuple[Queued, str]], beside: Sequence[tuple[Waiting, str]]
    ) -> list[Decision]:
        estimated = self._estimates(waiting) if self.explaining and self.nodes else {}
        decisions = [self._started(*start) for start in self.started]
        position = 0
        for queued, reason in waiting:
            position += 1
            uid = queued.job.uid
            decisions.append(Decision(uid, False, position, reason, 0, estimated.get(uid)))
        for job, reason in beside:
            position += 1
            decisions.append(Decision(job.uid, False, position, reason))
        return decisions

    def _started(self, queued: Queued, place: Place, early: bool) -> Decision:
        need = queued.need
        workers = sum(row[1] for row in place)
        total = need.shape.total(workers)
        reason = explain.started(total, workers, need.shape, early)
        spots = tuple(Spot(self.nodes[node].id, count, driver) for node, count, driver in place)
        return Decision(queued.job.uid, True, 0, reason, workers, None, spots)

    def _estimates(self, waiting: Sequence[tuple[Queued, str]]) -> dict[str, float]:
        """Starts of those that wait for room, where they can be told."""
        start = self.board.start
        room_soon = {queued.job.uid: self.now for queued, reason in waiting if reason == explain.MAKING_ROOM}
        if start is None or start == math.inf:
            return room_soon
        rows = [(queued.job, queued.need) for queued, reason in waiting if reason == explain.TURN or queued is self.head]
        return room_soon | forecast.starts(self.now, start, self.board.soon(), self.running.values(), rows)


def _release(holding: Holding, where: Sequence[Part]) -> Release:
    end = math.inf if holding.expected_end is None else holding.expected_end
    return Release(end, holding.started, holding.uid, where)


def _on_nodes(count: int, places: Iterable[Sequence[Part]]) -> list[tuple[int, int]]:
    cpus, gpus = [0] * count, [0] * count
    for place in places:
        for node, part_cpus, part_gpus in place:
            cpus[node] += part_cpus
            gpus[node] += part_gpus
    return list(zip(cpus, gpus, strict=True))
