"""Per-row state of a generation: sampling, text as it becomes certain, stop strings, limits."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from serving.engines.base import Completion, FinishReason, Piece, Request, TokenLogprob


class Matcher(Protocol):
    """What a text has to follow, at the token that it has come to."""

    def mask(self, scores: torch.Tensor) -> None:
        """Make tokens that may not come next impossible, in one row's logits."""
        ...

    def consume_token(self, token: int) -> object:
        """Go on by a token."""
        ...


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

    def __init__(
        self,
        request: Request,
        prompt_ids: list[int],
        max_length: int,
        decode: Callable[[list[int]], str],
        matcher: Matcher | None = None,
    ) -> None:
        """`matcher` says which tokens may come next, where the request wants the text to follow something."""
        self.request = request
        self.ids = prompt_ids
        self.prompt_tokens = len(prompt_ids)
        self.matcher = matcher
        room = max_length - len(prompt_ids)
        self.limit = min(request.params.max_tokens or room, room)
        self.finish_reason: FinishReason | None = None
        self._decode = decode
        self._detokenizer = Detokenizer(decode, request.params.stop)
        self._generated = 0
        self._logprobs: list[TokenLogprob] = []
        self._told = 0
        params = request.params
        self._random: torch.Generator | None = None
        if params.temperature > 0:  # a generator of its own: rows of a batch and other threads do not disturb it
            self._random = torch.Generator().manual_seed(secrets.randbits(62) if params.seed is None else params.seed)

    @property
    def sampled(self) -> bool:
        """Whether tokens are drawn rather than the likeliest taken."""
        return self._random is not None

    @property
    def generated(self) -> list[int]:
        """The tokens that were generated so far."""
        return self.ids[self.prompt_tokens :]

    def draw(self) -> float:
        """Return the next random number in [0, 1)."""
        return float(torch.rand((), generator=self._random, dtype=torch.float64))

    def push(self, token: int, end_tokens: frozenset[int], likely: Likely | None = None) -> None:
        """Take the next token and decide whether the row ends."""
        if self.request.cancel.is_set():
            self.cancel()
            return
        self._generated += 1
        if token in end_tokens:
            self._finish("stop")
            return
        if self.matcher is not None:
            self.matcher.consume_token(token)
        self.ids.append(token)
        if likely is not None:
            top = tuple((self._decode([other]), value) for other, value in likely.top)
            self._logprobs.append(TokenLogprob(self._decode([token]), likely.own, top))
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
        if text and self.request.on_piece is not None:
            self.request.on_piece(Piece(text, tuple(self._logprobs[self._told :])))
            self._told = len(self._logprobs)

    def completion(self) -> Completion:
        """Return what came of it."""
        reason = self.finish_reason or "length"
        return Completion(self._detokenizer.text, reason, self.prompt_tokens, self._generated, tuple(self._logprobs))


@dataclass(frozen=True)
class Likely:
    """Log-probability of the token that was chosen, and the likeliest tokens with theirs."""

    own: float
    top: tuple[tuple[int, float], ...]


def likelihoods(scores: torch.Tensor, chosen: torch.Tensor, rows: Sequence[Row]) -> list[Likely | None]:
    """Return what is to be told of each row's token, by the model's own logits; None where nothing is to be told."""
    wanted = [index for index, row in enumerate(rows) if row.request.params.top_logprobs is not None]
    found: list[Likely | None] = [None] * len(rows)
    if not wanted:
        return found
    logprobs = scores[wanted].float().log_softmax(dim=-1)
    own = logprobs.gather(1, chosen[wanted][:, None])[:, 0].tolist()
    most = max(rows[index].request.params.top_logprobs or 0 for index in wanted)
    values, tokens = logprobs.topk(most, dim=-1)
    for place, index in enumerate(wanted):
        count = rows[index].request.params.top_logprobs or 0
        top = zip(tokens[place, :count].tolist(), values[place, :count].tolist(), strict=True)
        found[index] = Likely(own[place], tuple(top))
    return found


def adjust(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Return the logits with each row's own penalties, biases and grammar; the same tensor where no row has any."""
    live = [(index, row) for index, row in enumerate(rows) if row.finish_reason is None]
    changed = [(index, row) for index, row in live if row.request.params.adjusts]
    bound = [(index, row) for index, row in live if row.matcher is not None]
    if not changed and not bound:
        return scores
    scores = scores.clone()
    for index, row in changed:
        params = row.request.params
        if row.generated and (params.presence_penalty or params.frequency_penalty):
            seen = Counter(row.generated)
            tokens = torch.tensor(list(seen), device=scores.device)
            counts = torch.tensor(list(seen.values()), device=scores.device, dtype=scores.dtype)
            scores[index, tokens] -= params.presence_penalty + params.frequency_penalty * counts
        for token, bias in params.logit_bias:
            if token < scores.shape[1]:
                scores[index, token] += bias
    for index, row in bound:
        assert row.matcher is not None
        row.matcher.mask(scores[index])
    return scores


def choose(scores: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """Return the next token of each row: the likeliest, or drawn by the row's own temperature, top_k, top_p and generator."""
    scores = adjust(scores, rows)
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
    if any(p.top_k for p in params):
        most = torch.tensor([p.top_k or kept.shape[1] for p in params], device=device)
        kept &= torch.arange(kept.shape[1], device=device) < most[:, None]
    cumulative = (probabilities * kept).double().cumsum(dim=-1)
    random = torch.tensor([rows[index].draw() for index in drawn], device=device, dtype=torch.float64)
    place = torch.searchsorted(cumulative, random[:, None] * cumulative[:, -1:], right=True)
    place = torch.minimum(place, kept.sum(dim=-1, keepdim=True) - 1)
    chosen[drawn] = tokens.gather(1, place)[:, 0]
    return chosen
