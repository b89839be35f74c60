"""One short training run on the device: by Luthier's own code, or by the bare script that is its peer. No Ray in the process."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.gpu_shapes import SHAPES, build_model, build_tokenizer, token_rows, write_base, write_data

WARM_UP = 4
ADAPTER = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@dataclass(frozen=True)
class Case:
    """What is run. Both sides get the same rows, weights, order, settings and engine."""

    shape: str
    method: str
    batch: int
    zero: int
    fused: bool
    steps: int = 14


class Stamps:
    """When each optimiser step was over, and its loss. A logged loss was read from the device, so the step's kernels have run."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []

    def add(self, loss: float) -> None:
        """Note a step."""
        self.times.append(time.monotonic())
        self.losses.append(loss)


def measure(case: Case, side: str, folder: Path, use_gpu: bool) -> dict[str, Any]:
    """Run a case by one `side` (luthier or peer) and return its figures. An error becomes a part of them.

    Once a process: DeepSpeed lets go of no model, and Liger changes all models to come.
    """
    import torch

    shape, started = SHAPES[case.shape], time.monotonic()
    stamps = Stamps()
    result: dict[str, Any] = {"side": side, **asdict(case)}
    run = {"luthier": _luthier, "peer": _peer}[side]
    try:
        result |= run(case, folder, use_gpu, stamps)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"[:2000]
    if use_gpu:
        result["memory_allocated_bytes"] = torch.cuda.max_memory_allocated()
        result["memory_reserved_bytes"] = torch.cuda.max_memory_reserved()
    result |= utilisation(case, use_gpu)
    steps = [late - early for early, late in zip(stamps.times, stamps.times[1:], strict=False)]
    result |= {"losses": stamps.losses, "step_seconds": steps}
    if len(stamps.times) > WARM_UP:
        seconds = stamps.times[-1] - stamps.times[WARM_UP - 1]
        result["tokens_per_second"] = (len(stamps.times) - WARM_UP) * case.batch * shape.length / seconds
        result["setup_seconds"] = stamps.times[0] - started
        result["mfu"] = result["tokens_per_second"] * result["flops_per_token"] / (result["peak_flops"] or math.inf)
    result["seconds"] = time.monotonic() - started
    return result


def utilisation(case: Case, use_gpu: bool) -> dict[str, float]:
    """What a token costs by the convention in agents/training/speed.py, also for the weights alone, and the device's peak."""
    import torch

    from agents.training.speed import flops_per_token, peak_flops

    shape = SHAPES[case.shape]
    model = build_model(shape, "meta")
    if case.method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**ADAPTER))
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_token": flops_per_token(model, shape.length),
        "flops_per_token_weights": flops_per_token(model, 0),
        "peak_flops": peak_flops(torch.cuda.get_device_name()) if use_gpu else 0.0,
    }


def _luthier(case: Case, folder: Path, use_gpu: bool, stamps: Stamps) -> dict[str, Any]:
    from google.protobuf import json_format

    from agents.training import kernels, local
    from agents.training.context import Wish
    from luthier.v1 import job_pb2, training_pb2

    class Recorder(local.SilentReporter):
        def metrics(self, step: int, values: Mapping[str, float], trial: str = "") -> None:
            figures.update(values)

        def progress(self, progress: job_pb2.Progress) -> None:
            stamps.add(progress.loss)

    shape, figures = SHAPES[case.shape], {}
    base, data = folder / f"base-{case.shape}", folder / f"data-{case.shape}-{case.batch * case.steps}"
    if not data.exists():
        write_base(shape, base)
        write_data(token_rows(shape, case.batch * case.steps), data)
    spec = {
        "base": case.shape,
        "method": case.method,
        "hyperparameters": {
            "max_steps": case.steps,
            "batch_size": case.batch,
            "max_length": shape.length,
            "learning_rate": 1e-5,
            "warmup_ratio": 0.0,
            "scheduler": "constant",
        },
        "sharding": {"zero_stage": case.zero},
        "worker_resources": {"cpus": os.cpu_count() or 1},
        "loss_on": "LOSS_ON_ALL",
        "precision": "PRECISION_BF16",
    }
    with _built(case.shape, use_gpu), _layers(kernels, fused=case.fused):
        trained = local.train_locally(
            json_format.ParseDict(spec, training_pb2.FinetuneSpec()),
            base,
            data,
            folder / "out",
            use_gpu=use_gpu,
            reporter=Recorder(),
            # A run that ends on a wish saves nothing, so gigabytes need not be written.
            wish=lambda: Wish.END if len(stamps.times) >= case.steps - 1 else Wish.NONE,
        )
    return {"engine": trained["engine"], "figures": figures}


def _peer(case: Case, folder: Path, use_gpu: bool, stamps: Stamps) -> dict[str, Any]:
    """What a person would write with TRL, PEFT and DeepSpeed alone."""
    from datasets import Dataset
    from deepspeed import ops
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from agents.training.deepspeed_config import deepspeed_config

    class Clock(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                stamps.add(float(logs["loss"]))

    # Or it would run compilers first, for operators that no run uses; what is timed is the same.
    ops.__compatible_ops__ = {}
    shape = SHAPES[case.shape]
    rows = token_rows(shape, case.batch * case.steps)
    args = SFTConfig(
        output_dir=str(folder / "peer"),
        deepspeed=deepspeed_config(case.zero),
        use_cpu=not use_gpu,
        bf16=True,
        max_steps=case.steps,
        per_device_train_batch_size=case.batch,
        learning_rate=1e-5,
        lr_scheduler_type="constant_with_warmup",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
        use_liger_kernel=case.fused and use_gpu,
        logging_steps=1,
        save_strategy="no",
        seed=42,
        data_seed=42,
        disable_tqdm=True,
        report_to=[],
    )
    trainer = SFTTrainer(
        model=build_model(shape, _device(use_gpu)),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=build_tokenizer(shape),
        peft_config=LoraConfig(**ADAPTER) if case.method == "lora" else None,
        callbacks=[Clock()],
    )
    trainer.train()
    shutil.rmtree(folder / "peer", ignore_errors=True)
    return {}


def _device(use_gpu: bool) -> str:
    return "cuda" if use_gpu else "cpu"


@contextmanager
def _built(shape: str, use_gpu: bool) -> Iterator[None]:
    """Let the model be made on the device instead of read from a folder: writing and reading 16 GB would be most of the run.

    The tokenizer is made, too, because transformers would read one of its own kind for the model from any folder.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = SHAPES[shape]
    with (
        mock.patch.object(
            AutoModelForCausalLM, "from_pretrained", side_effect=lambda *_, **__: build_model(made, _device(use_gpu))
        ),
        mock.patch.object(AutoTokenizer, "from_pretrained", return_value=build_tokenizer(made)),
    ):
        yield


@contextmanager
def _layers(kernels: Any, *, fused: bool) -> Iterator[None]:
    """Fused layers are the default on a GPU; for comparison they are left out."""
    if fused:
        yield
        return
    with mock.patch.object(kernels, "obstacle_to_fusing", return_value="left out for comparison"):
        yield
