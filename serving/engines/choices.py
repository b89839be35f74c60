"""Scoring alternative completions of one prompt: what they share is computed once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from serving.engines.base import Score

CACHED_TOKENS = 8_192  # padded tokens of one batch, counted once for each alternative
CACHED_LOGITS = 2**27  # logits held at a time: 0.5 GiB of float32


@dataclass(frozen=True)
class Choice:
    """The alternatives of one prompt as tokens. All of them agree on the first `shared` tokens; scores count from `start`."""

    number: int
    alternatives: tuple[tuple[int, list[int]], ...]  # index within the prompt's alternatives, tokens
    start: int
    shared: int

    @classmethod
    def of(cls, number: int, alternatives: Sequence[tuple[int, list[int]]], start: int) -> Choice:
        """Find what the alternatives share. Each keeps one token of its own at least, for which there have to be logits."""
        first = alternatives[0][1]
        shared = min(len(ids) for _, ids in alternatives) - 1
        for _, ids in alternatives[1:]:
            shared = next((at for at in range(shared) if ids[at] != first[at]), shared)
        return cls(number, tuple(alternatives), start, max(shared, 1))

    @property
    def longest(self) -> int:
        """Tokens of the longest alternative."""
        return max(len(ids) for _, ids in self.alternatives)

    def split(self, most: int) -> list[Choice]:
        """Return the choice in parts of at most `most` alternatives."""
        count = max(1, most)
        parts = [self.alternatives[at : at + count] for at in range(0, len(self.alternatives), count)]
        return [Choice(self.number, part, self.start, self.shared) for part in parts]


class ChoiceScorer:
    """Scores choices on one model, in batches of bounded size."""

    def __init__(self, model: Any, pad: int, vocabulary: int) -> None:
        self._model = model
        self._pad = pad
        self._vocabulary = vocabulary

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether the model's attention can go on from a shared beginning that was computed before."""
        forward = model.get_base_model().forward if hasattr(model, "get_base_model") else model.forward
        wanted = {"position_ids", "past_key_values", "logits_to_keep"}
        stateful = getattr(model, "_is_stateful", False) or getattr(model.config, "is_encoder_decoder", False)
        return not stateful and wanted <= set(inspect.signature(forward).parameters)

    def score(self, choices: Sequence[Choice]) -> list[list[Score]]:
        """Return the scores of the alternatives of each choice, in order."""
        found = [[Score(0.0, 0)] * len(choice.alternatives) for choice in choices]
        pending = [part for choice in choices for part in choice.split(CACHED_TOKENS // choice.longest)]
        pending.sort(key=lambda part: part.longest, reverse=True)
        while pending:
            count = self._batch_size(pending)
            batch, pending = pending[:count], pending[count:]
            for number, index, score in self._score(batch):
                found[number][index] = score
        return found

    def _batch_size(self, pending: Sequence[Choice]) -> int:
        tokens = rows = 0
        own = kept = 1
        for count, part in enumerate(pending):
            rows += len(part.alternatives)
            tokens = rows * pending[0].longest
            own = max(own, part.longest - part.shared)
            kept = max(kept, part.shared - part.start + 1)
            logits = max(rows * own, (count + 1) * kept) * self._vocabulary
            if count and (tokens > CACHED_TOKENS or logits > CACHED_LOGITS):
                return count
        return len(pending)

    def _score(self, batch: Sequence[Choice]) -> list[tuple[int, int, Score]]:
        device = self._model.device
        # The shared beginnings, padded on the left so that all of them end at the same place.
        width = max(part.shared for part in batch)
        beginnings = [part.alternatives[0][1][: part.shared] for part in batch]
        tokens = torch.tensor([[self._pad] * (width - len(ids)) + ids for ids in beginnings], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in beginnings], device=device)
        kept = max(max(0, part.shared - part.start) for part in batch) + 1
        output = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            past_key_values=DynamicCache(config=self._model.config),
            use_cache=True,
            logits_to_keep=kept,
        )
        beginning = output.logits.float().log_softmax(-1)
        common = []
        for row, part in enumerate(batch):
            scored = range(part.start, part.shared)  # tokens that every alternative has, and that count
            common.append(sum(float(beginning[row, kept - 1 - (part.shared - at), beginnings[row][at]]) for at in scored))

        owner = [row for row, part in enumerate(batch) for _ in part.alternatives]
        ends = [ids[part.shared :] for part in batch for _, ids in part.alternatives]
        longest = max(len(ids) for ids in ends)
        own = torch.tensor([ids + [self._pad] * (longest - len(ids)) for ids in ends], device=device)
        own_mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in ends], device=device)
        chosen = torch.tensor(owner, device=device)
        after = beginning[:, -1][chosen].gather(1, own[:, :1])[:, 0].double()
        if longest > 1:
            cache = output.past_key_values
            cache.batch_select_indices(chosen)
            offsets = torch.tensor([batch[row].shared for row in owner], device=device)
            logits = self._model(
                input_ids=own[:, :-1],
                attention_mask=torch.cat([mask[chosen], own_mask[:, :-1]], dim=1),
                position_ids=offsets[:, None] + torch.arange(longest - 1, device=device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=0,
            ).logits.float()
            likely = logits.gather(2, own[:, 1:, None])[:, :, 0] - logits.logsumexp(-1)
            after = after + (likely.double() * own_mask[:, 1:]).sum(-1)
        sums = after.tolist()

        alternatives = [(part, index) for part in batch for index, _ in part.alternatives]
        return [
            (part.number, index, Score(common[row] + sums[at], part.shared - min(part.start, part.shared) + len(ends[at])))
            for at, ((part, index), row) in enumerate(zip(alternatives, owner, strict=True))
        ]
