"""A Llama of a few thousand parameters with a real tokenizer and chat template, and rows that it can learn in seconds."""

from __future__ import annotations

import random
from pathlib import Path

from common.rows import Row, write_split

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "alpha", "beta", "gamma"]
COLOURS = ("red", "green", "blue")


def build_micro(folder: Path, *, tie: bool = False) -> Path:
    """Write the model to `folder`. Deterministic."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevel()
    specials = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>", additional_special_tokens=specials[2:]
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def colour_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows whose answer is the one colour among their words."""
    rng = random.Random(seed)
    rows = []
    for line in range(1, count + 1):
        colour = rng.choice(COLOURS)
        words = rng.sample([word for word in WORDS if word not in COLOURS], 3)
        words.insert(rng.randrange(4), colour)
        rows.append(Row(prompt=" ".join(words), completion=colour, label=colour, line=line))
    return rows


def build_data(folder: Path, train: int = 64, test: int = 16) -> Path:
    """Write a data set of colour rows, as a data set version holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_split(colour_rows(train), folder / "train.parquet")
    write_split(colour_rows(test, seed=1), folder / "test.parquet")
    return folder
