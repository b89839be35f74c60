"""What is learned: exactly the answers with their ends of turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from agents.training.data import IGNORED, tokenise
from common.errors import InvalidArgument
from common.rows import Message, Row


class WordTokenizer:
    """A token is a special token, a word, or any other character. Ids are given as tokens come up."""

    bos_token: str | None = None
    eos_token: str | None = "<|end|>"

    def __init__(self, template: str | None = "plain") -> None:
        self.chat_template = template
        self.tokens: list[str] = []

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **kwargs: Any) -> str:
        turns = list(conversation)
        parts = []
        for index, turn in enumerate(turns):
            content = turn["content"]
            if self.chat_template == "forgetful" and turn["role"] == "assistant" and index + 1 < len(turns):
                content = content.split("</think>")[-1]
            mark = "<|said|>" if self.chat_template == "broken" and turn["role"] == "assistant" else f"<|{turn['role']}|>"
            parts.append(f"{mark}{content}<|end|>")
        return "".join(parts) + ("<|assistant|>" if kwargs["add_generation_prompt"] else "")

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        ids = []
        for token in re.findall(r"<\|\w+\|>|\w+|.", text, re.DOTALL):
            if token not in self.tokens:
                self.tokens.append(token)
            ids.append(self.tokens.index(token))
        return {"input_ids": ids}

    def text(self, ids: Sequence[int]) -> str:
        return "".join(self.tokens[index] for index in ids)


def _learned(tokenizer: WordTokenizer, row: Row, **more: Any) -> str:
    example = tokenise(tokenizer, row, more.pop("max_length", 1000), **more)
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    return tokenizer.text([label for label in example.labels if label != IGNORED])


def _chat(*turns: tuple[str, str]) -> Row:
    return Row(messages=tuple(Message(role, content) for role, content in turns), line=3)


def test_the_answer_and_its_end_of_turn_are_learned_and_nothing_else() -> None:
    tokenizer = WordTokenizer()
    row = Row(prompt="where is my parcel", completion='{"category": "delivery"}', line=1)
    assert _learned(tokenizer, row) == '{"category": "delivery"}<|end|>'
    example = tokenise(tokenizer, row, 1000)
    assert tokenizer.text(example.input_ids) == ('<|user|>where is my parcel<|end|><|assistant|>{"category": "delivery"}<|end|>')


def test_an_answer_that_repeats_the_prompt_is_told_apart() -> None:
    assert _learned(WordTokenizer(), Row(prompt="yes yes", completion="yes yes", line=1)) == "yes yes<|end|>"


def test_every_assistant_turn_of_a_chat_is_learned() -> None:
    row = _chat(("system", "be kind"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert _learned(WordTokenizer(), row) == "b<|end|>d<|end|>"


def test_a_template_that_rewrites_earlier_turns_leaves_the_last_one_to_learn() -> None:
    row = _chat(("user", "a"), ("assistant", "hm</think>b"), ("user", "c"), ("assistant", "hm</think>d"))
    assert _learned(WordTokenizer("forgetful"), row) == "hm</think>d<|end|>"


def test_a_template_whose_answers_do_not_continue_their_prompt_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        tokenise(WordTokenizer("broken"), Row(prompt="a", completion="b"), 100)
    assert caught.value.reason == "BAD_CHAT_TEMPLATE"


def test_loss_on_all_learns_every_token() -> None:
    assert _learned(WordTokenizer(), Row(prompt="a", completion="b"), loss_on_all=True) == "<|user|>a<|end|><|assistant|>b<|end|>"


def test_without_a_template_the_answer_is_closed_by_the_end_of_text() -> None:
    tokenizer = WordTokenizer(None)
    assert _learned(tokenizer, Row(prompt="2+2=", completion="4")) == "4<|end|>"
    assert _learned(tokenizer, Row(prompt="2+2=", completion="4<|end|>")) == "4<|end|>"


def test_long_rows_are_cut_at_the_end() -> None:
    tokenizer = WordTokenizer()
    example = tokenise(tokenizer, Row(prompt="a", completion="b c d e f"), 6)
    assert (len(example.input_ids), example.cut, example.whole_length) == (6, True, 14)
    assert tokenizer.text([label for label in example.labels if label != IGNORED]) == "b "
