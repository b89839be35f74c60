"""Fine-tune without Ray: `python -m agents.training.local --spec FILE --base DIR --data DIR --out DIR`, alone or under torchrun.

The spec is a FinetuneSpec as JSON. The same method code runs as in a job; progress goes to stderr, and rank 0 prints one JSON
document with the figures and the engine report on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from agents.training import environment
from agents.training.config import TrainConfig
from agents.training.context import Reporter, TrainContext, Wish
from common.errors import InvalidArgument, LuthierError
from luthier.v1 import job_pb2, training_pb2


class PrintingReporter:
    """Reports to stderr, one line each."""

    def phase(self, phase: str, message: str = "") -> None:
        """A new phase begins."""
        self._say(f"[{phase}] {message}")

    def progress(self, progress: job_pb2.Progress) -> None:
        """How far the run is."""
        self._say(
            f"step {progress.step}/{progress.total_steps}  loss {progress.loss:.4f}  {progress.tokens_per_second:,.0f} tokens/s  "
            f"{progress.remaining.seconds} s left"
        )

    def metrics(self, step: int, values: Mapping[str, float], trial: str = "") -> None:
        """Figures of one step; the progress line says enough."""

    def checkpoint(self, checkpoint: job_pb2.Checkpoint) -> None:
        """A checkpoint was published."""
        self._say(f"checkpoint at step {checkpoint.step}: {checkpoint.uri}")

    def engine(self, report: training_pb2.EngineReport) -> None:
        """What really runs."""
        self._say(f"engine {report.engine_class}, optimiser {report.optimizer_class}, ZeRO stage {report.zero_stage}")

    def _say(self, line: str) -> None:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class SilentReporter(PrintingReporter):
    """For the ranks other than 0."""

    def _say(self, line: str) -> None:
        pass


def train_locally(
    spec: training_pb2.FinetuneSpec,
    base: Path,
    data: Path,
    out: Path,
    *,
    use_gpu: bool,
    run_uri: str = "",
    resume_from: Path | None = None,
    models: Mapping[str, Path] | None = None,
    reporter: Reporter | None = None,
    wish: Callable[[], Wish] = lambda: Wish.NONE,
) -> dict[str, Any]:
    """Run this process's rank of a fine-tune; under torchrun its variables say which. Returns the figures.

    With `run_uri`, a folder in storage, checkpoints are published below it. `resume_from` is a local folder with one. `models`
    are folders of other models that the method reads, by role. A run that `wish` stops leaves no model.
    """
    environment.prepare(use_gpu)
    import torch
    import torch.distributed as dist

    from agents.training.methods.base import find_method

    config = TrainConfig.of(spec)
    alone = not dist.is_initialized()
    if alone:
        init_process_group(use_gpu)
    rank = dist.get_rank()
    reporter = reporter or (PrintingReporter() if rank == 0 else SilentReporter())
    # The ranks of a node share a folder; nodes need not share anything.
    name: list[Any] = [f".luthier-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, src=0, device=torch.device("cuda") if use_gpu else None)
    scratch = out.parent / name[0]
    scratch.mkdir(parents=True, exist_ok=True)
    context = TrainContext(
        config=config,
        base_dir=base,
        base_name=spec.base or base.name,
        data_dir=data,
        output_dir=scratch,
        rank=rank,
        world_size=dist.get_world_size(),
        reporter=reporter,
        use_gpu=use_gpu,
        run_uri=run_uri,
        node=socket.gethostname(),
        models=models or {},
        resume_from=resume_from,
        wish=wish,
    )
    try:
        trained = find_method(config.method).run(context)
        if rank == 0 and not trained.stopped:
            trained.local_dir.replace(out)
        dist.barrier()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if alone:
            dist.destroy_process_group()
    engine = json_format.MessageToDict(trained.engine, preserving_proto_field_name=True)
    return {"kind": trained.kind, "steps": trained.steps, "metrics": trained.metrics, "engine": engine, "model": str(out)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments, train, print the figures. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m agents.training.local", description="Fine-tune without Ray.")
    parser.add_argument("--spec", type=Path, required=True, help="FinetuneSpec as JSON")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.parquet, as a data set version holds it")
    parser.add_argument("--out", type=Path, required=True, help="folder to make for the trained model")
    parser.add_argument("--resume-from", type=Path, help="folder of a checkpoint to go on from")
    parser.add_argument("--gpu", action="store_true", help="train on GPUs, one a rank, over NCCL")
    given = parser.parse_args(arguments)
    try:
        if given.out.exists():
            raise InvalidArgument(f"{given.out} exists already; name a new folder", "OUTPUT_EXISTS")
        given.out.parent.mkdir(parents=True, exist_ok=True)
        spec = read_spec(given.spec)
        result = train_locally(spec, given.base, given.data, given.out, use_gpu=given.gpu, resume_from=given.resume_from)
    except LuthierError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 2 if isinstance(error, InvalidArgument) else 1
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(result, indent=2))
    return 0


def read_spec(path: Path) -> training_pb2.FinetuneSpec:
    """Read a FinetuneSpec from JSON. Raises InvalidArgument naming what cannot be read."""
    try:
        return json_format.Parse(path.read_text(), training_pb2.FinetuneSpec())
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}", "BAD_SPEC") from error
    except json_format.ParseError as error:
        raise InvalidArgument(f"{path} is not a FinetuneSpec: {error}", "BAD_SPEC") from error


def init_process_group(use_gpu: bool) -> None:
    """Join the group that torchrun's variables name, or make one of this process alone."""
    import torch
    import torch.distributed as dist

    backend = "nccl" if use_gpu else "gloo"
    if "RANK" in os.environ:
        if use_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend)
        return
    # DeepSpeed and accelerate read these even where there is one process only.
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    os.environ["MASTER_PORT"] = str(store.port)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)


if __name__ == "__main__":
    sys.exit(main())
