"""Which queued jobs may start."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from coordinator.scheduling.model import Demand
from coordinator.scheduling.plan import Waiting, plan

START = datetime(2026, 1, 1, tzinfo=UTC)


def waiting(uid: str, cpus: float, priority: int = 0, minute: int = 0) -> Waiting:
    return Waiting(uid, priority, START + timedelta(minutes=minute), Demand(cpus))


def started(queue: list[Waiting], held: float, capacity: float) -> list[str]:
    return [decision.uid for decision in plan(queue, Demand(held), Demand(capacity)) if decision.start]


def test_priority_goes_before_age() -> None:
    queue = [waiting("old", 2, minute=0), waiting("new", 2, minute=1), waiting("urgent", 2, priority=5, minute=2)]
    assert started(queue, 0, 4) == ["urgent", "old"]


def test_a_job_starts_whole_or_not_at_all() -> None:
    assert started([waiting("gang", 3)], held=2, capacity=4) == []


def test_nothing_overtakes_the_first_that_waits() -> None:
    assert started([waiting("large", 4), waiting("small", 1, minute=1)], held=1, capacity=4) == []


def test_a_job_too_large_for_the_cluster_holds_nobody_up_and_says_so() -> None:
    decisions = {each.uid: each for each in plan([waiting("huge", 9), waiting("small", 1, minute=1)], Demand(), Demand(4))}
    assert decisions["small"].start
    assert decisions["huge"].reason == "a larger cluster: needs 9 CPUs, the cluster has 4 CPUs"


def test_waiting_jobs_say_what_for_and_where_they_stand() -> None:
    first, second = plan([waiting("a", 2), waiting("b", 1, minute=1)], Demand(3), Demand(4))
    assert (first.position, first.reason) == (1, "2 CPUs; 1 CPUs and 0 GPUs are free")
    assert (second.position, second.reason) == (2, "its turn: jobs ahead of it in the queue")


def test_without_a_cluster_everything_waits_for_it() -> None:
    (decision,) = plan([waiting("a", 1)], Demand(), None)
    assert (decision.start, decision.reason) == (False, "the Ray cluster to answer")


jobs = st.lists(st.tuples(st.floats(0.1, 8), st.integers(-100, 100), st.integers(0, 1000)), max_size=30)


@given(jobs, st.floats(0, 8), st.floats(0, 16))
def test_never_more_than_there_is_and_the_same_for_the_same(
    rows: list[tuple[float, int, int]], held: float, capacity: float
) -> None:
    queue = [waiting(f"j{number}", cpus, priority, minute) for number, (cpus, priority, minute) in enumerate(rows)]
    decisions = plan(queue, Demand(held), Demand(capacity))
    taken = sum(job.demand.cpus for job in queue if any(each.start and each.uid == job.uid for each in decisions))
    assert taken == 0 or held + taken <= capacity + 1e-3
    assert decisions == plan(list(reversed(queue)), Demand(held), Demand(capacity))
    assert len({each.uid for each in decisions}) == len(queue)
