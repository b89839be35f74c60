"""The shape of answers: chat completions, text completions, and their streams."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serving.engines import tool_calls
from serving.engines.base import Completion, Piece, TokenLogprob
from serving.wire import Started

LEAST_LOGPROB = -9999.0
"""What stands for minus infinity, which JSON does not have."""


def usage(completions: Sequence[Completion], n: int = 1) -> dict[str, int]:
    """Return the token counts of an answer; each prompt counts once, however many of the `n` answers it got."""
    prompt = sum(completion.prompt_tokens for completion in completions[::n])
    generated = sum(completion.completion_tokens for completion in completions)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def sse(data: dict[str, Any] | str) -> bytes:
    """Return one server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


@dataclass
class Answer:
    """One answer on its way; subclasses know the shape. `fingerprint` names the application that answers."""

    model: str
    fingerprint: str
    include_usage: bool = False
    n: int = 1
    tools: Sequence[str] = ()  # names of those that may be called
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    PREFIX = ""
    KIND = ""
    CHUNK_KIND = ""

    @property
    def whole_id(self) -> str:
        """The id that the client is told."""
        return f"{self.PREFIX}-{self.id}"

    def begin(self, started: Started) -> list[dict[str, Any]]:
        """Return the chunks before the first text."""
        return []

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the answer in one piece."""
        choices = [self._choice(completion) for completion in completions]
        return {**self._head(self.KIND), "choices": choices, "usage": usage(completions, self.n)}

    def text(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the chunks for a piece of text; none where it is held back."""
        raise NotImplementedError

    def close(self, completion: Completion) -> list[dict[str, Any]]:
        """Return the chunks after the last text of one answer."""
        raise NotImplementedError

    def closing(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        """Return the chunks after all answers."""
        if not self.include_usage:
            return []
        return [{**self._head(self.CHUNK_KIND), "choices": [], "usage": usage(completions, self.n)}]

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.whole_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head(self.CHUNK_KIND), "choices": [choice]}
        return {**chunk, "usage": None} if self.include_usage else chunk

    def _choice(self, completion: Completion) -> dict[str, Any]:
        raise NotImplementedError


@dataclass
class ChatAnswer(Answer):
    """An answer to a conversation."""

    PREFIX = "chatcmpl"
    KIND = "chat.completion"
    CHUNK_KIND = "chat.completion.chunk"

    _calls: str = ""
    _held: dict[int, str] = field(default_factory=dict)

    def begin(self, started: Started) -> list[dict[str, Any]]:
        """Return the chunks that say who speaks."""
        self._calls = started.calls
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._delta(index, delta) for index in range(self.n)]

    def text(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the chunk for a piece of text; none while it may be a part of a call."""
        text = piece.text
        if self._calls:
            text = self._held.pop(piece.index, "") + text
            if tool_calls.opens(text, self._calls):
                self._held[piece.index] = text
                return []
        return [self._delta(piece.index, {"content": text}, logprobs=_chat_logprobs(piece.logprobs))]

    def close(self, completion: Completion) -> list[dict[str, Any]]:
        """Return the chunks with the calls, if there are any, and the reason of the end."""
        chunks: list[dict[str, Any]] = []
        reason: str = completion.finish_reason
        if held := self._held.pop(completion.index, ""):
            text, calls = tool_calls.parse(held, self._calls, self.tools)
            if text:
                chunks.append(self._delta(completion.index, {"content": text}))
            if calls:
                told = [{"index": number, **call} for number, call in enumerate(_told(calls))]
                chunks.append(self._delta(completion.index, {"tool_calls": told}))
                reason = "tool_calls"
        return [*chunks, self._delta(completion.index, {}, reason)]

    def _choice(self, completion: Completion) -> dict[str, Any]:
        calls = completion.calls
        message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
        reason: str = completion.finish_reason
        if calls:
            text, found = tool_calls.parse(completion.text, calls, self.tools)
            if found:
                message |= {"content": text or None, "tool_calls": _told(found)}
                reason = "tool_calls"
        logprobs = _chat_logprobs(completion.logprobs)
        return {"index": completion.index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _delta(
        self, index: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return self._chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})


@dataclass
class TextAnswer(Answer):
    """An answer to raw prompts, `n` choices each."""

    PREFIX = "cmpl"
    KIND = CHUNK_KIND = "text_completion"

    _offsets: dict[int, int] = field(default_factory=dict)

    def text(self, piece: Piece) -> list[dict[str, Any]]:
        """Return the chunk for a piece of text."""
        logprobs = _text_logprobs(piece.logprobs, self._offsets.get(piece.index, 0))
        self._offsets[piece.index] = self._offsets.get(piece.index, 0) + sum(len(each.token) for each in piece.logprobs)
        return [self._chunk({"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": None})]

    def close(self, completion: Completion) -> list[dict[str, Any]]:
        """Return the chunk with the reason of the end."""
        reason = completion.finish_reason
        return [self._chunk({"index": completion.index, "text": "", "logprobs": None, "finish_reason": reason})]

    def _choice(self, completion: Completion) -> dict[str, Any]:
        return {
            "index": completion.index,
            "text": completion.text,
            "logprobs": _text_logprobs(completion.logprobs, 0),
            "finish_reason": completion.finish_reason,
        }


def _told(calls: Sequence[tool_calls.ToolCall]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{uuid.uuid4().hex[:24]}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for call in calls
    ]


def _chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not logprobs:
        return None
    content = [
        {**_likely(each.token, each.logprob), "top_logprobs": [_likely(token, value) for token, value in each.top]}
        for each in logprobs
    ]
    return {"content": content, "refusal": None}


def _likely(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(token.encode())}


def _text_logprobs(logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
    if not logprobs:
        return None
    offsets = []
    for each in logprobs:
        offsets.append(offset)
        offset += len(each.token)
    top = [{token: max(value, LEAST_LOGPROB) for token, value in each.top} for each in logprobs]
    return {
        "tokens": [each.token for each in logprobs],
        "token_logprobs": [max(each.logprob, LEAST_LOGPROB) for each in logprobs],
        "top_logprobs": top if any(top) else None,
        "text_offset": offsets,
    }
