"""A job lies on nodes with the labels that it asks for, and says so while it waits for them."""

from __future__ import annotations

import pytest

from coordinator.scheduling.labels import Selector
from coordinator.scheduling.model import Demand, Node, Shape
from coordinator.scheduling.plan import plan
from tests.unit.coordinator.scheduling.situations import asked, check, decided, gang, held, job, situation, started

H100 = (("ray.io/accelerator-type", "H100"),)


def node(name: str, cpus: float, gpus: float = 0, **labels: str) -> Node:
    return Node(name, Demand(cpus, gpus), {label.replace("__", "/"): value for label, value in labels.items()})


def of(shape: Shape, selector: Selector) -> Shape:
    return Shape(shape.driver, shape.worker, shape.most, shape.least, selector)


MIXED = [
    node("old", 16, 8, **{"ray.io/accelerator-type": "A100"}),
    node("new", 8, 4, **{"ray.io/accelerator-type": "H100"}),
    node("plain", 32),
]


def test_the_nodes_asked_for_are_taken_although_others_fit_better() -> None:
    asked_for = situation([job("w", of(gang(2, 1, 1), H100))], cluster=MIXED)
    found = plan(asked_for)
    check(asked_for, found)
    assert {spot.node for spot in decided(found)["w"].spots} == {"new"}


def test_what_waits_for_such_nodes_says_so_and_others_pass() -> None:
    waiting = [job("w", of(gang(4, 1, 1), H100), age=9), job("x", gang(2, 1, 1))]
    asked_for = situation(waiting, [held("h", of(gang(3, 1, 1), H100), node="new", ends=600.0)], cluster=MIXED)
    found = plan(asked_for)
    check(asked_for, found)
    assert started(found) == ["x"]
    reason = decided(found)["w"].reason
    assert reason == "4 CPUs and 4 GPUs; 5 CPUs and 1 GPUs are free on nodes with accelerator-type H100"
    assert decided(found)["w"].estimated_start == asked_for.now + 600


@pytest.mark.parametrize(
    ("selector", "reason"),
    [
        ((("ray.io/accelerator-type", "B200"),), "a node with accelerator-type B200; nodes have A100 (1), H100 (1), none (1)"),
        (
            (("ray.io/accelerator-type", "!in(A100,H100)"), ("zone", "a")),
            "a node with zone a; nodes have none (3)",
        ),
        (H100, "a node with 8 GPUs; the largest with accelerator-type H100 has 4"),
    ],
)
def test_what_no_node_has_is_named_with_what_there_is(selector: Selector, reason: str) -> None:
    found = plan(situation([job("w", of(gang(1, 1, 8), selector))], cluster=MIXED))
    assert decided(found)["w"].reason == reason


def test_only_those_are_preempted_who_lie_where_it_helps() -> None:
    waiting = [job("w", of(gang(4, 1, 1), H100), priority=50)]
    holding = [
        held("elsewhere", gang(8, 1, 1), node="old", preemptible=True),
        held("there", gang(4, 1, 1), node="new", preemptible=True, unsaved=1e6),
    ]
    assert asked(plan(situation(waiting, holding, cluster=MIXED))) == ["there"]
