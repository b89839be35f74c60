"""Which queued jobs may start: a pure function of the queue, what is held, and what the cluster has."""

from __future__ import annotations

from coordinator.scheduling.model import Decision, Demand, Plan, Situation


def plan(situation: Situation) -> Plan:
    """Decide."""
    nodes = situation.nodes
    capacity = sum((node.total for node in nodes), Demand()) if nodes is not None else None
    held = sum((holding.held for holding in situation.holding), Demand())
    free = (capacity - held) if capacity is not None else Demand()
    head_waits = False
    decisions = []
    position = 0
    for job in sorted(situation.queue, key=lambda job: (-job.priority, job.since, job.uid)):
        need = job.shape.total()
        if capacity is None:
            position += 1
            decisions.append(Decision(job.uid, False, position, "the Ray cluster to answer"))
        elif job.not_before > situation.now:
            decisions.append(Decision(job.uid, False, position + 1, "its pause after a fault"))
        elif not need.fits(capacity):
            reason = f"a larger cluster: needs {need}, the cluster has {capacity}"
            decisions.append(Decision(job.uid, False, position + 1, reason))
        elif head_waits:
            position += 1
            decisions.append(Decision(job.uid, False, position, "its turn: jobs ahead of it in the queue"))
        elif need.fits(free):
            free = free - need
            decisions.append(Decision(job.uid, True, 0, f"{need} are free", job.shape.most))
        else:
            head_waits = True
            position += 1
            decisions.append(
                Decision(job.uid, False, position, f"{need}; {max(free.cpus, 0):g} CPUs and {free.gpus:g} GPUs are free")
            )
    return Plan(decisions)
