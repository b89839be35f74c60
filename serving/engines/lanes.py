"""Generation by the token: sequences join and leave a running batch between any two tokens.

A prompt is computed in pieces of bounded size, in turn with the tokens of those who are answered already, so that a long prompt
holds up nobody for long (chunked prefill, Agrawal et al., 2023; iteration-level scheduling, Yu et al., 2022).
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from common.errors import Unavailable
from serving.engines.adapters import AdapterBank
from serving.engines.base import Done, Lanes, Request
from serving.engines.decoding import Row, choose, likelihoods
from serving.engines.prefixes import PrefixStore
from serving.engines.slots import SlotCache

logger = logging.getLogger(__name__)

MAX_ROWS = 32  # sequences that are generated together
CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}  # prompt tokens, padding included, of one pass


class Lane:
    """A sequence on its way through the batch."""

    def __init__(self, row: Row, done: Done) -> None:
        self.row = row
        self.done = done
        self.computed = 0  # tokens whose keys and values are in its slot

    @property
    def adapter(self) -> str:
        """Adapter that it is computed with; empty for none."""
        return self.row.request.adapter

    @property
    def left(self) -> int:
        """Tokens that have to be computed before the next one can be chosen."""
        return len(self.row.ids) - self.computed


def fits(model: Any) -> bool:
    """Whether a model's attention can work on slots: plain attention over everything before, told by position."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    wanted = {"position_ids", "past_key_values", "logits_to_keep", "attention_mask"}
    windows = ["sliding_attention"] if getattr(config, "sliding_window", None) else ["full_attention"]
    kinds = set(getattr(config, "layer_types", None) or windows)
    recurrent = getattr(base, "_is_stateful", False) or getattr(config, "is_encoder_decoder", False)
    return (
        not recurrent
        and kinds == {"full_attention"}
        and not getattr(config, "alibi", False)
        and config._attn_implementation in ("sdpa", "eager")
        and wanted <= set(inspect.signature(base.forward).parameters)
    )


class ContinuousLanes(Lanes):
    """The running batch of one model. One thread works on it."""

    def __init__(
        self,
        model: Any,
        start: Callable[[Request], Row],
        end_tokens: frozenset[int],
        pad: int,
        budget_bytes: int,
        max_rows: int = MAX_ROWS,
    ) -> None:
        """`start` makes the row of a request, or raises what is wrong with it."""
        self._start = start
        self._end_tokens = end_tokens
        self._model = model
        self._pad = pad
        self._budget = budget_bytes // 2  # the rest is for adapters and for beginnings that prompts share
        self._max_rows = max_rows
        self._additive = model.config._attn_implementation == "eager"
        self._chunk = CHUNK_TOKENS.get(model.device.type, CHUNK_TOKENS["cuda"])
        self._adapters = AdapterBank(model, budget_bytes // 4)
        self._prefixes = PrefixStore(budget_bytes // 4)
        self._cache = SlotCache()
        self._queue: deque[Lane] = deque()
        # Slots are taken in this order: those that are answered, then those whose prompts are being computed.
        self._answered: list[Lane] = []
        self._reading: list[Lane] = []

    def join(self, request: Request, done: Done) -> None:
        """Take a request in; `done` gets its completion, or the error."""
        try:
            if request.adapter and not self.has_adapter(request.adapter):
                raise Unavailable(f"the adapter {request.adapter} is not loaded", "ADAPTER_NOT_LOADED")
            lane = Lane(self._start(request), done)
        except Exception as error:
            done(error)
            return
        self._adapters.hold(lane.adapter)
        self._queue.append(lane)

    def add_adapter(self, name: str, folder: Path, pinned: bool = False) -> Callable[[], None]:
        """Read an adapter, in any thread, and return what makes it ready, for the thread that works on the batch."""
        adapter = self._adapters.load(folder)
        return lambda: self._adapters.add(name, adapter, pinned)

    def has_adapter(self, name: str) -> bool:
        """Whether an adapter is ready for use."""
        return name in self._adapters.names

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._answered or self._reading or self._queue)

    @torch.inference_mode()
    def step(self) -> None:
        """Give every sequence that is being answered its next token, and compute one piece of the prompts that wait."""
        try:
            self._drop_cancelled()
            self._admit()
            if self._reading:
                self._read()
            if self._answered:
                self._answer()
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> None:
        lanes = [*self._answered, *self._reading, *self._queue]
        self._answered, self._reading = [], []
        self._queue.clear()
        self._cache.clear()
        for lane in lanes:
            self._adapters.release(lane.adapter)
            lane.done(error)

    def _drop_cancelled(self) -> None:
        # Only the first of the reading can be computed in part, so that nothing has to move.
        for lanes in (self._queue, self._reading):
            for lane in [lane for lane in lanes if lane.row.request.cancel.is_set()]:
                lanes.remove(lane)
                lane.row.cancel()
                self._end(lane)

    def _admit(self) -> None:
        """Let waiting sequences in, in order of arrival, as far as there are slots and memory."""
        if self._queue and not (self._answered or self._reading):
            self._cache.clear()  # one long sequence must not make all to come need as much
        while self._queue and len(self._answered) + len(self._reading) < self._max_rows:
            lane = self._queue[0]
            rows = len(self._answered) + len(self._reading) + 1
            longest = max([len(each.row.ids) for each in (lane, *self._answered, *self._reading)])
            # What a position takes is not known before the first pass, which is for one alone.
            if rows > 1 and not (self._cache.token_bytes and self._cache.bytes_for(rows, longest + 1) <= self._budget):
                return
            self._cache.reserve(rows, longest + 1)
            self._reading.append(self._queue.popleft())

    def _read(self) -> None:
        """Compute a piece of the first prompts: several whole ones, or a part of a long one."""
        lanes: list[Lane] = []
        width = 0
        self._begin_where_others_were()
        for lane in self._reading:
            widest = max(width, min(lane.left, self._chunk))
            if lanes and (widest * (len(lanes) + 1) > self._chunk or lane.left > self._chunk or lanes[0].left > self._chunk):
                break
            if lanes and self._prefixes.length(lane.adapter, lane.row.ids):
                break  # it takes that when it is first
            lanes.append(lane)
            width = widest
        tokens, positions, places = [], [], []
        for lane in lanes:
            count = min(lane.left, width)
            begin, pads = lane.computed, width - count
            tokens.append([self._pad] * pads + lane.row.ids[begin : begin + count])
            positions.append([0] * pads + list(range(begin, begin + count)))
            places.append([-1] * pads + list(range(begin, begin + count)))
            lane.computed += count
        logits = self._forward(len(self._answered), lanes, tokens, positions, places)
        ready = [number for number, lane in enumerate(lanes) if not lane.left]
        if ready:
            self._keep_beginnings(len(self._answered), lanes)
            for lane in lanes:
                self._reading.remove(lane)
            self._answered += lanes
            self._choose(logits, lanes)

    def _begin_where_others_were(self) -> None:
        """Take the beginning of the next prompt from what is kept, if it is not begun yet."""
        lane = self._reading[0]
        if lane.computed:
            return
        if length := self._prefixes.length(lane.adapter, lane.row.ids):
            self._cache.put(len(self._answered), self._prefixes.take(lane.adapter, lane.row.ids[:length]), length)
            lane.computed = length

    def _keep_beginnings(self, first: int, lanes: Sequence[Lane]) -> None:
        """Keep what prompts that were just read share with earlier ones."""
        for slot, lane in enumerate(lanes, first):
            prompt = lane.row.ids[: lane.row.prompt_tokens]
            if shared := self._prefixes.worth(lane.adapter, prompt):
                self._prefixes.keep(lane.adapter, prompt[:shared], self._cache.take(slot, shared))

    def _answer(self) -> None:
        # Those whose first token was chosen just now have one that is not computed yet, like all others.
        lanes = self._answered
        self._make_room()
        lanes = self._answered
        if not lanes:
            return
        tokens = [[lane.row.ids[-1]] for lane in lanes]
        positions = [[lane.computed] for lane in lanes]
        for lane in lanes:
            lane.computed += 1
        self._choose(self._forward(0, lanes, tokens, positions, positions), lanes)

    def _make_room(self) -> None:
        """Grow the slots where the longest needs it; the latest sequences begin anew later where there is no memory for that."""
        while True:
            longest = max(len(lane.row.ids) for lane in [*self._answered, *self._reading])
            rows = len(self._answered) + len(self._reading)
            if rows == 1 or self._cache.bytes_for(rows, longest + 1) <= self._budget:
                self._cache.reserve(rows, longest + 1)
                return
            lane = self._reading.pop() if self._reading else self._answered.pop()
            logger.info("no memory for %d sequences of %d tokens: one begins anew later", rows, longest)
            lane.computed = 0
            self._queue.appendleft(lane)

    def _forward(
        self,
        first: int,
        lanes: Sequence[Lane],
        tokens: list[list[int]],
        positions: list[list[int]],
        places: list[list[int]],
    ) -> torch.Tensor:
        """Return the logits after the last token of each lane (lanes x vocabulary)."""
        device = self._model.device
        width = max(lane.computed for lane in lanes)
        where = torch.tensor(positions, device=device)
        self._cache.aim(first, torch.tensor(places, device=device), width)
        self._adapters.aim([lane.adapter for lane in lanes], device)
        seen = torch.arange(width, device=device) <= where[:, None, :, None]
        mask = torch.where(seen, 0.0, torch.finfo(self._model.dtype).min).to(self._model.dtype) if self._additive else seen
        output = self._model(
            input_ids=torch.tensor(tokens, device=device),
            attention_mask=mask,
            position_ids=where,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._adapters.aim([], device)
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def _choose(self, logits: torch.Tensor, lanes: Sequence[Lane]) -> None:
        """Hand each lane its next token, and let those leave that are done."""
        rows = [lane.row for lane in lanes]
        chosen = choose(logits, rows)
        told = likelihoods(logits, chosen, rows)
        for row, token, likely in zip(rows, chosen.tolist(), told, strict=True):
            row.push(token, self._end_tokens, likely)
        for lane in [lane for lane in lanes if lane.row.finish_reason is not None]:
            self._leave(lane)
            self._end(lane)

    def _end(self, lane: Lane) -> None:
        self._adapters.release(lane.adapter)
        lane.done(lane.row.completion())

    def _leave(self, lane: Lane) -> None:
        """Free a slot: the last of the answered takes its place, and the prompt that is being computed moves up."""
        slot, last = self._answered.index(lane), len(self._answered) - 1
        if slot != last:
            self._cache.move(last, slot, self._answered[last].computed)
            self._answered[slot] = self._answered[last]
        self._answered.pop()
        if self._reading and self._reading[0].computed:
            self._cache.move(last + 1, last, self._reading[0].computed)
