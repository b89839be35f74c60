"""Scoring, against an engine whose every answer is known."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from agents.evaluation.evaluate import headline, sample, score_rows
from common.errors import InvalidArgument
from common.rows import Message, Row
from luthier.v1 import evaluation_pb2
from serving.engines import Completion, Engine, Request, Score
from serving.engines.base import Lanes

LIMIT = 200


class KnownEngine(Engine):
    """One token a character; each costs 1 nat, but 0.1 where the completion so far is the prompt's own answer."""

    chat_template_sha256 = "t"
    max_length = LIMIT

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers = answers
        self.params = []

    def lanes(self) -> Lanes:
        raise NotImplementedError

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        return "|".join(message["content"] for message in messages)

    def check(self, prompt: str) -> int:
        return len(prompt)

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        self.params += [request.params for request in requests]
        return [Completion(self.answers.get(request.prompt, ""), "stop", 1, 1) for request in requests]

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        if any(len(prompt) + len(completion) > LIMIT for prompt, completion in pairs):
            raise InvalidArgument("too long", "PROMPT_TOO_LONG")
        return [self._score(prompt, completion, len(completion)) for prompt, completion in pairs]

    def score_choices(self, choices: Sequence[tuple[str, Sequence[tuple[str, int]]]]) -> list[list[Score]]:
        return [[self._score(prompt, text, end) for text, end in alternatives] for prompt, alternatives in choices]

    def _score(self, prompt: str, completion: str, end: int) -> Score:
        answer = self.answers.get(prompt, "")
        cost = sum(0.1 if answer[: at + 1] == completion[: at + 1] else 1.0 for at in range(end))
        return Score(-cost, end)


def run(engine, rows, labels=(), **options):
    steps, seen = score_rows(engine, rows, labels, **options), []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            return end.value, seen


def ticket(prompt: str, label: str, line: int = 1) -> Row:
    return Row(prompt=prompt, completion=f'{{"category": "{label}", "urgency": "low"}}', label=label, line=line)


def test_loss_is_the_mean_over_tokens_not_over_rows():
    engine = KnownEngine({"p": "abcd"})
    result, _ = run(engine, [Row(prompt="p", completion="abcd"), Row(prompt="q", completion="ab")], generate=False)
    assert result.target_tokens == 6
    assert result.loss == pytest.approx((4 * 0.1 + 2) / 6)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert not result.HasField("likelihood")
    assert not result.HasField("generated")
    assert not result.examples


def test_tickets_by_likelihood_and_by_generation():
    rows = [ticket("p1", "billing"), ticket("p2", "login"), ticket("p3", "login")]
    engine = KnownEngine({"p1": rows[0].completion, "p2": '{"category": "billing"}', "p3": "I do not know"})
    result, seen = run(engine, rows, ["billing", "login", "other"])
    assert result.generated.accuracy == pytest.approx(1 / 3)
    assert result.generated.unparsed == 1
    assert [list(row.counts) for row in result.generated.confusion] == [[1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    # p3's engine knows no label, so the shortest text is the likeliest: a sum, not a mean, of the tokens' logarithms.
    assert [list(row.counts) for row in result.likelihood.confusion] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert [(example.prompt, example.generated) for example in result.examples][1] == ("p2", '{"category": "billing"}')
    assert (seen[-1].done, seen[-1].total) == (9, 9)
    assert all(params.temperature == 0 for params in engine.params)
    assert max(params.max_tokens for params in engine.params) == len(rows[0].completion) + 8


def test_what_follows_the_label_does_not_count():
    # The reference's urgency gives its category away; were it counted, "billing" would win.
    class Leaky(KnownEngine):
        def _score(self, prompt: str, completion: str, end: int) -> Score:
            seen = completion[:end]
            return Score((0.0 if '"urgency"' in seen and "billing" in seen else -1.0) + (0.5 if "login" in seen else 0.0), end)

    result, _ = run(Leaky({}), [ticket("p", "login")], ["billing", "login"], generate=False)
    assert result.likelihood.accuracy == 1


def test_rows_of_text_and_label():
    rows = [Row(prompt="p1", completion="ham", label="ham"), Row(prompt="p2", completion="spam", label="spam")]
    result, _ = run(KnownEngine({"p1": "ham", "p2": "spam"}), rows, ["ham", "spam"])
    assert (result.generated.accuracy, result.likelihood.accuracy) == (1, 1)
    figures = headline(result, "before_")
    assert figures["before_accuracy"] == 1
    assert figures["before_likelihood_macro_f1"] == 1


def test_without_generation_the_headline_is_of_the_likelihood():
    result, _ = run(KnownEngine({"p": "ham"}), [Row(prompt="p", completion="ham", label="ham")], ["ham", "spam"], generate=False)
    assert headline(result)["accuracy"] == result.likelihood.accuracy == 1
    assert not result.HasField("generated")


def test_chats_without_labels_show_a_few_answers():
    chat = (Message("system", "s"), Message("user", "u"), Message("assistant", "good"))
    result, _ = run(KnownEngine({"s|u": "good"}), [Row(messages=chat)] * 20)
    assert len(result.examples) == 5
    assert (result.examples[0].prompt, result.examples[0].expected, result.examples[0].generated) == ("u", "good", "good")
    assert not result.HasField("generated")
    assert "accuracy" not in headline(result)


def test_rows_that_do_not_fit_are_left_out_and_named():
    rows = [ticket("p", "a", 1), ticket("x" * LIMIT, "a", 17), ticket("q", "b", 3)] * 50
    result, seen = run(KnownEngine({}), rows, ["a", "b"])
    assert result.rows == 100
    [warning] = [step.warning for step in seen if step.warning]
    assert "50 of 150 rows" in warning
    assert "line 17" in warning
    assert seen[-1].done == seen[-1].total
    assert all(step.done <= step.total for step in seen)


def test_no_row_fits():
    with pytest.raises(InvalidArgument, match="none of the 1 rows fits") as caught:
        run(KnownEngine({}), [ticket("x" * LIMIT, "a")], ["a"])
    assert caught.value.reason == "BAD_DATA"


def test_an_empty_split_is_refused():
    with pytest.raises(InvalidArgument, match="no rows"):
        run(KnownEngine({}), [])


def test_a_conversation_that_the_template_refuses_is_named_by_line():
    class Strict(KnownEngine):
        def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
            raise InvalidArgument("roles must alternate")

    with pytest.raises(InvalidArgument, match=r"line 7 .*roles must alternate"):
        run(Strict({}), [ticket("p", "a", 7)], ["a"])


def test_a_sample_is_spread_and_never_more_than_asked():
    rows = [Row(prompt=str(number)) for number in range(10)]
    assert [row.prompt for row in sample(rows, 3)] == ["0", "3", "6"]
    assert sample(rows, 0) == sample(rows, 10) == sample(rows, 99) == rows


def test_an_overflowing_loss_stays_finite():
    class Hopeless(KnownEngine):
        def _score(self, prompt: str, completion: str, end: int) -> Score:
            return Score(-1e9, end)

    result, _ = run(Hopeless({}), [Row(prompt="p", completion="c")], generate=False)
    assert math.isfinite(result.perplexity)
    assert isinstance(result, evaluation_pb2.Evaluation)
