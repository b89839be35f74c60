"""Attention over rows that lie one after the other in one sequence: each row is computed by itself, as if it were alone.

Transformers' own way with such a sequence is a mask over all pairs of its tokens, which costs the square of the whole sequence
and rules out the fastest kernels. Here the cost is the sum of the rows' squares, and no token of another row takes part.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "luthier_rows"
ROW_LENGTHS = "row_lengths"
# Kernels that read the borders of the rows from the batch themselves (`cu_seq_lens_q`).
_KNOWS_BORDERS = ("flash_attention", "kernels-community/flash-attn")
# Layers whose only way from token to token is attention of the usual kinds.
_ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})


def attend_within_rows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers asks for it: one sequence, heads before tokens. The batch says how long its rows are."""
    lengths = kwargs.pop(ROW_LENGTHS, None)
    if lengths is None or attention_mask is not None or query.shape[0] != 1:
        raise RuntimeError("packed rows came without their lengths, so they cannot be kept apart")
    # Split, not sliced: the gradient of each slice would be as long as the whole sequence.
    rows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    outputs = []
    for row_query, row_key, row_value in rows:
        mask = None
        if sliding_window is not None and row_query.shape[2] > sliding_window:
            mask = _window(row_query.shape[2], sliding_window, query.device)
        outputs.append(sdpa_attention_forward(module, row_query, row_key, row_value, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(NAME, attend_within_rows)


def obstacle_to_packing(model: Any) -> str:
    """Why rows cannot lie in one sequence with this model; empty where they can."""
    config = model.config.get_text_config()
    if others := set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS:
        return f"{config.model_type} has layers of kind {min(others)}, which do not end where a row does"
    if getattr(model, "_is_stateful", False):
        return f"{config.model_type} carries a state from token to token, which does not end where a row does"
    if not getattr(model, "_supports_attention_backend", False):
        return f"{config.model_type} does not take its positions and its attention from outside"
    attention = config._attn_implementation
    if attention not in (NAME, "sdpa") and not attention.startswith(_KNOWS_BORDERS):
        return f"{config.model_type} computes its attention by {attention!r}, which does not keep rows apart"
    return ""


def keep_rows_apart(model: Any) -> None:
    """Let a model compute attention within rows; kernels that know of borders themselves stay."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def _window(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Which tokens see which, where each sees itself and the `window` - 1 before it."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    return ((distance >= 0) & (distance < window))[None, None]
