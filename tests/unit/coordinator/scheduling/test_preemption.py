"""Who has to make room for whom."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.scheduling.model import Demand, Terms
from coordinator.scheduling.order import AGEING_SECONDS
from coordinator.scheduling.plan import plan
from tests.unit.coordinator.scheduling.situations import (
    NOW,
    World,
    asked,
    decided,
    gang,
    held,
    job,
    nodes,
    one,
    situation,
    started,
)

OWNER = Terms("owner", quota=Demand(2))


def soft(uid: str, shape: object, project: str = "q", **more: object):
    return held(uid, shape, project, preemptible=True, **more)


def test_a_quota_is_reclaimed_from_those_who_borrow_it():
    found = plan(situation([job("owed", 2, "owner")], [soft("x", 2.0), soft("y", 2.0, age=10)], None, [OWNER]))
    assert started(found) == []
    assert asked(found) == ["y"]
    (preemption,) = found.preemptions
    assert (preemption.for_uid, preemption.reason) == ("owed", "owed, which reclaims its project's quota, needs its place")
    assert decided(found)["owed"].reason == "jobs that are saving their work to make room for it"


def test_reclaiming_asks_nothing_of_priority():
    found = plan(situation([job("owed", 2, "owner", priority=-100)], [soft("x", 4.0, priority=100)], None, [OWNER]))
    assert asked(found) == ["x"]


def test_what_a_quota_covers_is_never_preempted_by_another_project():
    terms = [OWNER, Terms("q", quota=Demand(4))]
    assert asked(plan(situation([job("owed", 2, "owner", priority=100)], [soft("x", 4.0)], None, terms))) == []


def test_a_quota_covers_what_started_first():
    terms = [OWNER, Terms("q", quota=Demand(2))]
    holding = [soft("first", 2.0, age=90, unsaved=0), soft("second", 2.0, age=80, unsaved=1000)]
    assert asked(plan(situation([job("owed", 2, "owner")], holding, None, terms))) == ["second"]


def test_a_job_beyond_its_quota_reclaims_nothing():
    assert asked(plan(situation([job("greedy", 3, "owner")], [soft("x", 4.0)], None, [OWNER]))) == []
    holding = [soft("x", 3.0), held("mine", 1.0, "owner")]
    assert asked(plan(situation([job("greedy", 2, "owner")], holding, None, [OWNER]))) == []


def test_a_higher_priority_preempts_a_lower_one_of_its_own_project():
    assert asked(plan(situation([job("urgent", 2, "q", priority=2)], [soft("x", 4.0)]))) == ["x"]
    assert asked(plan(situation([job("equal", 2, "q")], [soft("x", 4.0)]))) == []


def test_a_higher_priority_preempts_a_lower_one_that_is_borrowed():
    queue = [job("urgent", 2, "r", priority=2)]
    assert asked(plan(situation(queue, [soft("x", 4.0)]))) == ["x"]
    assert asked(plan(situation(queue, [soft("x", 4.0)], None, [Terms("q", quota=Demand(4))]))) == []


def test_age_alone_preempts_nobody():
    holding = [soft("x", 3.0), soft("low", 1.0, priority=-1)]
    assert asked(plan(situation([job("old", 2, "r", age=9 * AGEING_SECONDS)], holding))) == []


def test_nobody_preempts_what_would_be_ahead_of_it_in_the_queue():
    """The victim keeps its age; where that makes up for its priority, it would start again before the other."""
    victim = replace(soft("x", 4.0), since=NOW - 3 * AGEING_SECONDS)
    assert asked(plan(situation([job("urgent", 2, "r", priority=3)], [victim]))) == []
    assert asked(plan(situation([job("urgent", 2, "r", priority=4)], [victim]))) == ["x"]


def test_endpoints_and_what_cannot_be_preempted_stay():
    holding = [held("x", 2.0), held("endpoint", 2.0, lasting=True), replace(soft("odd", 0.0), lasting=True)]
    assert asked(plan(situation([job("owed", 2, "owner", priority=9)], holding, None, [OWNER]))) == []


def test_the_least_lost_work_is_preempted_then_the_youngest():
    holding = [soft("a", 1.0, unsaved=500), soft("b", 1.0, unsaved=20), soft("c", 1.0, unsaved=600), soft("d", 1.0, unsaved=10)]
    assert asked(plan(situation([job("owed", 2, "owner")], holding, None, [OWNER]))) == ["b", "d"]
    holding = [soft("old", 2.0, age=500), soft("young", 2.0, age=20)]
    assert asked(plan(situation([job("owed", 2, "owner")], holding, None, [OWNER]))) == ["young"]


def test_work_is_weighed_by_what_it_held():
    holding = [soft("wide", 3.0, unsaved=100), soft("narrow", 1.0, unsaved=200)]
    assert asked(plan(situation([job("owed", 1, "owner")], holding, None, [OWNER]))) == ["narrow"]


def test_nobody_is_asked_if_the_gang_does_not_fit_then_either():
    holding = [soft("x", 1.0), held("hard", 3.0)]
    assert asked(plan(situation([job("owed", 2, "owner")], holding, None, [OWNER]))) == []
    hard = [held("b", 1.0, node="n0"), held("d", 1.0, node="n1")]
    spread = [soft("a", 1.0, node="n0"), soft("c", 1.0, node="n1"), *hard]
    assert asked(plan(situation([job("owed", one(2), "owner")], spread, nodes((2, 0), (2, 0)), [OWNER]))) == []
    assert asked(plan(situation([job("owed", gang(2), "owner")], spread, nodes((2, 0), (2, 0)), [OWNER]))) == ["a", "c"]


def test_no_more_victims_than_needed():
    holding = [soft("tiny", 0.5, unsaved=1), soft("small", 0.5, unsaved=2), soft("enough", 3.0, unsaved=3)]
    assert asked(plan(situation([job("owed", 2, "owner")], holding, None, [OWNER]))) == ["enough"]


def test_who_is_stopping_is_not_asked_again_and_nobody_else_is():
    holding = [replace(soft("x", 2.0), stopping=True), soft("y", 2.0)]
    found = plan(situation([job("owed", 2, "owner")], holding, None, [OWNER]))
    assert asked(found) == []
    assert decided(found)["owed"].reason == "jobs that are saving their work to make room for it"


def test_room_that_is_being_made_is_kept_for_whom_it_is_made():
    holding = [replace(soft("x", 2.0), stopping=True), held("y", 1.0)]
    queue = [job("owed", 3, "owner", age=9), job("small", 1, "r", priority=50, seconds=1)]
    assert started(plan(situation(queue, holding, None, [Terms("owner", quota=Demand(3))]))) == []


def test_each_victim_makes_room_for_one_job_only():
    holding = [soft("x", 2.0), soft("y", 2.0, age=9)]
    terms = [Terms("owner", quota=Demand(4))]
    queue = [job("a", 2, "owner", age=9), job("b", 2, "owner"), job("c", 2, "owner")]
    found = plan(situation(queue, holding, None, terms))
    assert {each.uid: each.for_uid for each in found.preemptions} == {"y": "a", "x": "b"}


def test_a_job_behind_the_head_preempts_only_where_that_keeps_the_reservation():
    """The head is owed six CPUs of the large node and waits for some of them: it needs the place of x, but not that of y."""
    terms = [Terms("big", quota=Demand(8)), OWNER]
    running = [held("hard", 2.0, ends=600, node="n0"), soft("x", 2.0, node="n0"), soft("y", 2.0, node="n1")]
    queue = [job("head", 6, "big", age=9), job("owed", 2, "owner")]
    assert asked(plan(situation(queue, running[:2], nodes((6, 0)), terms))) == []
    assert asked(plan(situation(queue, running, nodes((6, 0), (2, 0)), terms))) == ["y"]


def test_an_elastic_job_within_its_quota_does_not_swing_between_two_sizes():
    world = World(nodes((8, 0)), [Terms("owner", quota=Demand(4)), Terms("q")])
    world.submit(job("urgent", 6, "q", priority=9))
    world.round()
    world.submit(job("elastic", gang(8, least=3), "owner"))
    for _ in range(20):
        world.round()
    assert world.preempted == [("urgent", "elastic")]
    assert [each.workers for each in world.holding if each.uid == "elastic"] == [4]


contenders = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.integers(1, 4), st.integers(1, 3), st.integers(-1, 2), st.integers(0, 60), st.booleans()
    ),
    min_size=2,
    max_size=8,
)
quotas = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6))


@settings(max_examples=150, deadline=None)
@given(contenders, quotas, st.integers(0, 3))
def test_preemption_comes_to_rest(jobs, quota, rounds):
    """Jobs that come one by one and never end, while time stands still: after the last has come, nobody is preempted by the same
    job twice, no two jobs preempt each other, and in the end all is quiet.
    """
    world = World(
        nodes((4, 0), (4, 0), (2, 0)), [Terms(name, quota=Demand(amount)) for name, amount in zip("abc", quota, strict=True)]
    )
    for number, (project, cpus, workers, priority, hours, elastic) in enumerate(jobs):
        shape = gang(workers, cpus, least=1 if elastic else workers)
        world.submit(job(f"j{number}", shape, project, priority, hours * 3600.0))
        for _ in range(rounds):
            world.round(0.0)
    world.preempted.clear()
    quiet = 0
    while quiet < 3:
        quiet = 0 if world.round(0.0).preemptions else quiet + 1
        assert len(world.preempted) <= 2 * len(jobs), world.preempted
    assert len(set(world.preempted)) == len(world.preempted)
    for victim, winner in world.preempted:
        assert (winner, victim) not in world.preempted
