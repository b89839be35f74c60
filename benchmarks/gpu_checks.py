"""Does our path compute on a GPU what it is to compute? Short runs of `builtin:tiny` whose losses have to agree, and a resume."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

STEPS, SAVED_AT = 8, 4


@dataclass(frozen=True)
class Check:
    """One run: what is trained, how, and the run whose losses it has to repeat within `tolerance` (0: to the bit)."""

    name: str
    method: str
    zero: int
    precision: str
    fused: bool = False
    like: str = ""
    tolerance: float = 0.0
    resume: bool = False


# Sums in another order part in the last bits: of fp32 in most runs here, of bf16 in those that say so.
CHECKS = (
    Check("fp32-zero2", "full", 2, "FP32"),
    Check("bf16-zero0", "full", 0, "BF16", like="fp32-zero2", tolerance=0.05),
    Check("bf16-zero2", "full", 2, "BF16", like="fp32-zero2", tolerance=0.05),
    Check("bf16-zero2-resumed", "full", 2, "BF16", like="bf16-zero2", resume=True),
    Check("bf16-zero2-fused", "full", 2, "BF16", fused=True, like="bf16-zero2", tolerance=0.01),
    Check("fp32-zero2-fused", "full", 2, "FP32", fused=True, like="fp32-zero2", tolerance=1e-4),
    Check("fp32-zero3", "full", 3, "FP32", like="fp32-zero2", tolerance=1e-4),
    Check("fp32-zero0", "full", 0, "FP32", like="fp32-zero2", tolerance=1e-4),
    Check("lora-bf16-zero0", "lora", 0, "BF16"),
    Check("lora-bf16-zero2", "lora", 2, "BF16", like="lora-bf16-zero0", tolerance=0.05),
    Check("lora-bf16-zero2-resumed", "lora", 2, "BF16", like="lora-bf16-zero2", resume=True),
    Check("lora-bf16-zero3-fused", "lora", 3, "BF16", fused=True, like="lora-bf16-zero2", tolerance=0.01),
)


def run_checks(out: Path, folder: Path, use_gpu: bool, deadline: float) -> dict[str, Any]:
    """Run all checks as far as the time goes; the file `out` is written after each."""
    from agents.models.builtin import build_tiny

    base, data = build_tiny(folder / "base"), _data(folder / "data")
    done: dict[str, dict[str, Any]] = {}
    for check in CHECKS:
        if time.monotonic() > deadline:
            break
        started = time.monotonic()
        try:
            run = _run(check, base, data, folder, use_gpu)
        except Exception as error:
            run = {"error": f"{type(error).__name__}: {error}"[:2000], "losses": []}
        run |= _verdict(check, run, done)
        run["seconds"] = time.monotonic() - started
        done[check.name] = run
        told = {key: run[key] for key in ("agrees", "largest_difference", "same_weights", "error") if key in run}
        print(f"{check.name}: {told} {[round(loss, 4) for loss in run['losses']]} {run['seconds']:.1f} s", flush=True)
        out.write_text(json.dumps({"checks": done}, indent=1) + "\n")
    return {"checks": done}


def _run(check: Check, base: Path, data: Path, folder: Path, use_gpu: bool) -> dict[str, Any]:
    from google.protobuf import json_format

    from agents.training import kernels, local
    from common import manifest
    from luthier.v1 import job_pb2, training_pb2

    storage = (folder / "storage").as_uri()
    losses: list[float] = []
    figures: dict[str, float] = {}
    checkpoints: list[str] = []

    class Recorder(local.SilentReporter):
        def metrics(self, step: int, values: Mapping[str, float], trial: str = "") -> None:
            losses.append(values["loss"])
            figures.update(values)

        def checkpoint(self, checkpoint: job_pb2.Checkpoint) -> None:
            checkpoints.append(checkpoint.uri)

    spec = {
        "base": "builtin:tiny",
        "method": check.method,
        "hyperparameters": {"max_steps": STEPS, "batch_size": 8, "max_length": 256, "learning_rate": 1e-3},
        "sharding": {"zero_stage": check.zero},
        "checkpoints": {"every_steps": SAVED_AT},
        "worker_resources": {"cpus": 4},
        "precision": f"PRECISION_{check.precision}",
    }
    resume_from = manifest.fetch(f"{storage}/{check.like}/checkpoints/step-{SAVED_AT}") if check.resume else None
    why = "" if check.fused and use_gpu else "left out for comparison"
    with mock.patch.object(kernels, "obstacle_to_fusing", return_value=why):
        trained = local.train_locally(
            json_format.ParseDict(spec, training_pb2.FinetuneSpec()),
            base,
            data,
            folder / check.name,
            use_gpu=use_gpu,
            run_uri=f"{storage}/{check.name}",
            resume_from=resume_from,
            reporter=Recorder(),
        )
    run: dict[str, Any] = {"losses": losses, "engine": trained["engine"], "figures": figures, "checkpoints": len(checkpoints)}
    if check.resume:
        run["same_weights"] = _same_weights(folder / check.name, folder / check.like)
    return run


def _verdict(check: Check, run: dict[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    other = done.get(check.like, {}).get("losses", [])
    if not check.like or not run["losses"] or not other:
        return {}
    tail = other[-len(run["losses"]) :]
    apart = max(abs(mine - theirs) for mine, theirs in zip(run["losses"], tail, strict=True))
    return {"like": check.like, "largest_difference": apart, "tolerance": check.tolerance, "agrees": apart <= check.tolerance}


def _same_weights(one: Path, other: Path) -> bool:
    names = [path.name for path in one.glob("*.safetensors")]
    return bool(names) and all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def _data(folder: Path) -> Path:
    from common.rows import Row, write_split

    folder.mkdir(parents=True)
    rows = [
        Row(prompt=f"What is {n} and {n + 7}? ", completion=f"Together they are {2 * n + 7}, " * (1 + n % 5)) for n in range(64)
    ]
    write_split(rows, folder / "train.parquet")
    return folder
