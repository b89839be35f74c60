"""The engine that runs everywhere: transformers, on CPU or one GPU."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from common.chat import default_template, template_sha256
from common.errors import InvalidArgument, Violation
from serving.engines import loading, tool_calls
from serving.engines.base import Engine, Lanes, Request, SamplingParams, Score
from serving.engines.choices import Choice, ChoiceScorer
from serving.engines.decoding import Row
from serving.engines.grammar import Grammars
from serving.engines.lanes import ContinuousLanes, fits
from serving.engines.prompts import PromptCodec
from serving.engines.static import StaticLanes

logger = logging.getLogger(__name__)

SCORE_TOKENS = 4_096  # padded tokens of one forward pass when scoring
SCORE_LOGITS = 2**28  # logits held at a time when scoring: 1 GiB of float32


class TransformersEngine(Engine):
    """One causal language model of transformers, with or without an adapter. Made by `load`."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int, end_tokens: set[int]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._codec = PromptCodec(tokenizer)
        end_of_turn = self._codec.end_of_turn()
        self._end_tokens = frozenset(end_tokens if end_of_turn is None else {*end_tokens, end_of_turn})
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else min(self._end_tokens, default=0)
        self._vocabulary = int(model.get_input_embeddings().num_embeddings)
        self._grammars = Grammars(tokenizer, self._vocabulary, self._end_tokens)
        forward = model.get_base_model().forward if hasattr(model, "get_base_model") else model.forward
        self._keeps_logits = "logits_to_keep" in inspect.signature(forward).parameters
        self._shares_beginnings = ChoiceScorer.fits(model)
        template = default_template(tokenizer.chat_template)
        self.tool_style = tool_calls.style_of(template) if self._codec.takes_tools else ""
        self.chat_template_sha256 = template_sha256(template) if template else ""
        self.max_length = max_length

    @classmethod
    def load(cls, model_dir: Path, base_dir: Path | None = None, device: str = "auto") -> TransformersEngine:
        """Load a model folder; raises InvalidArgument or FailedPrecondition where it cannot be served."""
        target = loading.pick_device(device)
        model = loading.load_model(model_dir, base_dir, target)
        tokenizer = loading.load_tokenizer(model_dir, base_dir)
        rows = int(model.get_input_embeddings().num_embeddings)
        if len(tokenizer) > rows:
            raise InvalidArgument(f"the tokenizer has {len(tokenizer):,} tokens, but the model only {rows:,}", "BAD_TOKENIZER")
        ends = loading.end_tokens(model_dir, model, tokenizer)
        # What the model's authors recommend for sampling must not colour what a request asks for.
        model.generation_config = GenerationConfig()
        return cls(model, tokenizer, loading.context_length(model, tokenizer), ends)

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Return the prompt for a conversation, as the model's chat template writes it, ready for the answer."""
        return self._codec.render(messages, tools=tools)

    def check(self, prompt: str) -> int:
        """Return the number of tokens of `prompt`; raises InvalidArgument where it leaves no room for an answer."""
        return len(self._encode(prompt))

    def check_params(self, params: SamplingParams) -> None:
        """Raise InvalidArgument where nothing could be generated so: a grammar without sense, or a token that is not there."""
        self._grammars.matcher(params)
        if too_large := [token for token, _ in params.logit_bias if token >= self._vocabulary]:
            why = f"there is no token {too_large[0]}; the model has {self._vocabulary:,}"
            raise InvalidArgument.of([Violation("logit_bias", why)])

    def lanes(self) -> Lanes:
        """Return a running batch, which is empty: by the token where the model's attention allows it, else by the batch."""
        if fits(self._model):
            budget = loading.cache_budget(self._model.device)
            return ContinuousLanes(self._model, self._row, self._end_tokens, self._pad, budget)
        return StaticLanes(self._model, self._row, self._end_tokens, self._pad, self.max_length)

    def _row(self, request: Request) -> Row:
        ids, matcher = self._encode(request.prompt), self._grammars.matcher(request.params)
        return Row(request, ids, self.max_length, self._decode, matcher)

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Return how likely each completion is after its prompt, rendered as in training."""
        encoded: list[tuple[int, list[int], int]] = []
        for index, (prompt, completion) in enumerate(pairs):
            ids, start = self._codec.encode_pair(prompt, completion)
            if len(ids) > self.max_length:
                raise InvalidArgument(
                    f"pair {index} has {len(ids):,} tokens with its completion, but the model takes {self.max_length:,}",
                    "PROMPT_TOO_LONG",
                )
            encoded.append((index, ids, max(start, 1)))  # the very first token has nothing before it
        encoded.sort(key=lambda item: -len(item[1]))
        scores: list[Score] = [Score(0.0, 0)] * len(pairs)
        while encoded:
            count = self._score_batch(encoded)
            batch, encoded = encoded[:count], encoded[count:]
            for (index, ids, start), logprob in zip(batch, self._logprobs(batch), strict=True):
                scores[index] = Score(logprob, max(0, len(ids) - start))
        return scores

    @torch.inference_mode()
    def score_choices(self, choices: Sequence[tuple[str, Sequence[tuple[str, int]]]]) -> list[list[Score]]:
        """Return how likely each of several completions is after its prompt; what they share is computed once."""
        encoded: list[Choice] = []
        for number, (prompt, alternatives) in enumerate(choices):
            pairs = [self._encode_until(prompt, text, end) for text, end in alternatives]
            start = min(start for _, start in pairs)
            encoded.append(Choice.of(number, list(enumerate(ids for ids, _ in pairs)), start))
        if self._shares_beginnings:
            return ChoiceScorer(self._model, self._pad, self._vocabulary).score(encoded)
        flat = [(choice.number, ids, choice.start) for choice in encoded for _, ids in choice.alternatives]
        found: list[list[Score]] = [[] for _ in encoded]
        while flat:
            count = max(1, SCORE_TOKENS // max(len(ids) for _, ids, _ in flat))
            batch, flat = flat[:count], flat[count:]
            for (number, ids, start), logprob in zip(batch, self._logprobs(batch), strict=True):
                found[number].append(Score(logprob, len(ids) - start))
        return found

    def _encode_until(self, prompt: str, completion: str, end: int) -> tuple[list[int], int]:
        """Return the tokens up to the one that holds the last of `end` characters, and where the completion starts."""
        ids, start = self._codec.encode_pair(prompt, completion)
        start = max(start, 1)
        if len(ids) > self.max_length:
            raise InvalidArgument(
                f"a prompt has {len(ids):,} tokens with its completion, but the model takes {self.max_length:,}",
                "PROMPT_TOO_LONG",
            )
        if end < len(completion):
            until = start + 1
            while until < len(ids) and len(self._decode(ids[start:until])) < end:
                until += 1
            ids = ids[:until]
        return ids, start

    def _score_batch(self, encoded: Sequence[tuple[int, list[int], int]]) -> int:
        """Return how many of `encoded`, longest first, go into one forward pass."""
        longest = first = len(encoded[0][1])
        for count, (_, _, start) in enumerate(encoded):
            first = min(first, start - 1)
            rows = count + 1
            too_many = rows * longest > SCORE_TOKENS or rows * (longest - first) * self._vocabulary > SCORE_LOGITS
            if count and too_many:
                return count
        return len(encoded)

    def _logprobs(self, batch: Sequence[tuple[int, list[int], int]]) -> list[float]:
        length = max(len(ids) for _, ids, _ in batch)
        device = self._model.device
        tokens = torch.tensor([ids + [self._pad] * (length - len(ids)) for _, ids, _ in batch])
        mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for _, ids, _ in batch])
        inputs = {"input_ids": tokens.to(device), "attention_mask": mask.to(device), "use_cache": False}
        # The logits at position p are about token p + 1.
        first = min(start for _, _, start in batch) - 1
        if self._keeps_logits:
            logits = self._model(**inputs, logits_to_keep=length - first).logits
        else:
            logits = self._model(**inputs).logits[:, first:]
        found: list[float] = []
        for row, (_, ids, start) in enumerate(batch):
            picked = logits[row, start - 1 - first : len(ids) - 1 - first].float()
            targets = tokens[row, start : len(ids)].to(device)
            likely = picked.gather(1, targets[:, None])[:, 0] - picked.logsumexp(dim=-1)
            found.append(float(likely.double().sum()))
        return found

    def _encode(self, prompt: str) -> list[int]:
        ids = self._codec.encode(prompt)
        if not ids:
            raise InvalidArgument.of([Violation("prompt", "must not be empty")])
        if len(ids) >= self.max_length:
            raise InvalidArgument.of(
                [Violation("prompt", f"has {len(ids):,} tokens, but the model takes {self.max_length:,} with the answer")],
                "PROMPT_TOO_LONG",
            )
        return ids

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""
