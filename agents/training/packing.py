"""Rows of a micro-batch in one sequence without padding, and which rows of an optimiser step come together.

An optimiser step sees the same rows in every form: micro-batch times accumulation times workers, drawn by seed and epoch. Its
loss is the sum over their learned tokens, on all ranks, divided by the number of these tokens. How its rows lie in memory and
which rank computes which of them therefore changes nothing but the speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from agents.training.attention import ROW_LENGTHS, keep_rows_apart, obstacle_to_packing
from agents.training.config import PackingName
from common.errors import InvalidArgument, Violation

# Below this part of padding there is nothing to gain.
WORTHWHILE = 0.05


@dataclass(frozen=True)
class Packing:
    """Whether rows are packed, and why, in words that follow a colon."""

    on: bool
    why: str


def decide(wanted: PackingName, model: Any, lengths: np.ndarray, batch_size: int, seed: int) -> Packing:
    """Decide whether to pack, and prepare the model for it. Raises InvalidArgument where it was asked for and cannot be."""
    if wanted == "off":
        return Packing(False, "as the job says")
    obstacle = obstacle_to_packing(model)
    if obstacle and wanted == "on":
        raise InvalidArgument.of([Violation("packing", f"cannot be PACKING_ON: {obstacle}; use PACKING_AUTO or PACKING_OFF")])
    padding = padding_share(lengths, batch_size, seed)
    if wanted == "auto" and (obstacle or padding < WORTHWHILE):
        return Packing(False, obstacle or f"padding is only {padding:.1%} of the tokens")
    keep_rows_apart(model)
    return Packing(True, "as the job says" if wanted == "on" else f"padding would be {padding:.0%} of the tokens")


def padding_share(lengths: np.ndarray, batch_size: int, seed: int) -> float:
    """Part of the tokens that would be padding, were micro-batches drawn at random and padded to their longest row."""
    order = np.random.default_rng(seed).permutation(lengths)
    whole = len(order) // batch_size * batch_size
    batches = order[:whole].reshape(-1, batch_size) if whole else order[None, :]
    padded = batches.max(axis=1).sum() * batches.shape[1]
    return float(1 - batches.sum() / padded)


class RowCollator(DataCollatorForLanguageModeling):  # type: ignore[misc]
    """TRL's collator without padding, which also tells the lengths: as numbers, so that no layer waits for a GPU to read them."""

    def __init__(self, pad_token_id: int) -> None:
        super().__init__(pad_token_id=pad_token_id, padding_free=True)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Make one sequence of the examples."""
        return {**super().torch_call(examples), ROW_LENGTHS: [len(example["input_ids"]) for example in examples]}


class StepOrder(Sampler[int]):
    """Order of the rows: by seed and epoch, and within each optimiser step so that its micro-batches suit each other.

    Micro-batches are taken from it in turn, rank by rank and then micro-step by micro-step. Packed, they get about as many tokens
    each, so that no rank waits for another: longest row first, each to the micro-batch with the fewest tokens that has room
    (Graham, 1969). Padded, rows of like length come together. The order is a function of seed and epoch, so a run goes on
    anywhere in it.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, accumulation: int, world_size: int, *, seed: int, packed: bool
    ) -> None:
        self._lengths = lengths
        self._batch_size = batch_size
        self._world_size = world_size
        self._batches = accumulation * world_size
        self._seed = seed
        self._arrange = self._evenly if packed else self._alike
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is iterated next, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self._seed + self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        step = self._batch_size * self._batches
        for start in range(0, len(order), step):
            rows = order[start : start + step]
            yield from self._arrange(rows) if self._batches > 1 and len(rows) == step else rows

    def _alike(self, rows: Sequence[int]) -> list[int]:
        return sorted(rows, key=self._longest_first)

    def _evenly(self, rows: Sequence[int]) -> list[int]:
        batches: list[list[int]] = [[] for _ in range(self._batches)]
        tokens = [0] * self._batches
        for row in sorted(rows, key=self._longest_first):
            place = min((n for n in range(self._batches) if len(batches[n]) < self._batch_size), key=tokens.__getitem__)
            batches[place].append(row)
            tokens[place] += int(self._lengths[row])
        # Those that the ranks compute at the same time are neighbours.
        by_tokens = sorted(range(self._batches), key=lambda place: -tokens[place])
        return [row for place in by_tokens for row in batches[place]]

    def _longest_first(self, row: int) -> tuple[int, int]:
        return -int(self._lengths[row]), row
