"""Where the label of a row stands in its completion, and how to read one out of an answer. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.errors import InvalidArgument, Violation

_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"


@dataclass(frozen=True)
class Candidate:
    """A completion with one label put in place of the true one.

    Only the tokens that begin before character `end` of `text` are compared: what follows a label must not help to guess it.
    """

    text: str
    end: int


@dataclass(frozen=True)
class LabelReader:
    """How completions carry their label: under `key` of a JSON object, or, where `key` is empty, as the whole text."""

    key: str
    labels: tuple[str, ...]

    def read(self, text: str) -> str | None:
        """Return the known label that an answer holds, or None."""
        value = _value_at(text, self.key) if self.key else text.strip()
        return value if value in self.labels else None

    def candidates(self, completion: str) -> list[Candidate]:
        """Return the completion once for each known label, in the order of the labels.

        With a key, what stands before its value and after it is kept as it is, so that every label is judged in the place and
        the writing that the model was taught; it should therefore be the first key of the object.
        """
        if not self.key:
            return [Candidate(label, len(label)) for label in self.labels]
        span = value_span(completion, self.key)
        if span is None:
            raise ValueError(f"the completion has no value under {self.key!r}")
        start, end = span
        found = completion[start:end]
        made = []
        for label in self.labels:
            value = json.dumps(label, ensure_ascii="\\u" in found) if found.startswith('"') else label
            made.append(Candidate(completion[:start] + value + completion[end:], start + len(value)))
        return made


def find_reader(
    completions: Sequence[str], row_labels: Sequence[str], known: Sequence[str], label_key: str = ""
) -> LabelReader | None:
    """Find out how the completions carry their labels; None where they carry none that can be read.

    `label_key` decides where it is given. Else every completion may be a label by itself, or a JSON object with exactly one key
    whose values are known labels (and each row's own, where the row names one).

    Raises InvalidArgument where no completion has a value under `label_key`.
    """
    if label_key:
        found = {value for text in completions if (value := _value_at(text, label_key)) is not None}
        if not found:
            raise InvalidArgument.of([Violation("label_key", _no_such_key(label_key, completions))], "BAD_DATA")
        return _reader(label_key, found, known)
    labels = {label for label in row_labels if label} | set(known)
    if not labels or not completions:
        return None
    if all(text.strip() in labels for text in completions):
        return _reader("", {text.strip() for text in completions}, known)
    objects = [entry for text in completions if (entry := _object(text))]
    if len(objects) < len(completions):
        return None
    keys = [key for key in objects[0] if _holds_labels(key, objects, row_labels, labels)]
    return _reader(keys[0], {str(_text(entry[keys[0]])) for entry in objects}, known) if len(keys) == 1 else None


def value_span(text: str, key: str) -> tuple[int, int] | None:
    """Return where the value of a top-level `key` stands in the JSON object `text`, as (start, end) in characters."""
    position = _skip(text, 0)
    if not text.startswith("{", position):
        return None
    position += 1
    try:
        while True:
            name, position = _DECODER.raw_decode(text, _skip(text, position))
            position = _skip(text, position)
            if not isinstance(name, str) or not text.startswith(":", position):
                return None
            start = _skip(text, position + 1)
            _, end = _DECODER.raw_decode(text, start)
            if name == key:
                return start, end
            position = _skip(text, end)
            if not text.startswith(",", position):
                return None
            position += 1
    except (ValueError, RecursionError):
        return None


def _reader(key: str, found: set[str], known: Sequence[str]) -> LabelReader:
    # Known labels may be of another column than the one that is read; then only what was read counts.
    labels = found | set(known) if found & set(known) else found
    return LabelReader(key, tuple(sorted(labels)))


def _holds_labels(key: str, objects: Sequence[dict[str, Any]], row_labels: Sequence[str], labels: set[str]) -> bool:
    for entry, own in zip(objects, row_labels, strict=True):
        value = _text(entry.get(key))
        if value not in labels or (own and own != value):
            return False
    return True


def _no_such_key(key: str, completions: Sequence[str]) -> str:
    keys = sorted({name for text in completions[:1000] for name in _object(text) or ()})
    if not keys:
        return f"the completions are no JSON objects, so there is no key {key!r} in them; leave label_key away"
    return f"no completion has a value under {key!r}; the keys there are {', '.join(keys[:20])}"


def _object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _value_at(text: str, key: str) -> str | None:
    entry = _object(text)
    return None if entry is None or key not in entry else _text(entry[key])


def _text(value: Any) -> str | None:
    """Write a scalar as it would stand in a label column; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return None


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position
