"""Which failed runs are tried again."""

from __future__ import annotations

import pytest

from coordinator.jobs.retry import FAULTS, LONGEST_PAUSE, next_try, smaller_micro_batch
from coordinator.jobs.states import EndReason

NEVER = [
    EndReason.ERROR, EndReason.BAD_DATA, EndReason.USER, EndReason.TIME_LIMIT, EndReason.BUDGET, EndReason.QUOTA,
    EndReason.DEPENDENCY, EndReason.COMPLETED,
]  # fmt: skip


@pytest.mark.parametrize("reason", sorted(FAULTS))
def test_a_fault_of_the_machines_is_tried_again_as_often_as_allowed(reason: EndReason) -> None:
    assert next_try(reason, 0, {}, {}) is not None
    assert next_try(reason, 1, {}, {}) is not None
    assert next_try(reason, 2, {}, {}) is None
    assert next_try(reason, 0, {"max_retries": 0}, {}) is None
    assert next_try(reason, 9, {"max_retries": 10}, {}) is not None


@pytest.mark.parametrize("reason", NEVER)
def test_what_would_fail_again_is_not_tried_again(reason: EndReason) -> None:
    assert next_try(reason, 0, {"max_retries": 10}, {"base": "x"}) is None


def test_pauses_grow_and_are_bounded() -> None:
    pauses = [retry.pause for attempt in range(12) if (retry := next_try(EndReason.NODE_LOST, attempt, {"max_retries": 99}, {}))]
    assert pauses[:3] == [5, 10, 20]
    assert pauses[-1] == LONGEST_PAUSE
    assert pauses == sorted(pauses)


@pytest.mark.parametrize(
    ("given", "smaller"),
    [
        ({}, {"batch_size": 4, "gradient_accumulation": 2}),
        ({"batch_size": 12, "gradient_accumulation": 3}, {"batch_size": 6, "gradient_accumulation": 6}),
        ({"batch_size": 9}, {"batch_size": 3, "gradient_accumulation": 3}),
        ({"batch_size": 1, "gradient_accumulation": 16}, {}),
    ],
)
def test_memory_that_ran_out_means_smaller_portions_of_the_same_batch(given: dict[str, int], smaller: dict[str, int]) -> None:
    assert smaller_micro_batch(given) == smaller
    retry = next_try(EndReason.OUT_OF_MEMORY, 0, {}, {"hyperparameters": given})
    assert (retry.hyperparameters if retry else {}) == smaller


def test_memory_that_ran_out_is_not_tried_again_where_nothing_may_change() -> None:
    assert next_try(EndReason.OUT_OF_MEMORY, 0, {"smaller_micro_batch": False}, {"hyperparameters": {}}) is None
    assert next_try(EndReason.OUT_OF_MEMORY, 0, {}, {}) is None
