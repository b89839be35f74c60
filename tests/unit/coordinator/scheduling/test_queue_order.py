"""In which order jobs start: priority, age, fair share, quota."""

from __future__ import annotations

import pytest

from coordinator.scheduling.model import Demand, Terms
from coordinator.scheduling.order import AGEING_SECONDS, HALF_LIFE_SECONDS
from coordinator.scheduling.plan import plan
from tests.unit.coordinator.scheduling.situations import DAY, NOW, decided, gang, held, job, nodes, one, situation, started


def order(*queue, **more):
    """The uids in the order of the queue, with a cluster that is full."""
    more.setdefault("holding", [held("full", 4.0)])
    found = plan(situation(list(queue), more.pop("holding"), more.pop("cluster", None), more.pop("terms", ())))
    return [each.uid for each in found.decisions]


def test_priority_goes_before_age():
    queue = [job("old", 2, age=20), job("new", 2, age=10), job("urgent", 2, priority=5)]
    assert started(plan(situation(queue))) == ["urgent", "old"]


def test_within_a_project_age_then_uid_decides():
    assert order(job("b", 1, age=5), job("c", 1, age=9), job("a", 1, age=5)) == ["c", "a", "b"]


def test_the_project_that_holds_less_goes_first():
    holding = [held("x", 3.0, project="rich"), held("y", 1.0, project="poor")]
    assert order(job("r", 1, "rich", age=50), job("p", 1, "poor"), holding=holding) == ["p", "r"]


def test_jobs_ahead_in_the_queue_count_as_held_so_that_projects_take_turns():
    queue = [job(f"{project}{number}", 1, project, age=9 - number) for project in "ab" for number in range(3)]
    assert order(*queue) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_shares_weigh():
    queue = [job(f"{project}{number}", 1, project, age=9 - number) for project in "ab" for number in range(4)]
    found = order(*queue, terms=[Terms("a", share=4.0), Terms("b", share=1.0)])
    assert sorted(found[:5]) == ["a0", "a1", "a2", "a3", "b0"]


def test_the_dominant_resource_counts():
    """One GPU of four is a quarter of the cluster, four CPUs of forty a tenth."""
    holding = [held("x", one(1, 1), project="gpus"), held("y", 4.0, project="cpus"), held("z", 35.0, project="z")]
    queue = [job("g", 1, "gpus", age=5), job("c", 1, "cpus")]
    assert order(*queue, holding=holding, cluster=nodes((40, 4))) == ["c", "g"]


def test_what_was_used_lately_counts_like_what_is_held():
    seconds = HALF_LIFE_SECONDS / 0.6931
    terms = [Terms("used", decayed=Demand(2 * seconds)), Terms("holds")]
    holding = [held("x", 1.0, project="holds"), held("y", 3.0)]
    assert order(job("u", 1, "used", age=5), job("h", 1, "holds"), holding=holding, terms=terms) == ["h", "u"]


def test_waiting_is_worth_a_point_of_priority_for_every_so_many_hours():
    late = job("late", 1, priority=2)
    assert order(job("aged", 1, age=2 * AGEING_SECONDS - 1), late) == ["late", "aged"]
    assert order(job("aged", 1, age=2 * AGEING_SECONDS + 1), late) == ["aged", "late"]


def test_what_a_quota_covers_goes_before_what_would_be_borrowed():
    queue = [job("urgent", 1, "borrower", priority=50), job("owed", 1, "owner", priority=-50)]
    assert order(*queue) == ["urgent", "owed"]
    assert order(*queue, terms=[Terms("owner", quota=Demand(1))]) == ["owed", "urgent"]


def test_a_quota_is_not_used_up_by_small_jobs_behind_a_large_one():
    """Two of the quota's four are held; the large job does not fit into the rest, so the small one behind it is not covered."""
    terms = [Terms("owner", quota=Demand(4))]
    queue = [job("large", 3, "owner", age=9), job("small", 1, "owner"), job("other", 1, "other", priority=1)]
    holding = [held("x", 2.0, project="owner"), held("y", 2.0)]
    assert order(*queue, holding=holding, terms=terms) == ["other", "large", "small"]


def test_a_job_that_its_limit_keeps_back_costs_its_project_no_turn():
    terms = [Terms("a", limit=Demand(9, 1))]
    holding = [held("g", one(0, 1), project="a"), held("f", 8.0), held("b", one(0, 2), project="b")]
    queue = [job("gpu", one(1, 1), "a", age=9), job("cpu", 1, "a"), job("other", 1, "b")]
    assert order(*queue, holding=holding, cluster=nodes((8, 8)), terms=terms) == ["gpu", "cpu", "other"]


@pytest.mark.parametrize("share", [0.0, 1e-12])
def test_a_project_without_a_share_goes_last_but_goes(share):
    terms = [Terms("none", share=share)]
    assert order(job("n", 1, "none", age=9), job("n2", 1, "none", age=8), job("o", 1, "o"), terms=terms) == ["n", "o", "n2"]
    assert started(plan(situation([job("n", 1, "none")], terms=terms))) == ["n"]


def test_jobs_from_the_future_have_no_age():
    assert order(job("future", 1, age=-DAY), job("now", 1)) == ["now", "future"]


def test_positions_count_from_the_next():
    found = decided(plan(situation([job("a", 4, age=2), job("b", 1, age=1), job("c", 3)])))
    assert [found[uid].position for uid in "abc"] == [0, 1, 2]
    assert NOW > 0


def test_an_elastic_gang_is_ranked_by_the_least_it_takes():
    queue = [job("e", gang(4, least=1), "a", age=9), job("e2", 1, "a", age=8), job("o", gang(2), "b", age=7), job("o2", 1, "b")]
    assert order(*queue) == ["e", "o", "e2", "o2"]
