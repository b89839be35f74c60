"""Per-row state of a generation: sampling, text as it becomes certain, stop strings, limits."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence

import torch

from serving.engines.base import Completion, FinishReason, Request


class Detokenizer:
    """Turns tokens into text one by one: characters are given out whole, and never part of a stop string."""

    def __init__(self, decode: Callable[[list[int]], str], stop: tuple[str, ...] = ()) -> None:
        self._decode = decode
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._tokens: list[int] = []
        self._start = self._end = 0  # tokens[start:end] is what has been decoded last, kept as context
        self._given = 0
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> None:
        """Take the next token."""
        self._tokens.append(token)
        known = self._decode(self._tokens[self._start : self._end])
        text = self._decode(self._tokens[self._start :])
        if len(text) > len(known) and not text.endswith("\ufffd"):  # else a character is still incomplete
            self._start, self._end = self._end, len(self._tokens)
            self._append(text[len(known) :])

    def take(self, last: bool = False) -> str:
        """Return the text that became certain since the last call; `last` flushes what was held back."""
        if last and not self.stopped:
            known = self._decode(self._tokens[self._start : self._end])
            self._append(self._decode(self._tokens[self._start :])[len(known) :])
            self._start = self._end = len(self._tokens)
        held = 0 if last or self.stopped else self._held_back()
        text = self.text[self._given : len(self.text) - held]
        self._given += len(text)
        return text

    def _append(self, text: str) -> None:
        search_from = max(0, len(self.text) - self._longest + 1)
        self.text += text
        found = [at for at in (self.text.find(stop, search_from) for stop in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _held_back(self) -> int:
        """Length of the longest end of the text that may turn out to begin a stop string."""
        longest = min(self._longest - 1, len(self.text) - self._given)
        for length in range(longest, 0, -1):
            end = self.text[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0


class Row:
    """One request while it is being generated."""

    def __init__(self, request: Request, prompt_ids: list[int], max_length: int, decode: Callable[[list[int]], str]) -> None:
        self.request = request
        self.ids = prompt_ids
        self.prompt_tokens = len(prompt_ids)
        room = max_length - len(prompt_ids)
        self.limit = min(request.params.max_tokens or room, room)
        self.finish_reason: FinishReason | None = None
        self._detokenizer = Detokenizer(decode, request.params.stop)
        self._generated = 0
        params = request.params
        self._random: torch.Generator | None = None
        if params.temperature > 0:  # a generator of its own: rows of a batch and other threads do not disturb it
            self._random = torch.Generator().manual_seed(secrets.randbits(62) if params.seed is None else params.seed)

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn rather than the likeliest taken."""
        return self._random is not None

    def draw(self) -> float:
        """Return the next random number in [0, 1)."""
        return float(torch.rand((), generator=self._random, dtype=torch.float64))

    def push(self, token: int, end_tokens: frozenset[int]) -> None:
        """Take the next token and decide whether the row ends."""
        if self.request.cancel.is_set():
            self.cancel()
            return
        self._generated += 1
        if token in end_tokens:
            self._finish("stop")
            return
        self.ids.append(token)
        self._detokenizer.push(token)
        if self._detokenizer.stopped:
            self._finish("stop")
        elif self._generated >= self.limit:
            self._finish("length")
        else:
            self._tell(self._detokenizer.take())

    def cancel(self) -> None:
        """End before the first token, or between two."""
        self.finish_reason = "cancelled"

    def _finish(self, reason: FinishReason) -> None:
        self._tell(self._detokenizer.take(last=True))
        # A stop string that the flush completed ended the text too.
        self.finish_reason = "stop" if self._detokenizer.stopped else reason

    def _tell(self, text: str) -> None:
        if text and self.request.on_text is not None:
            self.request.on_text(text)

    def completion(self) -> Completion:
        """Return what came of it."""
        return Completion(self._detokenizer.text, self.finish_reason or "length", self.prompt_tokens, self._generated)


def choose(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Return the next token of each row: the likeliest, or drawn by the row's own temperature, top_p and generator."""
    chosen = scores.argmax(dim=-1)
    drawn = [index for index, row in enumerate(rows) if row.sampled and row.finish_reason is None]
    if not drawn:
        return chosen
    device = scores.device
    params = [rows[index].request.params for index in drawn]
    temperature = torch.tensor([p.temperature for p in params], device=device, dtype=torch.float32).clamp_min(1e-4)
    top_p = torch.tensor([p.top_p for p in params], device=device, dtype=torch.float32)
    logits = scores[drawn].float() / temperature[:, None]
    probabilities, tokens = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(dim=-1)
    kept = (cumulative - probabilities) < top_p[:, None]  # the first is always kept
    cumulative = (probabilities * kept).double().cumsum(dim=-1)
    random = torch.tensor([rows[index].draw() for index in drawn], device=device, dtype=torch.float64)
    place = torch.searchsorted(cumulative, random[:, None] * cumulative[:, -1:], right=True)
    place = torch.minimum(place, kept.sum(dim=-1, keepdim=True) - 1)
    chosen[drawn] = tokens.gather(1, place)[:, 0]
    return chosen
