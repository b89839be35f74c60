"""What the scheduler is held against: strict first come, first served, and plain priority. Neither overtakes, preempts or is
fair.

Both place gangs with the scheduler's own packing, so that only the policy differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from coordinator.scheduling.model import Decision, Plan, Situation, Spot, Waiting
from coordinator.scheduling.needs import Needs
from coordinator.scheduling.packing import lay_out
from coordinator.scheduling.plan import plan

Policy = Callable[[Situation], Plan]


def luthier(situation: Situation) -> Plan:
    """The scheduler itself, without its explanations."""
    return plan(situation, explain=False)


def first_come(situation: Situation) -> Plan:
    """In the order of submission; the first that does not fit holds up all behind it."""
    return _strict(situation, sorted(situation.queue, key=lambda job: (job.since, job.uid)))


def by_priority(situation: Situation) -> Plan:
    """The same, by priority and then in the order of submission."""
    return _strict(situation, sorted(situation.queue, key=lambda job: (-job.priority, job.since, job.uid)))


POLICIES: dict[str, Policy] = {"luthier": luthier, "fifo": first_come, "priority": by_priority}


def _strict(situation: Situation, queue: Iterable[Waiting]) -> Plan:
    nodes = sorted(situation.nodes or (), key=lambda node: node.id)
    needs = Needs(nodes)
    numbers = {node.id: number for number, node in enumerate(nodes)}
    room, _ = lay_out(needs.nodes, [(each, needs.of(each.shape)) for each in situation.holding], numbers)
    decisions = []
    for job in queue:
        need = needs.of(job.shape)
        place = room.place(need, need.least, need.most)
        if place is None:
            break
        spots = tuple(Spot(nodes[node].id, workers, driver) for node, workers, driver in place)
        decisions.append(Decision(job.uid, True, 0, "", sum(spot.workers for spot in spots), None, spots))
    return Plan(decisions)
