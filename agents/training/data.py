"""Rows to token ids and labels, with the loss on what the model is to say and nothing else.

The chat is rendered by the model's own template and tokenised whole; what is learned begins where its tokens part from those of
the prompt alone, which is what the model is given when it is used. Scoring an answer does the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from common.chat import messages_of
from common.errors import InvalidArgument
from common.rows import Row

IGNORED = -100


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    bos_token: str | None
    eos_token: str | None
    chat_template: str | None

    def apply_chat_template(self, conversation: Sequence[Mapping[str, str]], **kwargs: Any) -> Any:
        """Render a chat."""

    def __call__(self, text: str, **kwargs: Any) -> Any:
        """Tokenise."""


@dataclass(frozen=True)
class Example:
    """One tokenised row, cut to the longest that is wanted. A label is the token's id where it is learned and -100 elsewhere."""

    input_ids: list[int]
    labels: list[int]
    # Before the row was cut.
    whole_length: int
    whole_targets: int

    @property
    def targets(self) -> int:
        """Number of tokens that are learned; the first token has nothing before it to be predicted from."""
        return _targets(self.labels)

    @property
    def cut(self) -> bool:
        """Whether tokens are missing at the end."""
        return len(self.input_ids) < self.whole_length


def tokenise(tokenizer: Tokenizer, row: Row, max_length: int, *, loss_on_all: bool = False) -> Example:
    """Tokenise one row, cut at the end to `max_length` tokens."""
    input_ids, answers = _rendered(tokenizer, row)
    labels = list(input_ids) if loss_on_all else [IGNORED] * len(input_ids)
    for start, end in answers:
        labels[start:end] = input_ids[start:end]
    return Example(input_ids[:max_length], labels[:max_length], len(input_ids), _targets(labels))


def pieces(tokenizer: Tokenizer, row: Row, max_length: int) -> list[Example]:
    """A text without a prompt in pieces of at most `max_length` tokens, of which all are learned. The last ends the text.

    A piece begins with the last token of the one before it, so that no token but the first is left unpredicted.
    """
    ids = list(tokenizer(row.completion)["input_ids"])
    eos = list(tokenizer(tokenizer.eos_token, add_special_tokens=False)["input_ids"]) if tokenizer.eos_token else []
    ids += eos if ids[-len(eos) :] != eos else []
    cut = [ids[start : start + max_length] for start in range(0, max(1, len(ids) - 1), max_length - 1)]
    return [Example(part, list(part), len(part), max(0, len(part) - 1)) for part in cut]


def answered(tokenizer: Tokenizer, row: Row) -> tuple[list[int], int]:
    """The tokens of a whole row, and where its last answer begins."""
    input_ids, answers = _rendered(tokenizer, row)
    return input_ids, answers[-1][0]


def _rendered(tokenizer: Tokenizer, row: Row) -> tuple[list[int], list[tuple[int, int]]]:
    return _with_template(tokenizer, row) if tokenizer.chat_template else _without_template(tokenizer, row)


def _targets(labels: Sequence[int]) -> int:
    return sum(label != IGNORED for label in labels[1:])


def _with_template(tokenizer: Tokenizer, row: Row) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of the rendered chat, and from where to where the assistant speaks, ends of turn included.

    Earlier assistant turns count where the template renders a chat as a continuation of its beginning; where it does not (some
    templates drop earlier reasoning), only the last one does.
    """
    messages = messages_of(row)

    def render(count: int, answer_follows: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=answer_follows))

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    whole = render(len(messages), False)
    ids = encode(whole)
    answers: list[tuple[int, int]] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        last = index + 1 == len(messages)
        prompt, turn = render(index, True) if index else "", whole if last else render(index + 1, False)
        if whole.startswith(turn) and turn.startswith(prompt):
            answers.append((_common(encode(prompt), ids), len(ids) if last else _common(encode(turn), ids)))
        elif last:
            raise InvalidArgument(
                "the base model's chat template does not render an answer as a continuation of its prompt, so what is to be "
                "learned cannot be told apart; use a template whose add_generation_prompt opens the very turn that it renders",
                "BAD_CHAT_TEMPLATE",
            )
    return ids, answers


def _without_template(tokenizer: Tokenizer, row: Row) -> tuple[list[int], list[tuple[int, int]]]:
    """For a base without a chat template: the prompt as it stands, then the answer closed by the end-of-text token."""
    messages = messages_of(row)
    prompt, completion = "".join(message["content"] for message in messages[:-1]), messages[-1]["content"]
    eos = tokenizer.eos_token or ""
    starts_itself = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token or "")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=not starts_itself)["input_ids"])

    ids = encode(prompt + completion + ("" if eos and completion.endswith(eos) else eos))
    return ids, [(_common(encode(prompt), ids), len(ids))]


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with. Tokens may merge across a border, so lengths alone do not tell."""
    return next((index for index, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
