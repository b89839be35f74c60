"""Training on one GPU, without Ray in the process: `python -m benchmarks.gpu_training {checks,kernels,speed} --out FILE`.

- `checks`: our path on a GPU gives what it gives elsewhere (ZeRO stages, adapters, resume, fused layers), on `builtin:tiny`.
- `kernels`: what the device can do at most, and which attention kernel is quickest at these shapes.
- `speed`: tokens/s, model FLOPs utilisation (MFU) and peak memory of real models' shapes with random weights, ours and its peer.

The file is written anew after each run, so that a time limit costs no more than what is running. With `--rehearse` all of it runs
on a CPU with small shapes; those figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.gpu_checks import run_checks
from benchmarks.gpu_runs import Case, measure
from benchmarks.gpu_shapes import SHAPES

LORA_REFERENCE = "NeMo AutoModel, Llama-3-8B LoRA, 4096 packed, one H100: 12,473 tokens/s (its own published figure)"
FULL_AIM = "full fine-tune: 40% model FLOPs utilisation"
# A run is stopped after so many seconds, and none is begun with fewer left.
RUN_SECONDS, LEAST_SECONDS = 60.0, 12.0
PACKAGES = ("torch", "transformers", "deepspeed", "trl", "peft", "accelerate", "liger-kernel", "triton")


def plan(shapes: Sequence[str], rehearse: bool) -> list[tuple[str, Case]]:
    """The runs in order, by side. Both sides take turns, each with and without fused layers; what matters less comes last."""
    runs: list[tuple[str, Case]] = []
    for shape in shapes:
        method, batch = {"llama-3-8b": ("lora", 1), "qwen2.5-1.5b": ("full", 4)}.get(shape, ("full", 8))
        runs += [(side, Case(shape, method, batch, 2, fused)) for fused in (True, False) for side in ("luthier", "peer")]
    for shape in shapes:
        if shape == "llama-3-8b":
            runs.append(("luthier", Case(shape, "lora", 2, 2, True)))
        else:
            runs += [(side, case) for side, case in reversed(runs) if case.shape == shape]
    if rehearse:
        swap = {"llama": "small-llama", "qwen2": "small-qwen2"}
        runs = [(side, Case(swap[SHAPES[c.shape].kind], c.method, 2, c.zero, c.fused, 6)) for side, c in runs]
    return runs


def speed(shapes: Sequence[str], out: Path, folder: Path, rehearse: bool, deadline: float) -> dict[str, Any]:
    """Run the plan as far as the time goes, each run in a process of its own. All import first and then wait for their turn."""
    result: dict[str, Any] = {"references": [LORA_REFERENCE, FULL_AIM], "runs": [], "left_out": []}
    runs = [_Run(side, case, folder / f"{number}", rehearse) for number, (side, case) in enumerate(plan(shapes, rehearse))]
    ahead = max(1, (os.cpu_count() or 1) // 2) if rehearse else len(runs)
    try:
        for number, run in enumerate(runs):
            for other in runs[number : number + ahead]:
                other.start()
            if number == 0:
                for other in runs[:ahead]:
                    other.await_ready(deadline)
                print(f"{ahead} processes wait", flush=True)
            if time.monotonic() + LEAST_SECONDS > deadline:
                result["left_out"].append(f"{run.side} {run.case}")
                continue
            result["runs"].append(figures := run.finish(deadline))
            _say(figures)
            _write(out, result)
    finally:
        for run in runs:
            run.stop()
    return result


class _Run:
    """A run in a process of its own, which imports, tells that it is ready, and runs when it is told to."""

    def __init__(self, side: str, case: Case, folder: Path, rehearse: bool) -> None:
        self.side, self.case, self._folder, self._rehearse = side, case, folder, rehearse
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process, unless it was started before."""
        if self._process is not None:
            return
        self._folder.mkdir(parents=True)
        command = [sys.executable, "-m", "benchmarks.gpu_training", "one", "--out", str(self._folder / "result.json")]
        command += ["--case", json.dumps({"side": self.side, **asdict(self.case)})] + ["--rehearse"] * self._rehearse
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    def await_ready(self, deadline: float) -> None:
        """Wait until the process has imported what it needs, or is gone."""
        while not (self._folder / "ready").exists() and time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                return
            time.sleep(0.02)

    def finish(self, deadline: float) -> dict[str, Any]:
        """Run it and return its figures; what went wrong stands in them, too."""
        assert self._process is not None
        self.await_ready(deadline)
        result: dict[str, Any] = {"side": self.side, **asdict(self.case)}
        try:
            self._process.communicate("go\n", timeout=max(1.0, min(RUN_SECONDS, deadline - time.monotonic())))
            return json.loads((self._folder / "result.json").read_text())
        except subprocess.TimeoutExpired:
            return result | {"error": "took too long", "seconds": RUN_SECONDS}
        except OSError:
            return result | {"error": f"its process ended with status {self._process.poll()}", "seconds": 0.0}
        finally:
            self.stop()

    def stop(self) -> None:
        """End the process, where it lives."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def one(given: argparse.Namespace, use_gpu: bool) -> None:
    """The process of one run."""
    case = json.loads(given.case)
    side = case.pop("side")
    from agents.training.local import init_process_group
    from agents.training.methods import full, lora  # noqa: F401

    (given.out.parent / "ready").touch()
    if not sys.stdin.readline():
        return
    import torch.distributed as dist

    init_process_group(use_gpu)
    _write(given.out, measure(Case(**case), side, given.out.parent, use_gpu) | {"machine": machine(use_gpu)})
    dist.destroy_process_group()


def ceilings(out: Path, use_gpu: bool) -> dict[str, Any]:
    """The device's own rate in a large bf16 product, and the time of attention kernels, forward and backward."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = "cuda" if use_gpu else "cpu"
    result: dict[str, Any] = {"machine": machine(use_gpu), "attention": []}
    size = 8192 if use_gpu else 256
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    result["matmul_tflops"] = 2 * size**3 / _seconds(lambda: left @ right, use_gpu) / 1e12
    length, batch = (4096, 2) if use_gpu else (64, 1)
    for heads, kv_heads, head_size in ((32, 8, 128), (14, 2, 64), (12, 2, 128)):
        states = [
            torch.randn(batch, count, length, head_size, device=device, dtype=torch.bfloat16, requires_grad=True)
            for count in (heads, kv_heads, kv_heads)
        ]
        for name in ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION"):
            entry: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "head_size": head_size, "kernel": name}

            def step(states: list[Any] = states) -> None:
                out = torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=True)
                out.sum().backward()

            try:
                if name == "default":
                    entry["seconds"] = _seconds(step, use_gpu)
                else:
                    with sdpa_kernel(getattr(SDPBackend, name)):
                        entry["seconds"] = _seconds(step, use_gpu)
            except Exception as error:
                entry["error"] = str(error)[:500]
            result["attention"].append(entry)
            _write(out, result)
            print(entry, flush=True)
    print("matmul", result["matmul_tflops"], "TFLOP/s", flush=True)
    return result


def machine(use_gpu: bool) -> dict[str, Any]:
    """Where a figure was measured."""
    import torch

    found = {"python": sys.version.split()[0], "cores": os.cpu_count(), "device": "cpu"}
    if use_gpu:
        found |= {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda or ""}
        found["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except ImportError:
            versions[name] = "absent"
    return {**found, "versions": versions}


def _seconds(work: Any, use_gpu: bool, repeats: int = 10) -> float:
    import torch

    for _ in range(3):
        work()
    if use_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    if use_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def _say(run: dict[str, Any]) -> None:
    layers = "fused" if run["fused"] else "plain"
    line = f"{run['shape']} {run['method']} batch {run['batch']} ZeRO {run['zero']} {layers} {run['side']}: "
    if "error" in run:
        line += run["error"][:300]
    else:
        line += f"{run['tokens_per_second']:,.0f} tokens/s, MFU {run.get('mfu', 0):.1%}"
    print(f"{line}, peak {run.get('memory_allocated_bytes', 0) / 2**30:.1f} GiB, {run['seconds']:.1f} s", flush=True)


def _write(out: Path, result: dict[str, Any]) -> None:
    out.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Run one part and write its file."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_training")
    parser.add_argument("part", choices=("checks", "kernels", "speed", "one"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shapes", nargs="*", default=["qwen2.5-0.5b", "qwen2.5-1.5b", "llama-3-8b"], help="for speed")
    parser.add_argument("--case", default="", help="for one: the case as JSON, told on a line of standard input to begin")
    parser.add_argument("--seconds", type=float, default=3600, help="start no run that would not be over by then")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with small shapes")
    given = parser.parse_args()
    use_gpu, deadline = not given.rehearse, started + given.seconds

    with tempfile.TemporaryDirectory(prefix="luthier-gpu-") as folder:
        if given.part == "speed":
            _write(given.out, speed(given.shapes, given.out, Path(folder), given.rehearse, deadline))
            return
        from agents.training import environment

        environment.prepare(use_gpu)
        if given.part == "one":
            one(given, use_gpu)
        elif given.part == "kernels":
            _write(given.out, ceilings(given.out, use_gpu))
        else:
            from agents.training.local import init_process_group

            # One group for all runs: DeepSpeed keeps hold of the first it sees.
            init_process_group(use_gpu)
            _write(given.out, run_checks(given.out, Path(folder), use_gpu, deadline) | {"machine": machine(use_gpu)})


if __name__ == "__main__":
    main()
