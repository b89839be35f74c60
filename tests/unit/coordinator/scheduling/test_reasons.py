"""What waiting jobs say, and when they say it again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.scheduling.model import Demand, Shape, Terms
from coordinator.scheduling.plan import plan
from tests.unit.coordinator.scheduling.situations import HOUR, NOW, decided, gang, held, job, nodes, one, situation, started


def reason(waiting, holding=(), cluster=None, terms=()):
    return decided(plan(situation([waiting], holding, cluster, terms)))[waiting.uid].reason


@pytest.mark.parametrize(
    ("waiting", "said"),
    [
        (job("j", one(0, 8)), "a node with 8 GPUs; the largest has 2"),
        (job("j", 5), "a node with 5 CPUs; the largest has 4"),
        (job("j", one(4, 2)), "a node with 4 CPUs and 2 GPUs; no node has both"),
        (job("j", gang(9)), "a larger cluster: needs 9 CPUs, the cluster has 7 CPUs and 2 GPUs"),
        (job("j", gang(2, 3.5)), "more nodes: 2 workers of 3.5 CPUs each, the cluster can hold 1"),
        (job("j", one(1), not_before=NOW + HOUR), "its pause after a fault, until 01:00:00 UTC"),
    ],
)
def test_what_waits_beside_the_queue_says_what_would_have_to_change(waiting, said):
    assert reason(waiting, [], nodes((4, 0), (3, 2))) == said


@pytest.mark.parametrize(
    ("waiting", "holding", "cluster", "said"),
    [
        (job("j", 2), [held("x", 3.5)], nodes((4, 0)), "2 CPUs; 0.5 CPUs are free"),
        (job("j", one(2, 1)), [held("x", one(3.5, 2))], nodes((4, 2)), "2 CPUs and 1 GPUs; 0.5 CPUs and 0 GPUs are free"),
        (
            job("j", gang(1, 3)),
            [held("x", 2.0, node="n0"), held("y", 2.0, node="n1")],
            nodes((4, 0), (4, 2)),
            "a node with 3 CPUs free; the most on one node is 2 CPUs",
        ),
        (
            job("j", gang(3, 2)),
            [held("x", 1.0, node="n0")],
            nodes((4, 0), (3, 0)),
            "room on single nodes for 3 workers of 2 CPUs each; there is room for 2",
        ),
        (
            job("j", one(3, 1)),
            [held("x", 1.0, node="n0")],
            nodes((3, 2), (4, 0)),
            "a node with 3 CPUs and 1 GPUs free at once; what is free lies on several nodes",
        ),
    ],
)
def test_the_first_that_waits_for_others_names_what_it_lacks(waiting, holding, cluster, said):
    assert reason(waiting, holding, cluster) == said


def test_limits_and_budgets_are_named():
    holding = [held("x", 3.5, "p")]
    assert (
        reason(job("j", 1), holding, nodes((9, 9)), [Terms("p", limit=Demand(4, 1))])
        == "its project's limit of 4 CPUs; 3.5 are held"
    )
    holding = [held("x", one(1, 2), "p")]
    said = reason(job("j", one(1, 2)), holding, nodes((9, 9)), [Terms("p", limit=Demand(99, 3))])
    assert said == "its project's limit of 3 GPUs; 2 are held"
    said = reason(job("j", 5), [], nodes((9, 9)), [Terms("p", limit=Demand(4))])
    assert said == "a higher limit for its project: needs 5 CPUs, the limit is 4"
    said = reason(job("j", one(1, 1)), [], nodes((9, 9)), [Terms("p", budget_left=Demand(100, 0))])
    assert said == "a new budget for its project: its GPU-seconds are spent"
    said = reason(job("j", one(1)), [], nodes((9, 9)), [Terms("p", budget_left=Demand(-1, 5))])
    assert said == "a new budget for its project: its CPU-seconds are spent"


def test_a_budget_keeps_back_only_what_would_spend_it():
    assert started(plan(situation([job("j", 1)], [], None, [Terms("p", budget_left=Demand(1, 0))]))) == ["j"]
    assert started(plan(situation([job("j", 1)], [], None, [Terms("p", budget_left=Demand(float("inf"), 0))]))) == ["j"]


def test_what_is_promised_of_a_limit_is_told_apart_from_what_is_held():
    queue = [job("head", 3, age=9), job("next", 2)]
    found = decided(plan(situation(queue, [held("x", 1.0, "p"), held("y", 2.0)], None, [Terms("p", limit=Demand(4))])))
    assert found["next"].reason == "its project's limit of 4 CPUs; 1 are held and 3 are promised to jobs ahead of it"


def test_without_a_cluster_everything_waits_for_it():
    queue = [job("a", 1, age=9), job("b", 99), job("c", 1, not_before=NOW + 9)]
    for cluster, said in ((None, "the Ray cluster to answer"), ([], "a node to join the cluster")):
        found = plan(replace(situation(queue), nodes=cluster))
        assert {each.reason for each in found.decisions} == {said}
        assert [each.position for each in found.decisions] == [1, 2, 3]


def test_behind_the_first_it_is_their_turn_they_wait_for():
    found = decided(plan(situation([job("a", 4, age=2), job("b", 1)], [held("x", 2.0)])))
    assert found["b"].reason == "its turn: jobs ahead of it in the queue"


def test_what_starts_says_what_was_free():
    assert reason(job("j", one(2))) == "2 CPUs are free"
    assert reason(job("j", gang(9, driver=1, least=1))) == "4 CPUs are free for 3 of at most 9 workers"


def test_reasons_stay_while_time_passes_and_nothing_else():
    queue = [job("head", 4, age=50), job("next", 1, age=40), job("paused", 1, not_before=NOW + HOUR), job("huge", 99)]
    before = situation(queue, [held("x", 3.0, ends=600), held("y", 1.0)], None, [Terms("p", decayed=Demand(50))])
    later = replace(before, now=NOW + 61, terms={"p": Terms("p", decayed=Demand(49))})
    assert [(each.uid, each.reason) for each in plan(before).decisions] == [
        (each.uid, each.reason) for each in plan(later).decisions
    ]


def test_starts_are_estimated_from_expected_ends_in_the_order_of_the_queue():
    holding = [held("x", 2.0, ends=600), held("y", 2.0, ends=900)]
    queue = [
        job("a", 3, age=9, seconds=100),
        job("b", 2, age=8, seconds=100),
        job("c", 2, age=7, seconds=100),
        job("d", 4, age=6),
    ]
    found = decided(plan(situation([*queue, job("e", 1, age=5)], holding)))
    assert [found[uid].estimated_start for uid in "abcde"] == [NOW + 900, NOW + 1000, NOW + 1000, NOW + 1100, None]


def test_no_start_is_estimated_behind_an_end_that_nobody_knows():
    found = decided(plan(situation([job("a", 3, age=9), job("b", 1)], [held("x", 2.0)])))
    assert [found[uid].estimated_start for uid in "ab"] == [None, None]


def test_who_waits_for_room_in_the_making_may_start_at_any_moment():
    stopping = replace(held("x", 4.0, preemptible=True), stopping=True)
    assert decided(plan(situation([job("a", 3)], [stopping])))["a"].estimated_start == NOW


def test_reasons_can_be_left_out_and_change_nothing():
    queue = [job("a", 4, age=9), job("b", 1, seconds=60), job("c", Shape(Demand(99)))]
    asked_for = situation(queue, [held("x", 3.0, ends=600)])
    short, long = plan(asked_for, explain=False), plan(asked_for)
    assert started(short) == started(long) == ["b"]
    assert [each.uid for each in short.decisions] == [each.uid for each in long.decisions]
    assert decided(short)["a"].reason == ""
