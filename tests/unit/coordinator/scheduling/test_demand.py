"""An autoscaler is told of what runs and of what a larger cluster would help, in the order of the queue."""

from __future__ import annotations

from dataclasses import replace

from coordinator.scheduling.demand import bundles
from coordinator.scheduling.model import Demand, Shape, Terms
from coordinator.scheduling.plan import plan
from tests.unit.coordinator.scheduling.situations import NOW, gang, held, job, nodes, one, situation

H100 = (("ray.io/accelerator-type", "H100"),)


def test_who_waits_for_room_or_for_other_nodes_wants_a_larger_cluster_and_nobody_else() -> None:
    terms = [Terms("small", limit=Demand(1, 0)), Terms("poor", budget_left=Demand(0, 0))]
    queue = [
        job("starts", 2, age=90),
        job("no room", 4, age=80),
        job("its turn", 4, age=70),
        job("too large", 64, age=60),
        job("no such node", Shape(Demand(1), selector=H100), age=50),
        job("over its limit", 2, project="small", age=40),
        job("no budget", 1, project="poor", age=30),
        job("in its pause", 1, age=20, not_before=NOW + 60),
    ]
    found = plan(situation(queue, [held("h", 1, ends=600.0)], nodes((4, 0)), terms))
    assert [each.uid for each in found.wanting] == ["no room", "its turn", "too large", "no such node"]


def test_nobody_is_told_of_while_the_cluster_does_not_answer_and_all_while_it_has_no_node() -> None:
    queue = [job("a", 1), job("b", 2)]
    empty = situation(queue, cluster=[])
    assert not plan(replace(empty, nodes=None)).wanting
    assert {each.uid for each in plan(empty).wanting} == {"a", "b"}


def test_gangs_are_told_by_their_parts_and_endpoints_in_pieces() -> None:
    holding = [held("h", gang(2, 1, 1, driver=0.25)), held("e", one(2.5, 1), lasting=True)]
    found = bundles(holding, [job("w", Shape(Demand(0.25), Demand(4, 8), 3, 1, H100))])
    assert dict(found) == {
        (Demand(0.25), ()): 1,
        (Demand(1, 1), ()): 2,
        (Demand(1.0), ()): 2,
        (Demand(0.5), ()): 1,
        (Demand(0.0, 1.0), ()): 1,
        (Demand(0.25), H100): 1,
        (Demand(4, 8), H100): 3,
    }


def test_jobs_are_told_whole_and_no_more_than_so_many() -> None:
    wanting = [job("a", gang(3)), job("b", gang(4)), job("c", gang(1))]
    assert bundles([], wanting, most=7).total() == 7
    assert bundles([], wanting, most=6).total() == 3
