"""One training run of the packing benchmark, in a process of its own: `python -m benchmarks.packing_run VARIANT FOLDER`.

FOLDER holds the model (`base`) and the rows (`data`). Prints {tokens, seconds, steps, loss} as JSON: the real tokens that were
trained on, the time of the training loop alone, also the processor's, and the mean loss of a held-out token after it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EPOCHS = 1
BATCH = 8
LEARNING_RATE = 1e-3
MAX_LENGTH = 512
SEED = 7
THREADS = 1
# What TRL is told beside the model, the data and the settings of the optimisation, which are the same for all.
VARIANTS: dict[str, dict[str, Any]] = {
    "luthier": {},
    "trl_defaults": {},
    "trl_group_by_length": {"train_sampling_strategy": "group_by_length"},
    "trl_packing": {"packing": True},
}
# The fastest of them once more, computing in fp32 and without recomputed activations, as we do by default on a CPU.
VARIANTS["trl_group_by_length_fp32"] = VARIANTS["trl_group_by_length"] | {"gradient_checkpointing": False, "bf16": False}


def train_luthier(folder: Path, out: Path) -> dict[str, float]:
    """Train as a job with default settings does, without Ray."""
    from agents.training import local
    from luthier.v1 import training_pb2

    spec = training_pb2.FinetuneSpec(base="base", loss_on=training_pb2.LOSS_ON_ALL, method="full")
    hyper = spec.hyperparameters
    hyper.learning_rate, hyper.epochs, hyper.seed, hyper.max_length = LEARNING_RATE, EPOCHS, SEED, MAX_LENGTH
    hyper.warmup_ratio = 0.0  # as TRL's default is
    spec.worker_resources.cpus = THREADS
    processor: dict[str, float] = {}

    class Clock(local.SilentReporter):
        """Notes the processor time at the beginning of each phase; saving begins when training has ended."""

        def phase(self, phase: str, message: str = "") -> None:
            processor[phase] = time.process_time()

    base, data = folder / "base", folder / "data"
    metrics = local.train_locally(spec, base, data, out, use_gpu=False, reporter=Clock())["metrics"]
    return {
        "tokens": metrics["train_tokens"],
        "seconds": metrics["train_seconds"],
        "processor_seconds": processor["saving"] - processor["training"],
        "steps": metrics["train_steps"],
    }


def train_trl(folder: Path, out: Path, options: dict[str, Any]) -> dict[str, float]:
    """Train with TRL alone; where not said otherwise, with its defaults."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from common.rows import read_split

    texts = Dataset.from_dict({"text": [row.completion for row in read_split(folder / "data" / "train.parquet")]})
    args = SFTConfig(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        learning_rate=LEARNING_RATE,
        max_length=MAX_LENGTH,
        seed=SEED,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="float32")
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=texts, processing_class=AutoTokenizer.from_pretrained(folder / "base")
    )
    started, processor = time.monotonic(), time.process_time()
    trainer.train()
    figures = {
        "tokens": float(trainer._total_train_tokens),
        "seconds": time.monotonic() - started,
        "processor_seconds": time.process_time() - processor,
        "steps": float(trainer.state.global_step),
    }
    trainer.save_model(str(out))
    return figures


def held_out_loss(folder: Path, model_dir: Path) -> float:
    """Mean loss of a held-out token, row by row and in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from common.rows import read_split

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    loss = tokens = 0.0
    with torch.no_grad():
        for row in read_split(folder / "data" / "test.parquet"):
            ids = torch.tensor([tokenizer(row.completion)["input_ids"] + [tokenizer.eos_token_id]])
            loss += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    return loss / tokens


def main(variant: str, folder: Path) -> None:
    """Train and print the figures."""
    from agents.training import environment

    environment.prepare(use_gpu=False)
    environment.limit_threads(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "model"
        run = train_luthier(folder, out) if variant == "luthier" else train_trl(folder, out, VARIANTS[variant])
        print(json.dumps(run | {"loss": held_out_loss(folder, out)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
