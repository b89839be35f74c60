"""Rows that are cut or left out are told by line with the reason, and a split of which nothing is left is refused."""

from __future__ import annotations

import json

import pytest

from agents.training.data import IGNORED, Example
from agents.training.tokens.report import SplitReport
from common.errors import InvalidArgument

WHOLE = Example([1, 2, 3], [IGNORED, 2, 3], 3, 2)
CUT = Example([1, 2, 3], [IGNORED, IGNORED, 3], 9, 7)
CUT_AWAY = Example([1, 2, 3], [IGNORED] * 3, 9, 2)
# The first token has nothing before it to be predicted from.
NO_ANSWER = Example([1], [1], 1, 0)


def _report(*examples: Example) -> SplitReport:
    report = SplitReport("train", 3)
    for line, example in enumerate(examples, 11):
        report.add(example, line)
    return report


def test_each_row_that_is_not_learned_as_it_stands_is_told_by_line() -> None:
    report = _report(WHOLE, CUT_AWAY, CUT, NO_ANSWER, CUT_AWAY)
    assert report.warnings() == [
        "3 of 5 rows of 'train' are left out, as nothing of them could be learned: line 14 has no answer to learn; "
        "lines 12, 15 have the answer beyond max_length=3",
        "1 of 5 rows of 'train' is cut at max_length=3 tokens: line 13",
    ]
    assert (report.left_out, report.cut.count) == (3, 1)
    report.check()


def test_nothing_is_said_of_rows_that_are_learned_whole() -> None:
    assert _report(WHOLE, WHOLE).warnings() == []


def test_a_split_without_a_row_to_learn_from_is_refused_by_line() -> None:
    with pytest.raises(
        InvalidArgument, match=r"all 2 rows of the split 'train' have nothing left to learn.* line 11 has no answer"
    ) as caught:
        _report(NO_ANSWER, CUT_AWAY).check()
    assert caught.value.reason == "BAD_DATA"
    assert [(each.field, each.description) for each in caught.value.violations] == [
        ("train line 11", "has no answer to learn"),
        ("train line 12", "has the answer beyond max_length=3"),
    ]


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="holds no rows") as caught:
        _report().check()
    assert caught.value.reason == "BAD_DATA"


def test_many_rows_are_counted_all_and_named_up_to_a_limit() -> None:
    report = _report(WHOLE, *[CUT_AWAY] * 100)
    assert report.warnings()[0].startswith("100 of 101 rows")
    assert "29, 30, 31, ..." in report.warnings()[0]


def test_a_report_survives_its_file() -> None:
    report = _report(WHOLE, CUT, NO_ANSWER)
    assert SplitReport.of(json.loads(json.dumps(report.values()))) == report
