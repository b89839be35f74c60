"""Calls of tools as models write them, and as OpenAI's API has them.

Two ways are known, and told by the chat template. Hermes (Nous Research; Qwen too) puts each call, a JSON object of `name` and
`arguments`, between <tool_call> and </tool_call>. Llama 3.1 and later answer with nothing but a JSON object of `name` and
`parameters`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Style = Literal["hermes", "llama", ""]

WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written: as most models have seen it, and without room for white space that never ends."""

_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """A call: the tool's name, and its arguments as JSON."""

    name: str
    arguments: str


def style_of(template: str) -> Style:
    """How a model with this chat template writes calls; empty where nobody knows."""
    if "<tool_call>" in template:
        return "hermes"
    return "llama" if re.search(r'"parameters"|\bparameters\b', template) and re.search(r"\btools\b", template) else ""


def parse(text: str, style: str, names: Sequence[str]) -> tuple[str, list[ToolCall]]:
    """Split an answer into what it says and the calls in it. What is no call of one of these tools stays text."""
    if style == "hermes":
        calls = [_call(match[1], "arguments", names) for match in _HERMES.finditer(text)]
        if calls and all(call is not None for call in calls):
            return _HERMES.sub("", text).strip(), [call for call in calls if call is not None]
    elif style == "llama":
        body = text.strip().removeprefix("<|python_tag|>").strip()
        call = _call(body, "parameters", names)
        if call is not None:
            return "", [call]
    return text, []


def opens(text: str, style: str) -> bool:
    """Whether a text that is still coming may turn out to be, or to hold, a call: it is held back until that is known."""
    stripped = text.lstrip()
    if style == "llama":
        return not stripped or stripped[0] == "{" or "<|python_tag|>".startswith(stripped[:14])
    mark = "<tool_call>"
    return mark in text or any(text.endswith(mark[:length]) for length in range(1, len(mark)))


def grammar(tools: Sequence[Mapping[str, Any]], style: str, name: str = "") -> str:
    """A grammar of one call, of the tool `name` if that is given. Empty where the style is not known."""
    if not style:
        return ""
    key = "arguments" if style == "hermes" else "parameters"
    calls = []
    for tool in tools:
        function = tool["function"]
        if not name or function["name"] == name:
            calls.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": function["name"]}, key: function.get("parameters") or {"type": "object"}},
                    "required": ["name", key],
                    "additionalProperties": False,
                }
            )
    schema = json.dumps({"anyOf": calls, "x-guidance": WRITTEN})
    if style == "hermes":
        return f'start: "<tool_call>\\n" call "\\n</tool_call>"\ncall: %json {schema}\n'
    return f"start: call\ncall: %json {schema}\n"


def _call(text: str, key: str, names: Sequence[str]) -> ToolCall | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found.get("name") not in names or not isinstance(found.get(key, {}), dict):
        return None
    return ToolCall(found["name"], json.dumps(found.get(key, {}), ensure_ascii=False))
