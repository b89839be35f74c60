"""Real tokens per second of a fine-tune on rows of uneven length: our defaults against TRL's three ways.

A Llama of four million parameters and 256 texts of log-normal length (mean 99, longest 500 tokens); each run in a process of its
own with one thread, in turn. Model, rows, batches of 8 rows, learning rate, schedule and epochs are the same for all, and
everything else is each one's default. Padding counts for nothing: tokens are those of the rows. Processor time is told beside the
clock's, because a busy machine stretches the one much less than the other.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.packing_run import BATCH, EPOCHS, LEARNING_RATE, MAX_LENGTH, SEED, THREADS, VARIANTS
from benchmarks.report import Spread, keep, machine

COMMAND = "python -m benchmarks.packing"
ROUNDS = 3
ROWS, HELD_OUT = 256, 64
MEAN, LONGEST, SIGMA = 99, 500, 0.8


def main() -> None:
    """Measure and keep the result."""
    before = machine()
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = build(folder)
        for number in range(ROUNDS):
            names = list(VARIANTS)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                runs[name].append(run(name, folder))
                print(number, name, runs[name][-1], flush=True)
    clock, processor = rates(runs, "seconds"), rates(runs, "processor_seconds")
    medians = {
        key: {name: statistics.median(each[key] for each in sample) for name, sample in runs.items()}
        for key in ("steps", "tokens", "loss")
    }
    result: dict[str, Any] = {
        "what": "real tokens per second of the training loop; the loss is that of held-out tokens after it",
        "rounds": ROUNDS,
        "threads": THREADS,
        "data": data,
        "settings": {"batch": BATCH, "epochs": EPOCHS, "learning_rate": LEARNING_RATE, "max_length": MAX_LENGTH},
        "tokens_per_second": spreads(clock),
        "tokens_per_processor_second": spreads(processor),
        "ratio_luthier_to": spreads(ratios(clock)),
        "ratio_luthier_to_by_processor_time": spreads(ratios(processor)),
        **medians,
        "machine": before | {"load_after": os.getloadavg()[0]},
    }
    path = keep("packing", COMMAND, result)
    for name in VARIANTS:
        rate, loss = statistics.median(processor[name]), medians["loss"][name]
        print(f"{name:26} {rate:8,.0f} tokens per second of processor time, held-out loss {loss:.3f}")
    print(path)


def rates(runs: dict[str, list[dict[str, float]]], clock: str) -> dict[str, list[float]]:
    """Tokens per second of each run, by the clock named."""
    return {name: [each["tokens"] / each[clock] for each in sample] for name, sample in runs.items()}


def ratios(given: dict[str, list[float]]) -> dict[str, list[float]]:
    """Our rate to that of each peer, round by round."""
    ours = given["luthier"]
    peers = {name: sample for name, sample in given.items() if name != "luthier"}
    return {name: [our / peer for our, peer in zip(ours, sample, strict=True)] for name, sample in peers.items()}


def spreads(given: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles of each sample."""
    return {name: vars(Spread.of(sample)) for name, sample in given.items()}


def build(folder: Path) -> dict[str, float]:
    """Write model and rows, and say what the rows are like."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from agents.models.builtin import build_tokenizer, docstrings
    from common.rows import Row, write_split

    tokenizer = build_tokenizer()
    tokenizer.chat_template = None  # plain texts, which TRL and we then tokenise alike
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rng = random.Random(0)
    words = tokenizer(" ".join(docstrings()), add_special_tokens=False)["input_ids"]
    mean_of_log = math.log(MEAN) - SIGMA**2 / 2
    rows, lengths = [], []
    for line in range(1, ROWS + HELD_OUT + 1):
        length = max(4, min(LONGEST, round(rng.lognormvariate(mean_of_log, SIGMA))))
        start = rng.randrange(len(words) - length)
        rows.append(Row(completion=str(tokenizer.decode(words[start : start + length])), line=line))
        lengths.append(length)
    (folder / "data").mkdir()
    write_split(rows[:ROWS], folder / "data" / "train.parquet")
    write_split(rows[ROWS:], folder / "data" / "test.parquet")
    shown = sorted(lengths[:ROWS])
    return {
        "parameters": float(model.num_parameters()),
        "rows": ROWS,
        "mean": statistics.mean(shown),
        "median": statistics.median(shown),
        "longest": shown[-1],
    }


def run(variant: str, folder: Path) -> dict[str, float]:
    """One run in a process of its own."""
    environment = os.environ | {
        "LUTHIER_NODE_HOME": str(folder / "node"),
        "OMP_NUM_THREADS": str(THREADS),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "benchmarks.packing_run", variant, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{variant} failed:\n{done.stderr[-4000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    main()
