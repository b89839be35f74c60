"""Runs a list of fine-tunes in several processes over gloo, as torchrun would start them: `python training_ranks.py PLAN RANK`.

The plan is JSON: {port, world_size, base, data, out, runs: [{name, spec, storage?, nodes?, resume?, pause_at?, finish_at?, data?,
inputs?}]}. A run may have `data` of its own, and folders of other models that it reads by role (`inputs`).
Rank 0 writes OUT/{name}.json after each run, with the losses of every step. With `nodes` every rank has a home of its own, as
on a node of its own. `resume` is the URI of a checkpoint; after step `pause_at` a pause is wished, after `finish_at` an early
end. All runs share the processes, because importing torch and DeepSpeed takes longer than training.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from google.protobuf import json_format


def run_plan(plan: dict[str, Any], folder: Path, timeout: float = 300.0) -> dict[str, dict[str, Any]]:
    """Start the ranks, wait for them, and return what each run reported, by name."""
    path = folder / "plan.json"
    path.write_text(json.dumps(plan))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "LUTHIER_NODE_HOME": str(folder / "node")}
    logs = [folder / f"rank-{rank}.log" for rank in range(plan["world_size"])]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            command = [sys.executable, __file__, str(path), str(rank)]
            processes.append(subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT))
    try:
        failed = [rank for rank, process in enumerate(processes) if process.wait(timeout)]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not failed, "\n".join(f"rank {rank}:\n{logs[rank].read_text()[-4000:]}" for rank in failed)
    out = Path(plan["out"])
    return {run["name"]: json.loads((out / f"{run['name']}.json").read_text()) for run in plan["runs"]}


def _main(plan_path: str, rank: int) -> None:
    plan = json.loads(Path(plan_path).read_text())
    world_size = plan["world_size"]
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(plan["port"]),
    }
    from agents.training import environment

    environment.prepare(use_gpu=False)
    import torch.distributed as dist

    from agents.training import local
    from agents.training.context import Wish
    from common import manifest
    from luthier.v1 import job_pb2, training_pb2

    class Recorder(local.SilentReporter):
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.figures: list[dict[str, float]] = []
            self.checkpoints: list[str] = []
            self.judged: dict[str, float] = {}

        def metrics(self, step: int, values: Any, trial: str = "") -> None:
            self.losses.append(values["loss"])
            self.figures.append(dict(values))

        def checkpoint(self, checkpoint: job_pb2.Checkpoint) -> None:
            self.checkpoints.append(checkpoint.uri)
            self.judged = dict(checkpoint.metrics)

    dist.init_process_group("gloo")
    out = Path(plan["out"])
    for run in plan["runs"]:
        recorder = Recorder()
        spec = json_format.ParseDict(run["spec"], training_pb2.FinetuneSpec())
        resume = manifest.fetch(run["resume"]) if run.get("resume") else None
        wishes = {kind: run[f"{kind.name.lower()}_at"] for kind in (Wish.PAUSE, Wish.FINISH) if f"{kind.name.lower()}_at" in run}

        def wish(recorder: Recorder = recorder, wishes: dict[Wish, int] = wishes) -> Wish:
            return next((kind for kind, step in wishes.items() if len(recorder.losses) >= step), Wish.NONE)

        node = f"node-{rank}" if run.get("nodes") else ""
        os.environ["LOCAL_RANK"] = "0" if node else str(rank)
        result = local.train_locally(
            spec,
            Path(plan["base"]),
            Path(run.get("data", plan["data"])),
            out / node / run["name"],
            use_gpu=False,
            run_uri=run.get("storage", ""),
            resume_from=resume,
            models={role: Path(folder) for role, folder in run.get("inputs", {}).items()},
            reporter=recorder,
            wish=wish,
        )
        if rank == 0:
            result |= {name: getattr(recorder, name) for name in ("losses", "checkpoints", "figures", "judged")}
            (out / f"{run['name']}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
