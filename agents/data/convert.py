"""From a record to a row in its one form, or a list of what is wrong with it."""

from __future__ import annotations

import re
from typing import Any

from agents.data.readers import Record, kind_of, parse_json
from agents.data.recognise import Mapped
from common.errors import Violation
from common.rows import Message, Row
from luthier.v1 import dataset_pb2

SPLIT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
MAX_TEXT = 16 * 2**20
MAX_LABEL = 256
OPTIONAL_HINT = " (rows need no {0}: leave the column out with --map {0}=)"


class RowProblem(Exception):
    """A row that cannot be used: one violation a column."""

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class _Bad(Exception):
    pass


def to_row(record: Record, mapped: Mapped) -> tuple[Row, str]:
    """Return the row and the split that the file puts it in (empty where it says none). Raises RowProblem."""
    parts: dict[str, Any] = {}
    violations = []
    pairs = mapped.shape == dataset_pb2.ROW_SHAPE_PREFERENCE
    readers = _READERS | {"prompt": _text_or_chat} if pairs else _READERS
    for part, column in mapped.columns.items():
        try:
            parts[part] = readers[part](record.values.get(column))
        except _Bad as problem:
            hint = OPTIONAL_HINT.format(part) if part in mapped.optional else ""
            violations.append(Violation(f"{record.place} column {column}", f"{problem}{hint}"))
    if violations:
        raise RowProblem(violations)
    label, split = parts.get("label", ""), parts.get("split", "")
    if pairs:
        try:
            return _pair(parts.get("prompt", ""), parts["chosen"], parts["rejected"], record.line), split
        except _Bad as problem:
            raise RowProblem([Violation(f"{record.place} column {mapped.columns['rejected']}", str(problem))]) from None
    if mapped.shape == dataset_pb2.ROW_SHAPE_CHAT:
        return Row(messages=parts["messages"], label=label, line=record.line), split
    if mapped.shape == dataset_pb2.ROW_SHAPE_TEXT_LABEL:
        return Row(prompt=parts["text"], completion=label, label=label, line=record.line), split
    if mapped.shape == dataset_pb2.ROW_SHAPE_TEXT:
        return Row(completion=parts["text"], line=record.line), split
    return Row(prompt=parts["prompt"], completion=parts.get("completion", ""), label=label, line=record.line), split


def _pair(prompt: Any, chosen: Any, rejected: Any, line: int) -> Row:
    """A pair from texts, or from chats: with the prompt in a column of its own, or in both of them."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _Bad("is a text where chosen is a chat, or the other way round")
    if isinstance(chosen, str):
        if not isinstance(prompt, str) or not prompt:
            raise _Bad("is a text, so the row needs a prompt that is one; map it with --map prompt=COLUMN")
        if chosen == rejected:
            raise _Bad("is the same as chosen, so there is nothing to prefer")
        return Row(prompt=prompt, completion=chosen, rejected=rejected, line=line)
    if not any(message.role == "user" for message in chosen):
        before = (Message("user", prompt),) if isinstance(prompt, str) and prompt else prompt or ()
        chosen, rejected = (*before, *chosen), (*before, *rejected)
    for name, chat in (("chosen", chosen), ("rejected", rejected)):
        if chat[-1].role != "assistant" or not any(message.role == "user" for message in chat):
            raise _Bad(f"has to be answered: {name} needs a message by the user, and the last one by the assistant")
    if chosen[:-1] != rejected[:-1]:
        raise _Bad("differs from chosen before its last message; pairs are two answers to one prompt")
    if chosen[-1] == rejected[-1]:
        raise _Bad("is the same as chosen, so there is nothing to prefer")
    return Row(messages=chosen, rejected=rejected[-1].content, line=line)


def _text_or_chat(value: Any) -> str | tuple[Message, ...]:
    if isinstance(value, list) and value:
        return tuple(_message(number, item) for number, item in enumerate(value, 1))
    return _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        if value is None:
            raise _Bad("is missing")
        hint = "; write it as a JSON string" if isinstance(value, (dict, list)) else ""
        raise _Bad(f"is {kind_of(value)}, not text{hint}")
    if not value.strip():
        raise _Bad("is empty")
    if len(value) > MAX_TEXT:
        raise _Bad(f"is longer than {MAX_TEXT:,} characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Bad("holds half of a character (a lone surrogate), which is not valid text") from None
    return value


def _label(value: Any) -> str:
    # Class numbers are labels too, and look the same in every format.
    text = _text(("true" if value else "false") if isinstance(value, bool) else str(value) if isinstance(value, int) else value)
    text = text.strip()
    if len(text) > MAX_LABEL:
        raise _Bad(f"is longer than {MAX_LABEL} characters; is the column a label?")
    return text


def _split(value: Any) -> str:
    text = _text(value).strip().lower()
    if not SPLIT_NAME.fullmatch(text):
        raise _Bad(f"{text[:40]!r} is not a name of a split; use train, validation, test, or lower-case letters and digits")
    return text


def _messages(value: Any) -> tuple[Message, ...]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise _Bad(f"is not JSON: {error}") from error
    if not isinstance(value, list) or not value:
        raise _Bad(f"is {kind_of(value) if value != [] else 'empty'}, not a list of messages with role and content")
    messages = tuple(_message(number, item) for number, item in enumerate(value, 1))
    if messages[-1].role != "assistant":
        raise _Bad(f"ends with a message by {messages[-1].role}; the last one has to be by the assistant")
    if not any(message.role == "user" for message in messages[:-1]):
        raise _Bad("has no message by the user before the assistant's")
    if any(message.role == "system" for message in messages[1:]):
        raise _Bad("has a system message that is not the first")
    return messages


def _message(number: int, item: Any) -> Message:
    if not isinstance(item, dict):
        raise _Bad(f"message {number} is {kind_of(item)}, not an object with role and content")
    role = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise _Bad(f"message {number} has the role {str(role)[:40]!r}; use system, user or assistant")
    if any(item.get(key) for key in ("tool_calls", "function_call")):
        raise _Bad(f"message {number} calls a tool, which is not supported; leave such rows out")
    try:
        return Message(ROLES[role.lower()], _text(content))
    except _Bad as problem:
        raise _Bad(f"content of message {number} {problem}") from problem


_READERS = {
    "messages": _messages,
    "prompt": _text,
    "completion": _text,
    "chosen": _text_or_chat,
    "rejected": _text_or_chat,
    "text": _text,
    "label": _label,
    "split": _split,
}
