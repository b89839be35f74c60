"""Placements mean what they mean to Ray, by Ray's own code."""

from __future__ import annotations

import itertools

import pytest
from ray._private.label_utils import validate_label_selector

from common.placement import violations
from coordinator.scheduling.labels import matches
from luthier.v1.job_pb2 import Placement
from tests.unit.coordinator.scheduling.situations import meets

CONDITIONS = ("a", "!a", "in(a,b)", "!in(a,b)")


@pytest.mark.parametrize(
    ("label", "condition"),
    [
        ("zone", "a"),
        ("zone", "!a"),
        ("x.y/zone", "in(a,b)"),
        ("zone", "!in(a)"),
        ("A-b_c.d", "1.0"),
        ("zone", "a b"),
        ("zone", "in()"),
    ],
)
def test_what_is_taken_here_is_taken_by_ray(label: str, condition: str) -> None:
    assert (violations(Placement(node_labels={label: condition}), "p") == []) is (
        validate_label_selector({label: condition}) is None
    )


@pytest.mark.parametrize(("condition", "value"), list(itertools.product(CONDITIONS, ("a", "b", "c", None))))
def test_conditions_are_matched_as_they_read(condition: str, value: str | None) -> None:
    labels = {} if value is None else {"zone": value}
    assert matches((("zone", condition),), labels) is meets(labels, [("zone", condition)])
