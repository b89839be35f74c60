"""The simulator of the benchmarks: what it counts can be trusted."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.policies import POLICIES, luthier
from benchmarks.simulate import summary
from benchmarks.simulation import Outcome, Simulation, jain
from benchmarks.workload import HOUR, START, Month, make
from coordinator.scheduling.model import Demand, Plan, Situation

MONTH = make(nodes=20, jobs=300, days=2.0, projects=8, load=1.2, seed=3)


def watched(month: Month, name: str, period: float = 300.0) -> Outcome:
    """Run it, and look at every node after every round."""

    def policy(situation: Situation) -> Plan:
        found = POLICIES[name](situation)
        free = {node.id: node.total for node in situation.nodes or ()}
        shapes = {job.uid: job.shape for job in situation.queue}
        lies = [(each.shape, spot) for each in situation.holding for spot in each.spots]
        lies += [(shapes[each.uid], spot) for each in found.decisions if each.start for spot in each.spots]
        for shape, spot in lies:
            free[spot.node] -= shape.worker.times(spot.workers) + (shape.driver if spot.driver else Demand())
        assert min(min(left.cpus, left.gpus) for left in free.values()) >= 0
        return found

    return Simulation(month, policy, period).run()


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {name: watched(MONTH, name) for name in POLICIES}


def test_all_jobs_end_once_and_none_before_its_time(outcomes):
    for outcome in outcomes.values():
        assert len(outcome.records) == 300
        for record in outcome.records.values():
            assert record.first_start is not None
            assert record.first_start >= record.job.waiting.since - START
            assert record.end is not None
            assert record.end - record.first_start >= record.job.seconds - 1e-6


def test_the_time_that_was_held_is_the_work_that_was_done(outcomes):
    """Without preemption every policy holds as many GPU-seconds as the jobs take, drivers and elastic jobs included."""
    work = sum(record.job.seconds * record.job.waiting.shape.total().gpus for record in outcomes["fifo"].records.values())
    assert sum(outcomes["fifo"].gpu_seconds.values()) == pytest.approx(work, rel=0.02)
    held = sum(outcomes["luthier"].gpu_seconds.values())
    lost = sum(record.lost_gpu_seconds for record in outcomes["luthier"].records.values())
    assert held - lost == pytest.approx(work, rel=0.02)


def test_the_scheduler_keeps_the_cluster_at_least_as_busy_as_fifo(outcomes):
    figures = {name: summary(MONTH, outcome) for name, outcome in outcomes.items()}
    assert figures["luthier"]["utilisation"] >= figures["fifo"]["utilisation"]
    assert figures["luthier"]["waiting_hours"]["all"]["mean"] < figures["fifo"]["waiting_hours"]["all"]["mean"]
    assert figures["fifo"]["preemptions"] == figures["priority"]["preemptions"] == 0


def test_fifo_starts_in_the_order_of_submission(outcomes):
    starts = [record.first_start for record in outcomes["fifo"].records.values()]
    assert starts == sorted(starts)


def test_the_same_seed_gives_the_same_month_and_the_same_outcome():
    again = make(nodes=20, jobs=300, days=2.0, projects=8, load=1.2, seed=3)
    assert again == MONTH
    assert make(nodes=20, jobs=300, days=2.0, projects=8, load=1.2, seed=4) != MONTH
    short = replace(MONTH, jobs=MONTH.jobs[:60])
    assert Simulation(short, luthier).run().records == Simulation(short, luthier).run().records


def test_a_month_has_days_and_nights_and_many_small_jobs():
    month = make(nodes=20, jobs=4000, days=14.0, seed=1)
    hours = [(job.waiting.since - START) / HOUR % 24 for job in month.jobs]
    assert sum(10 <= hour < 18 for hour in hours) > 2 * sum(hour < 8 for hour in hours)
    small = [job for job in month.jobs if job.waiting.shape.total().gpus <= 8]
    assert len(small) > 0.7 * len(month.jobs)
    assert all(job.waiting.expected_seconds is None or job.waiting.expected_seconds >= job.seconds for job in month.jobs)


def test_jain_s_index():
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([0.0]) is None
