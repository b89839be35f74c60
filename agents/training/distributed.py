"""The few collective operations that the ranks need beside those of DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def device(use_gpu: bool) -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")


def agree(number: int, use_gpu: bool) -> int:
    """Rank 0's number, on every rank."""
    answer = torch.tensor([number], device=device(use_gpu))
    dist.broadcast(answer, src=0)
    return int(answer.item())


def gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in order of rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sums(values: list[float], use_gpu: bool) -> list[float]:
    """Element-wise sums over all ranks."""
    total = torch.tensor(values, dtype=torch.float64, device=device(use_gpu))
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    return [float(value) for value in total]


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
