"""Scores over labels."""

import pytest

from agents.evaluation.classification import classify


def test_scores_by_hand():
    result = classify(["a", "a", "b", "b"], ["a", "b", "b", None], ["a", "b", "never"])
    assert result.accuracy == 0.5
    assert result.macro_precision == pytest.approx((1 + 0.5) / 2)
    assert result.macro_recall == pytest.approx((0.5 + 0.5) / 2)
    assert result.macro_f1 == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert result.unparsed == 1
    assert list(result.labels) == ["a", "b", "never"]
    assert [list(row.counts) for row in result.confusion] == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]


def test_a_label_that_was_wrongly_predicted_counts_in_the_means():
    result = classify(["a", "a"], ["a", "b"], ["a", "b"])
    assert result.macro_recall == pytest.approx((0.5 + 0) / 2)


def test_nothing_parsed():
    result = classify(["a", "b"], [None, None], ["a", "b"])
    assert (result.accuracy, result.macro_f1, result.unparsed) == (0, 0, 2)
