"""Answers kept for the same question: exact, within one project, and of one model version.

Only what is greedy is kept, unless the request asks for it: somebody who samples wants another answer each time.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from serving.engines.base import Completion
from serving.wire import Ask

HEADER = "x-luthier-cache"


class AnswerCache:
    """Completions by the hash of everything that decides them. The one that was not used for longest goes first."""

    def __init__(self, most_bytes: int, seconds: float) -> None:
        self._most = most_bytes
        self._seconds = seconds
        self._kept: OrderedDict[str, tuple[float, int, Sequence[Completion]]] = OrderedDict()
        self._bytes = 0
        self.hits = self.misses = 0

    def key(self, project: str, version: str, ask: Ask, headers: Mapping[str, str]) -> str:
        """What an answer is kept under; empty where it is not to be kept.

        `version` is the application and the adapter, which stand for model, template and tokenizer.
        """
        wish = headers.get(HEADER, "").lower()
        forbidden = "no-cache" in headers.get("cache-control", "") or "no-store" in headers.get("cache-control", "")
        if not self._most or forbidden or wish == "off" or (ask.params.temperature > 0 and wish != "on"):
            return ""
        text = json.dumps([project, version, asdict(replace(ask, trace_parent="", adapter=None))], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def get(self, key: str) -> Sequence[Completion] | None:
        """What is kept under a key, unless it is too old."""
        found = self._kept.get(key) if key else None
        if found is None or found[0] < time.monotonic():
            if found is not None:
                self._drop(key)
            self.misses += bool(key)
            return None
        self._kept.move_to_end(key)
        self.hits += 1
        return found[2]

    def put(self, key: str, completions: Sequence[Completion]) -> None:
        """Keep an answer. What takes more than a hundredth of the room is not kept."""
        size = sum(len(each.text) * 4 + 200 + 100 * len(each.logprobs) for each in completions)
        if not key or size > self._most // 100:
            return
        if key in self._kept:
            self._drop(key)
        self._kept[key] = (time.monotonic() + self._seconds, size, completions)
        self._bytes += size
        while self._bytes > self._most:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: str) -> None:
        self._bytes -= self._kept.pop(key)[1]
