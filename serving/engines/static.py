"""Generation by the batch, for models whose attention or state does not let sequences join a running batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from serving.engines.base import Done, Lanes, Request
from serving.engines.decoding import Likely, Row, choose, likelihoods

MAX_ROWS = 32  # rows that are generated together
PREFILL_TOKENS = 16_384  # padded prompt tokens of one batch


class StaticLanes(Lanes):
    """Takes what waits, like lengths together, and runs it to its end by the model's own `generate`."""

    def __init__(
        self, model: Any, start: Callable[[Request], Row], end_tokens: frozenset[int], pad: int, max_length: int
    ) -> None:
        """`start` makes the row of a request, or raises what is wrong with it."""
        self._model = model
        self._start = start
        self._end_tokens = end_tokens
        self._pad = pad
        self._max_length = max_length
        self._waiting: list[tuple[Row, Done]] = []

    def join(self, request: Request, done: Done) -> None:
        """Take a request in."""
        try:
            self._waiting.append((self._start(request), done))
        except Exception as error:
            done(error)

    @property
    def busy(self) -> bool:
        """Whether something waits."""
        return bool(self._waiting)

    def step(self) -> None:
        """Run the next batch; what fills the context before it ends goes into another one."""
        # Like lengths go together: less padding.
        self._waiting.sort(key=lambda item: len(item[0].ids), reverse=True)
        count = max(1, min(MAX_ROWS, PREFILL_TOKENS // len(self._waiting[0][0].ids)))
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        try:
            for row, _ in batch:
                if row.request.cancel.is_set():  # left while it waited
                    row.cancel()
            if live := [row for row, _ in batch if row.finish_reason is None]:
                self._generate(live)
        except BaseException as error:
            for _, done in [*batch, *self._waiting]:
                done(error)
            self._waiting = []
            raise
        for row, done in batch:
            if row.finish_reason is None:
                self._waiting.append((row, done))
            else:
                done(row.completion())

    @torch.inference_mode()
    def _generate(self, rows: list[Row]) -> None:
        """Generate until every row ends or the longest fills the context."""
        length = max(len(row.ids) for row in rows)
        tokens = torch.tensor([[self._pad] * (length - len(row.ids)) + row.ids for row in rows])
        mask = torch.tensor([[0] * (length - len(row.ids)) + [1] * len(row.ids) for row in rows])
        device = self._model.device
        likely: list[Likely | None] = []
        config = GenerationConfig(
            max_new_tokens=self._max_length - length, do_sample=False, pad_token_id=self._pad, use_cache=True
        )
        self._model.generate(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Chooser(rows, likely)]),
            stopping_criteria=StoppingCriteriaList([_Reader(rows, self._end_tokens, likely)]),
        )


class _Chooser(LogitsProcessor):
    """Decides the next tokens, so that each row samples by its own parameters."""

    def __init__(self, rows: Sequence[Row], likely: list[Likely | None]) -> None:
        self._rows = rows
        self._likely = likely

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = choose(scores, self._rows)
        self._likely[:] = likelihoods(scores, chosen, self._rows)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _Reader(StoppingCriteria):
    """Hands each row its next token and tells which rows are done."""

    def __init__(self, rows: Sequence[Row], end_tokens: frozenset[int], likely: list[Likely | None]) -> None:
        self._rows = rows
        self._end_tokens = end_tokens
        self._likely = likely

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        for row, token, likely in zip(self._rows, input_ids[:, -1].tolist(), self._likely, strict=True):
            if row.finish_reason is None:
                row.push(token, self._end_tokens, likely)
        return torch.tensor([row.finish_reason is not None for row in self._rows], device=input_ids.device)
