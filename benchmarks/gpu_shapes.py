"""What the GPU benchmarks train: real models' shapes with random weights, and rows that fill every position."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.rows import Row, write_split

SEED = 7


@dataclass(frozen=True)
class Shape:
    """A model's shape as its config says it, and the length of a row in tokens."""

    kind: str
    length: int
    values: dict[str, Any] = field(default_factory=dict)


def _shape(kind: str, length: int, hidden: int, mlp: int, layers: int, heads: int, kv: int, vocab: int, tied: bool) -> Shape:
    values = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    return Shape(kind, length, values)


SHAPES = {
    "llama-3-8b": _shape("llama", 4096, 4096, 14336, 32, 32, 8, 128256, False),
    "qwen2.5-0.5b": _shape("qwen2", 4096, 896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": _shape("qwen2", 4096, 1536, 8960, 28, 12, 2, 151936, True),
    # Small enough for a CPU: to rehearse, not to measure.
    "small-llama": _shape("llama", 128, 64, 128, 2, 4, 2, 512, False),
    "small-qwen2": _shape("qwen2", 128, 64, 128, 2, 4, 2, 512, True),
}


def model_config(shape: Shape) -> Any:
    """The config of a shape."""
    from transformers import AutoConfig

    return AutoConfig.for_model(shape.kind, **shape.values)


def build_model(shape: Shape, device: str) -> Any:
    """A model of the shape with random bf16 weights, the same at every call, made on the device in no time."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(model_config(shape), dtype=torch.bfloat16, attn_implementation="sdpa")


def write_base(shape: Shape, folder: Path) -> Path:
    """Write a base model's folder with nothing but its config."""
    folder.mkdir(parents=True, exist_ok=True)
    model_config(shape).save_pretrained(folder)
    return folder


def build_tokenizer(shape: Shape) -> Any:
    """A tokenizer of one word a token: the word is the token's number. The two special ones would be found within numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<pad>", *map(str, range(2, shape.values["vocab_size"]))]
    core = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="<pad>"))  # noqa: S106
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")  # noqa: S106


def token_rows(shape: Shape, count: int) -> list[list[int]]:
    """Rows of random tokens, each exactly as long as the shape's rows: nothing is padded, and packed rows would be the same."""
    dice = random.Random(SEED)
    return [[dice.randrange(2, shape.values["vocab_size"]) for _ in range(shape.length)] for _ in range(count)]


def write_data(rows: list[list[int]], folder: Path) -> Path:
    """Write rows as a data set version holds them: a token of prompt, and an answer that is cut where the row is full."""
    folder.mkdir(parents=True, exist_ok=True)
    split = [Row(prompt=f"{row[0]} ", completion=" ".join(map(str, row[1:])) + " 2") for row in rows]
    write_split(split, folder / "train.parquet")
    return folder
