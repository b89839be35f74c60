"""Short ways to say a situation, a checker that trusts nothing the scheduler says, and a small world to run plans in."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coordinator.scheduling.model import Decision, Demand, Holding, Node, Plan, Shape, Situation, Spot, Terms, Waiting
from coordinator.scheduling.plan import plan

NOW = 1_767_225_600.0
HOUR = 3600.0
DAY = 24 * HOUR


def nodes(*totals: tuple[float, float]) -> list[Node]:
    return [Node(f"n{number}", Demand(*total)) for number, total in enumerate(totals)]


def gang(workers: int, cpus: float = 1, gpus: float = 0, driver: float = 0, least: int | None = None) -> Shape:
    return Shape(Demand(driver), Demand(cpus, gpus), workers, workers if least is None else least)


def one(cpus: float, gpus: float = 0) -> Shape:
    return Shape(Demand(cpus, gpus))


def job(
    uid: str,
    shape: Shape | float,
    project: str = "p",
    priority: int = 0,
    age: float = 0.0,
    seconds: float | None = None,
    not_before: float = 0.0,
) -> Waiting:
    """A waiting job; `age` is in seconds."""
    return Waiting(
        uid, project, priority, NOW - age, one(shape) if isinstance(shape, float | int) else shape, seconds, not_before
    )


def held(
    uid: str,
    shape: Shape | float,
    project: str = "q",
    priority: int = 0,
    age: float = HOUR,
    ends: float | None = None,
    unsaved: float = 0.0,
    node: str = "",
    **more: bool,
) -> Holding:
    """Something that holds resources since `age` seconds and for `ends` more, on a node or nobody knows where."""
    shape = one(shape) if isinstance(shape, float | int) else shape
    end = None if ends is None else NOW + ends
    spots = [Spot(node, shape.most, True)] if node else []
    return Holding(uid, project, priority, shape, shape.most, NOW - age, end, unsaved_seconds=unsaved, spots=spots, **more)


def situation(
    queue: Sequence[Waiting],
    holding: Sequence[Holding] = (),
    cluster: Sequence[Node] | None = None,
    terms: Iterable[Terms] = (),
) -> Situation:
    return Situation(NOW, queue, holding, nodes((4, 0)) if cluster is None else cluster, {each.project: each for each in terms})


def decided(found: Plan) -> dict[str, Decision]:
    return {each.uid: each for each in found.decisions}


def started(found: Plan) -> list[str]:
    return [each.uid for each in found.decisions if each.start]


def asked(found: Plan) -> list[str]:
    return sorted(each.uid for each in found.preemptions)


def check(asked_for: Situation, found: Plan) -> None:
    """Whatever the situation, this holds of its plan."""
    queue = {each.uid: each for each in asked_for.queue}
    assert sorted(each.uid for each in found.decisions) == sorted(queue)
    free = {each.id: each.total for each in asked_for.nodes or ()}
    labels_of = {each.id: each.labels for each in asked_for.nodes or ()}
    for holding in asked_for.holding:
        for spot in holding.spots:
            free[spot.node] -= part(holding.shape, spot.workers, spot.driver)
    held_by: dict[str, Demand] = {}
    for holding in asked_for.holding:
        held_by[holding.project] = held_by.get(holding.project, Demand()) + holding.held
    total_held = sum(held_by.values(), Demand())
    positions = []
    for decision in found.decisions:
        waiting = queue[decision.uid]
        if not decision.start:
            assert decision.reason
            assert decision.workers == 0
            positions.append(decision.position)
            continue
        assert decision.position == 0
        assert waiting.not_before <= asked_for.now
        assert waiting.shape.least <= decision.workers <= waiting.shape.most
        assert sum(spot.workers for spot in decision.spots) == decision.workers
        assert sum(spot.driver for spot in decision.spots) == 1
        for spot in decision.spots:
            assert meets(labels_of[spot.node], waiting.shape.selector)
            free[spot.node] -= part(waiting.shape, spot.workers, spot.driver)
        taken = waiting.shape.total(decision.workers)
        total_held += taken
        held_by[waiting.project] = held_by.get(waiting.project, Demand()) + taken
        terms = asked_for.terms.get(waiting.project)
        if terms is not None and terms.limit is not None:
            # A limit that was lowered under what is held keeps back what needs that resource, and nothing else.
            for name in ("cpus", "gpus"):
                within = getattr(held_by[waiting.project], name) <= getattr(terms.limit, name) + 1e-6
                assert within or not getattr(taken, name)
    assert positions == list(range(1, len(positions) + 1))
    if started(found):
        for left in free.values():
            assert left.cpus > -1e-6
            assert left.gpus > -1e-6
        capacity = sum((each.total for each in asked_for.nodes or ()), Demand())
        touched = sum((queue[uid].shape.total(decided(found)[uid].workers) for uid in started(found)), Demand())
        assert total_held.cpus <= capacity.cpus + 1e-6 or not touched.cpus
        assert total_held.gpus <= capacity.gpus + 1e-6 or not touched.gpus
    victims = [each.uid for each in found.preemptions]
    assert len(victims) == len(set(victims))
    by_uid = {each.uid: each for each in asked_for.holding}
    for each in found.preemptions:
        assert by_uid[each.uid].preemptible
        assert not by_uid[each.uid].stopping
        assert not decided(found)[each.for_uid].start


def meets(labels: Mapping[str, str], selector: Iterable[tuple[str, str]]) -> bool:
    """Whether a node has such labels, told without the scheduler's own code."""
    for label, condition in selector:
        values = re.sub(r"^!?(in\()?|\)$", "", condition).split(",")
        if (labels.get(label) in values) == condition.startswith("!"):
            return False
    return True


def part(shape: Shape, workers: int, driver: bool) -> Demand:
    return shape.worker.times(workers) + (shape.driver if driver else Demand())


@dataclass
class World:
    """Runs plans: what starts holds its place for as long as `true_seconds` says, what is preempted stops by the next round."""

    cluster: Sequence[Node]
    terms: Sequence[Terms] = ()
    now: float = NOW
    queue: list[Waiting] = field(default_factory=list)
    holding: list[Holding] = field(default_factory=list)
    true_seconds: dict[str, float] = field(default_factory=dict)
    begun: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)
    waited: dict[str, Waiting] = field(default_factory=dict)
    preempted: list[tuple[str, str]] = field(default_factory=list)
    preemptible: bool = True

    def submit(self, waiting: Waiting, seconds: float | None = None) -> None:
        self.queue.append(waiting)
        self.waited[waiting.uid] = waiting
        if seconds is not None:
            self.true_seconds[waiting.uid] = seconds

    def situation(self) -> Situation:
        return Situation(
            self.now, list(self.queue), list(self.holding), self.cluster, {each.project: each for each in self.terms}
        )

    def round(self, seconds: float = 60.0) -> Plan:
        """Decide once, do what was decided, and let time pass."""
        before = self.situation()
        found = plan(before)
        check(before, found)
        for decision in found.decisions:
            if decision.start:
                waiting = self.waited[decision.uid]
                self.queue.remove(waiting)
                self.begun[decision.uid] = self.now
                self.holding.append(self._hold(waiting, decision))
        self.preempted += [(each.uid, each.for_uid) for each in found.preemptions]
        victims = {each.uid for each in found.preemptions}
        self.holding = [replace(each, stopping=True) if each.uid in victims else each for each in self.holding]
        self.now += seconds
        for each in list(self.holding):
            if each.uid in self.waited and each.stopping:
                self.holding.remove(each)
                self.queue.append(self.waited[each.uid])
            elif self.begun.get(each.uid, self.now) + self.true_seconds.get(each.uid, 1e12) <= self.now:
                self.holding.remove(each)
                self.ended[each.uid] = self.now
        return found

    def _hold(self, waiting: Waiting, decision: Decision) -> Holding:
        end = None if waiting.expected_seconds is None else self.now + waiting.expected_seconds
        return Holding(
            waiting.uid,
            waiting.project,
            waiting.priority,
            waiting.shape,
            decision.workers,
            self.now,
            end,
            preemptible=self.preemptible,
            since=waiting.since,
            spots=decision.spots,
        )


def shuffled(asked_for: Situation, seed: int) -> Situation:
    """The same situation, told in another order."""
    chance = random.Random(seed)
    queue, holding, cluster = list(asked_for.queue), list(asked_for.holding), list(asked_for.nodes or ())
    terms = list(asked_for.terms.items())
    for part in (queue, holding, cluster, terms):
        chance.shuffle(part)
    return replace(asked_for, queue=queue, holding=holding, nodes=None if asked_for.nodes is None else cluster, terms=dict(terms))
