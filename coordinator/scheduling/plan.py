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

import gc
import math
from collections.abc import Iterable, Sequence
from functools import cached_property

from coordinator.scheduling import explain, forecast, order, preempt
from coordinator.scheduling.board import Board, Release
from coordinator.scheduling.model import Decision, Holding, Plan, Preemption, Situation, Spot, Waiting
from coordinator.scheduling.needs import Need, Needs, demand
from coordinator.scheduling.order import Queued, Row
from coordinator.scheduling.packing import Part, Place, Tally, lay_out

ATTEMPTS = 12
"""So many jobs a round may look for victims in vain. Bounds the time of a round; those ahead in the queue look first."""


def plan(situation: Situation, *, explain: bool = True) -> Plan:
    """Decide for every queued job. The same situation gives the same plan, whatever the order of its parts.

    Without `explain` the reasons of waiting jobs are empty and no start is estimated; what starts and who is preempted is the
    same.
    """
    # A round makes hundreds of thousands of values and no cycles: looking for some took up to a third of its time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return Round(situation, explain).decide()
    finally:
        if collecting:
            gc.enable()


class Round:
    """One round of decisions. Made for one call of `plan`."""

    def __init__(self, situation: Situation, explaining: bool = True) -> None:
        self.situation = situation
        self.explaining = explaining
        self.now = situation.now
        self.nodes = sorted(situation.nodes or (), key=lambda node: node.id)
        self.numbers = {node.id: number for number, node in enumerate(self.nodes)}
        self.holdings = sorted(situation.holding, key=lambda holding: holding.uid)
        self.needs = Needs(self.nodes)
        self.cluster = (sum(node[0] for node in self.needs.nodes), sum(node[1] for node in self.needs.nodes))
        own = {holding.uid: self.needs.of(holding.shape) for holding in self.holdings}
        room, where = lay_out(self.needs.nodes, [(each, own[each.uid]) for each in self.holdings], self.numbers)
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
        self._attempts_left = ATTEMPTS
        # Shapes for which there is no room, nor will be soon: for good in this round, or for jobs that take too long to overtake.
        self._turn: set[Need] = set()
        self._turn_if_long: set[Need] = set()

    def decide(self) -> Plan:
        """Go through the queue once."""
        rows, beside = order.arrange(self.situation, self.needs, self.accounts, self.cluster)
        if self.nodes:
            waiting = self._go_through(rows)
            if not waiting:
                self._grow()
        else:
            why = explain.CLUSTER if self.situation.nodes is None else explain.NODE
            waiting = [(row, why) for row in rows]
            beside = [(job, why) for job, _ in beside]
        return Plan(self._decisions(waiting, beside), self.preemptions, self._wanting(waiting, beside))

    def _go_through(self, rows: Sequence[Row]) -> list[tuple[Row, str]]:
        """Start what may start, and say of the others what they wait for. Most are told by what is known of their shape."""
        waiting: list[tuple[Row, str]] = []
        turn, turn_if_long, horizon = self._turn, self._turn_if_long, self.board.horizon
        for row in rows:
            beyond, _, _, _, _, job, need, account = row
            if need.cpus > account.room_cpus or need.gpus > account.room_gpus:
                waiting.append((row, account.beyond_limit(need)))
            elif (need in turn or (need in turn_if_long and (job.expected_seconds or math.inf) > horizon)) and (
                (beyond and job.priority <= self._lowest) or self._attempts_left == 0
            ):
                waiting.append((row, explain.TURN))
            else:
                reason = self._consider(Queued(job, need, account, not beyond))
                if reason is not None:
                    waiting.append((row, reason))
                horizon = self.board.horizon
        return waiting

    def _consider(self, queued: Queued) -> str | None:
        """Start the job (None), or say what it waits for."""
        need = queued.need
        if self._begin(queued):
            return None
        if self._claim(queued) or self._make_room(queued):
            return explain.MAKING_ROOM
        if self.head is not None:
            (self._turn if need in self._no_room[True] else self._turn_if_long).add(need)
            return explain.TURN
        self.head = queued
        queued.account.promise(need.cpus, need.gpus)
        reason = self._why_no_room(need) if self.explaining else ""
        self.board.reserve(need, self.now, self.running.values())
        return reason

    def _begin(self, queued: Queued) -> bool:
        need, account, job = queued.need, queued.account, queued.job
        short = (job.expected_seconds or math.inf) <= self.board.horizon
        if need in self._no_room[short]:
            return False
        most = account.workers(need, account.limit)
        if queued.covered:
            # More than its quota covers would make the whole of it borrowed, and somebody else's to reclaim.
            most = min(most, account.workers(need, account.quota))
        begun = self.board.begin(need, most, short)
        if begun is None:
            self._no_room[False].add(need)
            if short or self.head is None:
                self._no_room[True].add(need)
            return False
        place, taken = begun
        self.started.append((queued, place, self.head is not None))
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
        if not self._attempts_left or key in self._no_victims or not (queued.covered or job.priority > self._lowest):
            return False
        points = order.effective(job.priority, job.since, self.now)
        victims = preempt.choose(queued, points, self.candidates, self.board)
        if not victims:
            self._no_victims.add(key)
            self._attempts_left -= 1
            return False
        self.board.free_up(victim.release for victim in victims)
        for victim in victims:
            del self.running[victim.holding.uid]
            self.candidates.remove(victim)
            why = "reclaims its project's quota" if queued.covered and job.project != victim.holding.project else "has priority"
            self.preemptions.append(Preemption(victim.holding.uid, job.uid, f"{job.uid}, which {why}, needs its place"))
        for told in (self._no_claim, self._turn, self._turn_if_long):
            told.clear()
        return self._claim(queued)

    @cached_property
    def candidates(self) -> list[preempt.Candidate]:
        """Whom somebody might ask to stop."""
        return preempt.candidates(self.holdings, self.running, self.covers, self.cluster, self.now)

    @cached_property
    def _lowest(self) -> float:
        """The lowest priority among them: nobody of as low a one needs to look, unless a quota covers it."""
        return min((each.holding.priority for each in self.candidates), default=math.inf)

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
        shelf = room.of(need)
        return explain.room(need.shape, demand(shelf.free_cpus, shelf.free_gpus), demand(*room.largest(need)), max(fit, 0))

    def _decisions(self, waiting: Sequence[tuple[Row, str]], beside: Sequence[tuple[Waiting, str]]) -> list[Decision]:
        decisions = [self._started(*start) for start in self.started]
        estimated = self._estimates(waiting) if self.explaining and self.nodes else {}
        decisions.extend(
            Decision(row[4], False, position, reason, 0, estimated.get(row[4]))
            for position, (row, reason) in enumerate(waiting, 1)
        )
        decisions.extend(
            Decision(job.uid, False, position, reason) for position, (job, reason) in enumerate(beside, len(waiting) + 1)
        )
        return decisions

    def _wanting(self, waiting: Sequence[tuple[Row, str]], beside: Sequence[tuple[Waiting, str]]) -> list[Waiting]:
        """Whom a larger cluster would help."""
        if self.situation.nodes is None:
            return []
        room = [row[5] for row, _ in waiting if row[6].cpus <= row[7].room_cpus and row[6].gpus <= row[7].room_gpus]
        return room + [job for job, reason in beside if reason and reason == self.needs.asked(job.shape).never]

    def _started(self, queued: Queued, place: Place, early: bool) -> Decision:
        need = queued.need
        workers = sum(row[1] for row in place)
        total = need.shape.total(workers)
        reason = explain.started(total, workers, need.shape, early)
        spots = tuple(Spot(self.nodes[node].id, count, driver) for node, count, driver in place)
        return Decision(queued.job.uid, True, 0, reason, workers, None, spots)

    def _estimates(self, waiting: Sequence[tuple[Row, str]]) -> dict[str, float]:
        """Starts of those that wait for room, where they can be told."""
        soon = {row[4]: self.now for row, reason in waiting if reason is explain.MAKING_ROOM}
        start = self.board.start
        if start is None or start == math.inf or self.head is None:
            return soon
        foreseen = [(self.head.job, self.head.need)]
        for row, reason in waiting:
            if reason is explain.TURN:
                foreseen.append((row[5], row[6]))
                if len(foreseen) == forecast.FORESEEN:
                    break
        return soon | forecast.starts(self.now, start, self.board.soon(), self.running.values(), foreseen)


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
