"""Keys and values of many sequences, each in a slot of its own, so that sequences of any length share a forward pass."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

GROWTH = 256  # positions by which the slots grow at a time


class SlotCache(Cache):  # type: ignore[misc]
    """A cache whose rows are slots: a pass says which of them it is about, and where in them its tokens go.

    Slots begin at position 0 and are as long as the longest that is in use; what a sequence may look at is the caller's mask.
    The last position of each slot takes what is padding and is never looked at.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._slots = self._length = 0
        self._first = self._rows = self._width = 0
        self._row_index = self._places = torch.empty(0)
        self.token_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes that all slots take."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._layers)

    def bytes_for(self, slots: int, length: int) -> int:
        """Bytes that would be taken with room for so many slots of so many positions; 0 before the first pass of all."""
        slots, length = self._sizes(slots, length)
        return slots * length * self.token_bytes

    def reserve(self, slots: int, length: int) -> None:
        """Make room for so many slots of so many positions; what is in the first so many stays."""
        sizes = self._sizes(slots, length)
        if sizes == (self._slots, self._length):
            return
        self._slots, self._length = sizes
        for number, (keys, values) in enumerate(self._layers):
            self._layers[number] = (self._grown(keys), self._grown(values))

    def clear(self) -> None:
        """Let go of everything."""
        self._layers = []
        self._slots = self._length = 0

    def _sizes(self, slots: int, length: int) -> tuple[int, int]:
        # Slots that nobody needs are kept only while they need not be copied.
        needed = -(-(length + 1) // GROWTH) * GROWTH
        return (slots, needed) if needed > self._length else (max(slots, self._slots), self._length)

    def aim(self, first: int, places: torch.Tensor, width: int) -> None:
        """Say what the next pass is about: rows from slot `first` on, whose tokens go to `places` (rows x tokens, -1: padding).

        The rows look at positions below `width`.
        """
        self._first, self._rows, self._width = first, places.shape[0], width
        self._row_index = torch.arange(first, first + self._rows, device=places.device)[:, None]
        self._places = torch.where(places < 0, self._length - 1, places)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep a layer's new keys and values (rows x heads x tokens x size) and return all that its rows may look at."""
        while len(self._layers) <= layer_idx:
            self._layers.append((self._empty(key_states), self._empty(value_states)))
            self.token_bytes = self.nbytes // max(1, self._slots * self._length)
        keys, values = self._layers[layer_idx]
        keys[self._row_index, :, self._places] = key_states.transpose(1, 2)
        values[self._row_index, :, self._places] = value_states.transpose(1, 2)
        rows = slice(self._first, self._first + self._rows)
        return keys[rows, :, : self._width], values[rows, :, : self._width]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first positions of one slot into another."""
        for keys, values in self._layers:
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]

    def take(self, slot: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return a copy of the first positions of a slot, layer by layer."""
        return [(keys[slot, :, :length].clone(), values[slot, :, :length].clone()) for keys, values in self._layers]

    def put(self, slot: int, kept: list[tuple[torch.Tensor, torch.Tensor]], length: int) -> None:
        """Write the first positions of what `take` returned into a slot."""
        if not self._layers:
            self._layers = [(self._empty(keys[None]), self._empty(values[None])) for keys, values in kept]
        for (keys, values), (old_keys, old_values) in zip(self._layers, kept, strict=True):
            keys[slot, :, :length] = old_keys[:, :length]
            values[slot, :, :length] = old_values[:, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that the rows of the pass look at."""
        return self._width

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self._slots, like.shape[1], self._length, like.shape[3])

    def _grown(self, old: torch.Tensor) -> torch.Tensor:
        new = old.new_zeros(self._slots, old.shape[1], self._length, old.shape[3])
        stay = min(self._slots, old.shape[0])
        new[:stay, :, : old.shape[2]] = old[:stay]
        return new
