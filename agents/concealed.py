"""The secrets of a run in its processes: in their environment, and blotted out of whatever they say.

They come with the claim, over gRPC, and go on to the ranks inside what Ray hands from process to process in memory: never in a
Ray job's metadata, a runtime environment, an argument of a process, or a file.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TextIO
from urllib.parse import quote

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

BLOT = "***"
LEAST = 8
"""Characters of a line of a secret that is blotted out by itself, without the lines around it."""

_held: dict[str, str] = {}
_pattern: re.Pattern[str] | None = None


def take(values: Mapping[str, str]) -> None:
    """Put a run's secrets into this process's environment, and blot them out of its output and its reports from now on."""
    global _pattern
    if not values:
        return
    _held.update(values)
    os.environ.update(values)
    words = {form for value in _held.values() for form in _forms(value)}
    # The longest first: of a value and a part of it, the whole goes.
    _pattern = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
    sys.stdout, sys.stderr = _blotted(sys.stdout), _blotted(sys.stderr)


def held() -> dict[str, str]:
    """The secrets that this process has, by variable."""
    return dict(_held)


def blot(text: str) -> str:
    """The text without the values of secrets."""
    return _pattern.sub(BLOT, text) if _pattern is not None else text


def blot_message(message: Message) -> None:
    """Blot the values of secrets out of every text in a message."""
    if _pattern is None:
        return
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            _blot_map(field, value)
        elif field.message_type is not None:
            for each in value if field.is_repeated else (value,):
                blot_message(each)
        elif field.type == FieldDescriptor.TYPE_STRING:
            if field.is_repeated:
                value[:] = [blot(each) for each in value]
            else:
                setattr(message, field.name, blot(value))


def _blot_map(field: FieldDescriptor, value: Any) -> None:
    kind = field.message_type.fields_by_name["value"]
    for key in list(value):
        if kind.message_type is not None:
            blot_message(value[key])
        elif kind.type == FieldDescriptor.TYPE_STRING:
            value[key] = blot(value[key])


def _forms(value: str) -> Iterable[str]:
    """A value as it may turn up in texts: as it is, as Python, JSON and URLs write it, and the longer ones of its lines."""
    yield from (value, repr(value)[1:-1], json.dumps(value)[1:-1], quote(value, safe=""))
    yield from (line for line in (part.strip() for part in value.splitlines()) if len(line) >= LEAST)


def _blotted(stream: TextIO) -> TextIO:
    return stream if isinstance(stream, _Blotted) else _Blotted(stream)  # type: ignore[return-value]


class _Blotted:
    """A stream of text whose writes are blotted. Ray keeps what its processes print in files, and shows it to whoever looks."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text without the values of secrets."""
        self._stream.write(blot(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines, each without the values of secrets."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
