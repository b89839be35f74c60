"""What a token costs, and what a GPU could do."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from agents.training import kernels
from agents.training.speed import attended_length, flops_per_token, peak_flops

HIDDEN, MLP, LAYERS, HEADS, VOCABULARY, LENGTH = 16, 32, 2, 4, 50, 10
# Query, key, value and output; gate, up and down; two norms.
LAYER = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP + 2 * HIDDEN
TABLE = VOCABULARY * HIDDEN
ATTENTION = 12 * LAYERS * HIDDEN * LENGTH


def model(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_counts_once_as_the_output_layer_and_never_as_a_look_up(tied):
    weights = LAYERS * LAYER + HIDDEN + TABLE
    assert flops_per_token(model(tied), LENGTH) == 6 * weights + ATTENTION


def test_frozen_weights_cost_no_gradients_of_their_own():
    whole = model(tied=False)
    adapted = get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter = LAYERS * 2 * 2 * HIDDEN
    frozen = LAYERS * LAYER + HIDDEN + TABLE
    assert flops_per_token(adapted, LENGTH) == 4 * frozen + 6 * adapter + ATTENTION


def test_a_token_attends_to_the_row_it_stands_in():
    assert attended_length([10, 10]) == 10
    assert attended_length([30, 10]) == 25
    assert attended_length([]) == 0


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("cpu", 0),
    ],
)
def test_a_gpu_is_known_by_its_name(device, peak):
    assert peak_flops(device) == peak


def test_layers_are_fused_on_gpus_only_and_the_run_says_why_not():
    assert kernels.obstacle_to_fusing("llama", use_gpu=False) == "they need a GPU"
    assert kernels.fuse_layers(model(tied=True), use_gpu=False) == "no fused layers: they need a GPU"


def test_a_gpu_without_the_kernels_trains_with_plain_layers(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    assert "luthier[gpu]" in kernels.fuse_layers(model(tied=True), use_gpu=True)
