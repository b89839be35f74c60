"""Rows in one sequence are computed as if each were alone, and models for which that would not be so are not packed."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from agents.models.builtin import tiny_config
from agents.training.attention import NAME
from agents.training.packing import RowCollator, StepOrder, decide, padding_share
from common.errors import InvalidArgument

WORDS = 97
SHAPE = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SHAPE | {"num_key_value_heads": 2}
WINDOWED = GROUPED | {"head_dim": 8, "sliding_window": 5}
MODELS: dict[str, dict[str, Any]] = {
    "builtin:tiny": {},
    "qwen2": GROUPED,
    "gpt_neox": SHAPE,
    "gpt2": {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mistral": WINDOWED,
    "gemma3_text": WINDOWED,
}
# ALiBi counts from the first token of the sequence; the others carry a state over the border.
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 1, "n_head": 4},
    "mamba": {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4},
    "lfm2": GROUPED | {"layer_types": ["conv", "full_attention"]},
}
UNEVEN, EVEN = np.array([9, 2, 30, 5] * 8), np.array([20, 20, 21, 20] * 8)
LENGTHS = (7, 3, 12, 2, 9)


def _model(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    shape = (MODELS | REFUSED)[name]
    config = tiny_config(WORDS) if name == "builtin:tiny" else AutoConfig.for_model(name, **shape)
    return AutoModelForCausalLM.from_config(config, **more).eval()


def _rows() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(2, WORDS) for _ in range(length)] for length in LENGTHS]


def _batch(rows: list[list[int]]) -> dict[str, Any]:
    return RowCollator(0)([{"input_ids": row, "labels": row} for row in rows])


def _losses(logits: torch.Tensor, rows: list[list[int]]) -> list[float]:
    """The loss of each row from the logits of all of them in one sequence."""
    parts = zip(logits.split([len(row) for row in rows]), rows, strict=True)
    return [float(torch.nn.functional.cross_entropy(part[:-1], torch.tensor(row[1:]))) for part, row in parts]


def _packed(model: Any, rows: list[list[int]]) -> torch.Tensor:
    batch = _batch(rows)
    batch.pop("labels")
    with torch.no_grad():
        logits: torch.Tensor = model(**batch, use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_each_row_has_the_loss_that_it_has_alone(name: str) -> None:
    model, rows = _model(name), _rows()
    with torch.no_grad():
        alone = [float(model(torch.tensor([row]), labels=torch.tensor([row])).loss) for row in rows]
    assert decide("on", model, UNEVEN, 4, 0).on
    assert _losses(_packed(model, rows), rows) == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_other_tokens_in_a_neighbour_change_nothing(name: str) -> None:
    model, rows = _model(name), _rows()
    decide("on", model, UNEVEN, 4, 0)
    before = _losses(_packed(model, rows), rows)
    for changed in range(len(rows)):
        others = copy.deepcopy(rows)
        others[changed] = [(token + 40) % WORDS for token in others[changed]]
        after = _losses(_packed(model, others), others)
        assert after[changed] != before[changed]
        assert [loss for row, loss in enumerate(after) if row != changed] == pytest.approx(
            [loss for row, loss in enumerate(before) if row != changed], abs=1e-6
        )


@pytest.mark.parametrize("name", MODELS)
def test_no_gradient_reaches_a_neighbour(name: str) -> None:
    model, rows = _model(name), _rows()
    decide("on", model, UNEVEN, 4, 0)
    batch = _batch(rows)
    batch.pop("labels")
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, **batch, use_cache=False).logits[0]
    start = sum(LENGTHS[:2])
    logits[start : start + LENGTHS[2]].square().sum().backward()
    assert embedded.grad is not None
    touched = embedded.grad[0].abs().sum(-1) > 0
    assert touched.nonzero().flatten().tolist() == list(range(start, start + LENGTHS[2]))


def test_no_token_is_to_be_predicted_from_another_row() -> None:
    labels = _batch(_rows())["labels"][0]
    starts = [sum(LENGTHS[:row]) for row in range(len(LENGTHS))]
    assert (labels == -100).nonzero().flatten().tolist() == starts


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bloom", "positions"), ("mamba", "layers of kind linear_attention"), ("lfm2", "layers of kind conv"), ("gpt2", "'eager'")],
)
def test_a_model_that_would_mix_rows_is_not_packed(name: str, reason: str) -> None:
    model = _model(name, **({"attn_implementation": "eager"} if name == "gpt2" else {}))
    with pytest.raises(InvalidArgument, match=reason) as caught:
        decide("on", model, UNEVEN, 4, 0)
    assert [violation.field for violation in caught.value.violations] == ["packing"]
    packing = decide("auto", model, UNEVEN, 4, 0)
    assert not packing.on
    assert reason in packing.why
    assert model.config._attn_implementation != NAME


def test_rows_are_packed_where_padding_costs_something_and_the_reason_is_told() -> None:
    uneven, even, off = (
        decide(wanted, _model("builtin:tiny"), lengths, 4, 0)
        for wanted, lengths in (("auto", UNEVEN), ("auto", EVEN), ("off", UNEVEN))
    )
    assert (uneven.on, uneven.why) == (True, f"padding would be {padding_share(UNEVEN, 4, 0):.0%} of the tokens")
    assert not even.on
    assert even.why.startswith("padding is only ")
    assert (off.on, off.why) == (False, "as the job says")


def test_the_share_of_padding_is_that_of_the_tokens() -> None:
    assert padding_share(np.array([4, 4, 4, 4]), 2, 0) == 0
    assert padding_share(np.array([1, 3]), 2, 0) == pytest.approx(2 / 6)
    assert padding_share(np.array([1, 3]), 8, 0) == pytest.approx(2 / 6)


def test_packed_rows_without_their_lengths_are_no_answer() -> None:
    model = _model("builtin:tiny")
    decide("on", model, UNEVEN, 4, 0)
    with pytest.raises(RuntimeError, match="without their lengths"):
        model(torch.tensor([[5, 6, 7]]), position_ids=torch.tensor([[0, 1, 0]]), use_cache=False)


def _steps(order: StepOrder, size: int) -> list[list[int]]:
    rows = list(order)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@pytest.mark.parametrize("packed", [True, False])
def test_an_optimiser_step_sees_the_rows_that_seed_and_epoch_drew(packed: bool) -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 50)
    plain = StepOrder(lengths, 16, 1, 1, seed=7, packed=packed)
    arranged = StepOrder(lengths, 4, 2, 2, seed=7, packed=packed)
    epochs = []
    for epoch in range(3):
        plain.set_epoch(epoch)
        arranged.set_epoch(epoch)
        epochs.append(list(arranged))
        assert sorted(epochs[-1]) == list(range(50))
        assert [sorted(step) for step in _steps(arranged, 16)] == [sorted(step) for step in _steps(plain, 16)]
        assert list(arranged) == epochs[-1]
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(StepOrder(lengths, 4, 2, 2, seed=8, packed=packed)) != epochs[0]


def test_packed_micro_batches_have_like_numbers_of_tokens_and_as_many_rows_as_asked() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(4, 0.8, 64)).astype(int)
    (rows,) = _steps(StepOrder(lengths, 8, 2, 4, seed=0, packed=True), 64)
    tokens = lengths[np.array(rows).reshape(8, 8)].sum(axis=1)
    drawn = lengths[np.array(list(StepOrder(lengths, 64, 1, 1, seed=0, packed=True))).reshape(8, 8)].sum(axis=1)
    assert tokens.max() / tokens.mean() < 1.1 < drawn.max() / drawn.mean()


def test_padded_micro_batches_have_rows_of_like_length() -> None:
    lengths = np.exp(np.random.default_rng(0).normal(4, 0.8, 64)).astype(int)

    def padded(order: StepOrder) -> int:
        batches = lengths[np.array(list(order)).reshape(8, 8)]
        return int(batches.max(axis=1).sum()) * 8

    arranged, drawn = (StepOrder(lengths, size, count, 1, seed=0, packed=False) for size, count in ((8, 8), (64, 1)))
    assert padded(arranged) < 1.25 * lengths.sum() < padded(drawn)
