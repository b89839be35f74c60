"""Placements are what Ray takes, or every fault of them is named."""

from __future__ import annotations

import pytest

from common.placement import selector_of, violations
from luthier.v1.job_pb2 import Placement


def test_types_become_a_condition_on_rays_label() -> None:
    assert selector_of(Placement()) == {}
    assert selector_of(Placement(gpu_types=["H100"])) == {"ray.io/accelerator-type": "H100"}
    both = Placement(gpu_types=["H200", "H100", "H200"], node_labels={"zone": "!eu", "a.b/c": "in(x,y)"})
    assert selector_of(both) == {"a.b/c": "in(x,y)", "ray.io/accelerator-type": "in(H100,H200)", "zone": "!eu"}
    assert list(selector_of(both)) == sorted(selector_of(both))


@pytest.mark.parametrize(
    ("label", "condition"),
    [("zone", "a"), ("zone", "!a"), ("x.y/zone", "in(a,b)"), ("zone", "!in(a)"), ("A-b_c.d", "1.0")],
)
def test_conditions_as_ray_writes_them_are_fine(label: str, condition: str) -> None:
    assert violations(Placement(node_labels={label: condition}), "p") == []


@pytest.mark.parametrize(
    ("label", "condition"),
    [
        ("", "a"),
        ("zone", ""),
        ("zone", "!"),
        ("zone", "in()"),
        ("zone", "in(a,)"),
        ("zone", "a b"),
        ("zone", "in(a"),
        ("zone", "!!a"),
        ("-zone", "a"),
        ("a/b/c", "a"),
        ("zone", "x" * 64),
        ("x" * 64, "a"),
    ],
)
def test_what_is_wrong_is_named(label: str, condition: str) -> None:
    found = violations(Placement(node_labels={label: condition}), "job.placement")
    assert [bad.field for bad in found] == [f"job.placement.node_labels.{label[:80]}"]


def test_types_are_checked_too() -> None:
    bad = violations(Placement(gpu_types=["H 100"], node_labels={"ray.io/accelerator-type": "H100"}), "p")
    assert [each.field for each in bad] == ["p.gpu_types[0]", "p.gpu_types"]
