"""How labels are found in completions."""

import pytest

from agents.evaluation.labels import LabelReader, find_reader, value_span
from common.errors import InvalidArgument

TICKETS = ['{"category": "billing", "urgency": "high"}', '{"category": "login", "urgency": "low"}']


def test_the_key_is_inferred_from_known_labels():
    reader = find_reader(TICKETS, ["", ""], ["billing", "login", "shipping"])
    assert reader == LabelReader("category", ("billing", "login", "shipping"))


def test_the_key_is_inferred_from_the_labels_of_the_rows():
    assert find_reader(TICKETS, ["billing", "login"], []) == LabelReader("category", ("billing", "login"))


def test_two_keys_with_labels_are_not_guessed_between():
    twice = ['{"a": "x", "b": "x"}', '{"a": "y", "b": "y"}']
    assert find_reader(twice, ["", ""], ["x", "y"]) is None
    assert find_reader(twice, ["", ""], ["x", "y"], "b") == LabelReader("b", ("x", "y"))


def test_a_label_column_that_says_otherwise_rules_a_key_out():
    assert find_reader(TICKETS, ["login", "billing"], []) is None


def test_a_given_key_of_another_column_brings_its_own_labels():
    assert find_reader(TICKETS, ["billing", "login"], ["billing", "login"], "urgency") == LabelReader("urgency", ("high", "low"))


def test_a_given_key_that_is_nowhere_is_refused_and_names_those_there_are():
    with pytest.raises(InvalidArgument, match=r"'categry'.*category, urgency") as caught:
        find_reader(TICKETS, ["", ""], [], "categry")
    assert caught.value.violations[0].field == "label_key"
    with pytest.raises(InvalidArgument, match="leave label_key away"):
        find_reader(["billing"], [""], [], "category")


def test_completions_that_are_labels():
    assert find_reader(["spam", " ham\n"], ["spam", "ham"], ["ham", "other", "spam"]) == LabelReader("", ("ham", "other", "spam"))


@pytest.mark.parametrize("completions", [["free text"], ["spam", "free text"], ["{}"], ["[1]"], []])
def test_no_labels(completions):
    assert find_reader(completions, ["spam"] * len(completions), ["spam"]) is None
    assert find_reader(completions, [""] * len(completions), []) is None


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ('{"category": "login", "urgency": "low"}', "login"),
        ('\n{"urgency":"low","category":"login"} ', "login"),
        ('{"category": "Login"}', None),
        ('{"category": ["login"]}', None),
        ('{"category": "login"', None),
        ("login", None),
        ("[" * 100_000, None),
        ("", None),
    ],
)
def test_reading_an_answer(answer, label):
    assert LabelReader("category", ("billing", "login")).read(answer) == label


def test_reading_an_answer_that_is_the_label():
    reader = LabelReader("", ("billing", "login"))
    assert [reader.read(text) for text in (" login\n", "login.", "")] == ["login", None, None]


def test_candidates_replace_the_value_and_count_up_to_its_end():
    reader = LabelReader("b", ("x", 'q"uote', "é"))
    made = reader.candidates('{"a": {"b": "no"}, "b": "x", "c": 1}')
    assert [one.text for one in made] == [
        '{"a": {"b": "no"}, "b": "x", "c": 1}',
        '{"a": {"b": "no"}, "b": "q\\"uote", "c": 1}',
        '{"a": {"b": "no"}, "b": "é", "c": 1}',
    ]
    assert [one.text[: one.end] for one in made] == [
        '{"a": {"b": "no"}, "b": "x"',
        '{"a": {"b": "no"}, "b": "q\\"uote"',
        '{"a": {"b": "no"}, "b": "é"',
    ]


def test_candidates_of_numbers_stay_numbers():
    assert [one.text for one in LabelReader("n", ("1", "2")).candidates('{"n": 1}')] == ['{"n": 1}', '{"n": 2}']
    assert find_reader(['{"n": 1}', '{"n": 2}'], ["1", "2"], []) == LabelReader("n", ("1", "2"))


def test_candidates_of_whole_labels_count_whole():
    assert [(one.text, one.end) for one in LabelReader("", ("ham", "spam")).candidates("ham")] == [("ham", 3), ("spam", 4)]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a"', '{"a":', '{"a": }', '{"a": 1 "b": 2}', "{1: 2}"])
def test_broken_objects_have_no_value(text):
    assert value_span(text, "b") is None
