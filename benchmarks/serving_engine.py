"""Tokens a second of the engine: sixteen answers at once against transformers' `generate`, and eight adapters mixed and in turn.

One Llama of four million parameters with random weights, which never ends an answer by itself; 64 greedy tokens each, two
threads. `generate` is transformers' own, on the sixteen prompts as one padded batch, which is its best case: all of them are
there at the beginning and end together. In turn means one adapter's answer after the other, by an engine that has one at a time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import Spread, keep, machine

COMMAND = "python -m benchmarks.serving_engine"
ROUNDS = 12
TOKENS = 64
WORDS = [f"{first} {second}" for first in ("old", "quick", "brown") for second in ("fox", "dog", "page", "tool", "door", "key")]


def build(folder: Path) -> Path:
    """Write the model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from agents.models.builtin import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Some other logit is always above these.
        for token in tokenizer.all_special_ids:
            model.lm_head.weight[token] = 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompt(number: int) -> str:
    """A prompt of some 40 tokens, another one each time."""
    return " ".join(WORDS[(number + place) % len(WORDS)] for place in range(12)) + f" {number}"


def main() -> None:
    """Measure and keep the result."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from serving.engines import Request, SamplingParams, load_engine
    from tests.integration.serving.test_adapters import build_adapter

    before = machine()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory(prefix="ls-") as name:
        folder = Path(name)
        base = build(folder / "model")
        lanes = load_engine(base).lanes()
        names = [f"adapter-{number}" for number in range(8)]
        for number, each in enumerate(names):
            shape = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
            lanes.add_adapter(each, build_adapter(base, folder / each, shape, number))()
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        params = SamplingParams(max_tokens=TOKENS)
        start = 0

        def engine(groups: list[list[str]]) -> int:
            nonlocal start
            done: list[Any] = []
            for group in groups:
                for adapter in group:
                    start += 1  # a prompt that it has not seen
                    lanes.join(Request(prompt(start), params, adapter=adapter), done.append)
                while lanes.busy:
                    lanes.step()
            return sum(each.completion_tokens for each in done)

        def generate() -> int:
            nonlocal start
            start += 16
            batch = tokenizer([prompt(number) for number in range(start, start + 16)], return_tensors="pt", padding=True)
            batch.pop("token_type_ids", None)
            with torch.inference_mode():
                output = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
            texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :])
            return len(texts) * (output.shape[1] - batch["input_ids"].shape[1])

        cases: dict[str, Callable[[], int]] = {
            "sixteen": lambda: engine([[""] * 16]),
            "generate": generate,
            "mixed": lambda: engine([names]),
            "in_turn": lambda: engine([[each] for each in names]),
        }
        rates: dict[str, list[float]] = {case: [] for case in cases}
        for number in range(ROUNDS + 1):
            for case, run in cases.items():
                begun = time.perf_counter()
                tokens = run()
                if number:  # the first is a warm-up
                    rates[case].append(tokens / (time.perf_counter() - begun))
    pairs = (("sixteen", "generate"), ("mixed", "in_turn"))
    ratios = {f"{ours}_to_{peer}": [a / b for a, b in zip(rates[ours], rates[peer], strict=True)] for ours, peer in pairs}
    result: dict[str, Any] = {"what": "tokens a second, 4M-parameter Llama, 64 greedy tokens an answer", "rounds": ROUNDS}
    result |= {case: vars(Spread.of(sample)) for case, sample in rates.items()}
    result |= {f"ratio_{name}": vars(Spread.of(sample)) for name, sample in ratios.items()}
    path = keep("serving_engine", COMMAND, result | {"machine": before})
    print({name: round(statistics.median(sample), 2) for name, sample in {**rates, **ratios}.items()}, path)


if __name__ == "__main__":
    main()
