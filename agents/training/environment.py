"""The process environment of a rank; it has to be right before torch, DeepSpeed and transformers are imported."""

from __future__ import annotations

import os

from common.node import node_home


def rank_environment(use_gpu: bool) -> dict[str, str]:
    """Variables that a rank needs, to be set before the heavy imports."""
    home = node_home()
    variables = {
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": str(home / "torch_extensions"),
        "TRANSFORMERS_VERBOSITY": "error",
        "DS_SKIP_TRITON_CACHE_CHECK": "1",
    }
    return variables if use_gpu else variables | {"DS_ACCELERATOR": "cpu"}


def prepare(use_gpu: bool) -> None:
    """Set this process's environment. Call it first of all."""
    os.environ.update(rank_environment(use_gpu))
    # With this set, accelerate silently trains with plain DDP instead of DeepSpeed.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def limit_threads(cpus: float) -> None:
    """Let torch use as many threads as the rank holds CPUs."""
    import torch

    threads = max(1, int(cpus))
    # accelerate would set a number of its own where the variable is absent.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def join_deepspeed(use_gpu: bool) -> None:
    """Hand the process group to DeepSpeed. ZeRO-3 asks for its size while weights are loaded, before there is an engine."""
    import deepspeed
    from deepspeed import ops

    # DeepSpeed would compile a shared-memory all-reduce, which serves inference only and costs a compiler and a minute. It reads
    # nothing else here; asked for, it would find out about each of its operators by running compilers and looking at GPUs.
    ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    _import_muon_uncompiled()
    deepspeed.init_distributed("nccl" if use_gpu else "gloo", auto_mpi_discovery=False, verbose=False)


def _import_muon_uncompiled() -> None:
    """DeepSpeed imports Muon to ask whether it is in use, and that pulls in all of torch's compiler: five seconds a rank."""
    from deepspeed.runtime import compiler

    compile_function = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_function
