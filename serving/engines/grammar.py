"""Texts that have to follow a JSON schema or a grammar, by llguidance: of all tokens, only those that can go on are possible."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from common.errors import InvalidArgument, Violation
from serving.engines.base import SamplingParams
from serving.engines.tool_calls import WRITTEN

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_CHARACTERS = 200_000


class TokenMatcher:
    """One text on its way through its grammar."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str, vocabulary: int) -> None:
        from llguidance import LLMatcher
        from llguidance.torch import allocate_token_bitmask

        self._matcher = LLMatcher(tokenizer, grammar)
        self._bitmask = allocate_token_bitmask(1, vocabulary)

    def error(self) -> str:
        """What is wrong with the grammar; empty where nothing is."""
        return str(self._matcher.get_error()) if self._matcher.is_error() else ""

    def mask(self, scores: torch.Tensor) -> None:
        """Make tokens that may not come next impossible, in one row's logits."""
        from llguidance.torch import apply_token_bitmask_inplace, fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._bitmask, 0)
        apply_token_bitmask_inplace(scores[None], self._bitmask.to(scores.device))

    def consume_token(self, token: int) -> None:
        """Go on by a token."""
        self._matcher.consume_token(token)


class Grammars:
    """Makes matchers for one tokenizer; what it has to know of that is found out once, when it is asked for."""

    def __init__(self, tokenizer: Any, vocabulary: int, end_tokens: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._end_tokens = end_tokens
        self._known: LLTokenizer | None = None

    def matcher(self, params: SamplingParams) -> TokenMatcher | None:
        """What a request's text has to follow, if anything. Raises InvalidArgument where that makes no sense."""
        if not params.constrained:
            return None
        # Imported where it is needed: half a second that others do not pay.
        from llguidance import LLMatcher

        field = "response_format" if params.json_schema else "grammar"
        if len(params.json_schema) + len(params.grammar) > MAX_CHARACTERS:
            raise InvalidArgument.of([Violation(field, f"has more than {MAX_CHARACTERS:,} characters")])
        try:
            if params.json_schema:
                json.loads(params.json_schema)
                grammar = LLMatcher.grammar_from_json_schema(params.json_schema, defaults=WRITTEN)
            else:
                grammar = LLMatcher.grammar_from_lark(params.grammar)
            found = TokenMatcher(self._tokens(), grammar, self._vocabulary)
            error = found.error()
        except (ValueError, RuntimeError, RecursionError) as raised:
            error = str(raised)
        if error:
            raise InvalidArgument.of([Violation(field, f"cannot be followed: {' '.join(error.split())[:300]}")], "BAD_GRAMMAR")
        return found

    def _tokens(self) -> LLTokenizer:
        if self._known is None:
            from llguidance.hf import from_tokenizer

            ends = sorted(self._end_tokens)
            self._known = from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=ends or None)
        return self._known
