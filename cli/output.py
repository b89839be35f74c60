"""Answers go to stdout, as a table or as one JSON document; everything said in passing goes to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message
from rich.console import Console, RenderableType

WIDTH_WHEN_PIPED = 160


def message_dict(message: Message) -> dict[str, Any]:
    """A message as JSON has it: its own field names, and fields at their default values too."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


class Output:
    """Where a command writes."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.stderr = Console(stderr=True, highlight=False, soft_wrap=True)
        self._stdout = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH_WHEN_PIPED)

    @property
    def live(self) -> bool:
        """Whether a person sees progress bars move."""
        return self.stderr.is_terminal

    def answer(self, message: Message | dict[str, Any] | list[Any], table: RenderableType | None = None) -> None:
        """Print the one answer of a command: the message as JSON, or its table."""
        if self.as_json or table is None:
            print(json.dumps(message_dict(message) if isinstance(message, Message) else message, indent=2, ensure_ascii=False))
        elif isinstance(table, str):
            print(table)
        else:
            self._stdout.print(table)

    def table(self, table: RenderableType) -> None:
        """Show a table in passing: on stderr where stdout is for one JSON document."""
        (self.stderr if self.as_json else self._stdout).print(table)

    def line(self, message: Message | dict[str, Any], text: str) -> None:
        """Print one item of a stream: one JSON document on a line, or a line of text."""
        if self.as_json:
            content = message_dict(message) if isinstance(message, Message) else message
            text = json.dumps(content, ensure_ascii=False)
        print(text, flush=True)

    def say(self, text: str, style: str = "") -> None:
        """Tell a person something that is not the answer."""
        self.stderr.print(text, style=style or None, markup=False)

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Show that something takes its time."""
        if self.live:
            with self.stderr.status(text):
                yield
        else:
            self.say(text)
            yield
