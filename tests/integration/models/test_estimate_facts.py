"""What the coordinator knows of the built-in model, which it cannot build itself, is so."""

from __future__ import annotations

from agents.models.builtin import build_tokenizer, tiny_config
from coordinator.estimates.estimate import TINY


def test_the_built_in_model_is_as_large_as_estimates_say() -> None:
    from transformers import LlamaForCausalLM

    config = tiny_config(len(build_tokenizer()))
    model = LlamaForCausalLM(config)
    found = sum(each.numel() for each in model.parameters())
    assert abs(found - TINY.parameters) < 0.02 * found
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (
        TINY.hidden,
        TINY.layers,
        TINY.intermediate,
    )
