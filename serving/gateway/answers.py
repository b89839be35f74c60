"""The shape of answers: chat completions, text completions, and their streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.engines.base import Completion


def usage(completions: Sequence[Completion]) -> dict[str, int]:
    """Return the token counts of an answer."""
    prompt = sum(completion.prompt_tokens for completion in completions)
    generated = sum(completion.completion_tokens for completion in completions)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def sse(data: dict[str, Any] | str) -> bytes:
    """Return one server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


@dataclass(frozen=True)
class Answer:
    """One answer on its way; subclasses know the shape. `fingerprint` names the application that answers."""

    model: str
    fingerprint: str
    include_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    PREFIX = ""
    KIND = ""
    CHUNK_KIND = ""

    @property
    def whole_id(self) -> str:
        """The id that the client is told."""
        return f"{self.PREFIX}-{self.id}"

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the answer in one piece."""
        choices = [self._choice(index, completion) for index, completion in enumerate(completions)]
        return {**self._head(self.KIND), "choices": choices, "usage": usage(completions)}

    def opening(self) -> list[dict[str, Any]]:
        """Return the chunks before the first text."""
        return []

    def text(self, text: str) -> dict[str, Any]:
        """Return the chunk for a piece of text."""
        return self._chunk([self._delta(text, None)])

    def closing(self, completion: Completion) -> list[dict[str, Any]]:
        """Return the chunks after the last text."""
        chunks = [self._chunk([self._delta("", completion.finish_reason)])]
        if self.include_usage:
            chunks.append({**self._head(self.CHUNK_KIND), "choices": [], "usage": usage([completion])})
        return chunks

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.whole_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head(self.CHUNK_KIND), "choices": choices}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        raise NotImplementedError


class ChatAnswer(Answer):
    """An answer to a conversation."""

    PREFIX = "chatcmpl"
    KIND = "chat.completion"
    CHUNK_KIND = "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        """Return the chunk that says who speaks."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": None, "finish_reason": completion.finish_reason}

    def _delta(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


class TextAnswer(Answer):
    """An answer to raw prompts, one choice each."""

    PREFIX = "cmpl"
    KIND = CHUNK_KIND = "text_completion"

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        return {"index": index, "text": completion.text, "logprobs": None, "finish_reason": completion.finish_reason}

    def _delta(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
