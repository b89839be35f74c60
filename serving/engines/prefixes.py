"""Beginnings that prompts share, kept so that they are computed once (RadixAttention, Zheng et al., 2024, in its simplest form).

A beginning is kept when a second prompt has it, in whole blocks of tokens: the first one says nothing about others to come. Keys
and values depend on the adapter, so that it is a part of what a beginning is known by.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

Kept = list[tuple[torch.Tensor, torch.Tensor]]

BLOCK = 32
"""Tokens by which beginnings are told apart."""

SEEN = 20_000
"""Beginnings that are remembered without being kept."""


class PrefixStore:
    """Keys and values of beginnings, up to so many bytes; the one that was not used for longest goes first."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._seen: OrderedDict[int, None] = OrderedDict()
        self._kept: OrderedDict[int, tuple[Sequence[int], Kept]] = OrderedDict()
        self._bytes = 0
        self.reused_tokens = 0

    def length(self, adapter: str, ids: Sequence[int]) -> int:
        """Tokens of the longest kept beginning of a prompt that leaves at least one to compute; 0 where there is none."""
        for length in range((len(ids) - 1) // BLOCK * BLOCK, 0, -BLOCK):
            found = self._kept.get(self._name(adapter, ids[:length]))
            if found is not None and list(found[0]) == list(ids[:length]):
                return length
        return 0

    def take(self, adapter: str, ids: Sequence[int]) -> Kept:
        """The keys and values of a beginning that is kept."""
        name = self._name(adapter, ids)
        self._kept.move_to_end(name)
        self.reused_tokens += len(ids)
        return self._kept[name][1]

    def worth(self, adapter: str, ids: Sequence[int]) -> int:
        """How much of a prompt another one had before, in tokens, unless that is kept already. Remembers the prompt."""
        shared = 0
        for length in range(BLOCK, len(ids), BLOCK):
            name = self._name(adapter, ids[:length])
            if name in self._seen:
                self._seen.move_to_end(name)
                shared = length
            else:
                self._seen[name] = None
        while len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        return 0 if self._name(adapter, ids[:shared]) in self._kept else shared

    def keep(self, adapter: str, ids: Sequence[int], kept: Kept) -> None:
        """Keep the keys and values of a whole beginning."""
        size = sum(keys.nbytes + values.nbytes for keys, values in kept)
        if size > self._most // 4:
            return
        self._kept[self._name(adapter, ids)] = (list(ids), kept)
        self._bytes += size
        while self._bytes > self._most:
            _, (_, old) = self._kept.popitem(last=False)
            self._bytes -= sum(keys.nbytes + values.nbytes for keys, values in old)

    def _name(self, adapter: str, ids: Sequence[int]) -> int:
        return hash((adapter, tuple(ids)))
