"""Proof that DeepSpeed is the engine: classes and bytes read off the live objects of every rank, not off a flag."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from agents.training.distributed import gather
from agents.training.speed import numel
from common.errors import Internal
from luthier.v1 import training_pb2

ENGINE_CLASS = "deepspeed.runtime.engine.DeepSpeedEngine"
# Where DeepSpeed's stages 1 and 2, and its stage 3, keep the copies that they update; the latter hides them between steps.
_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")


def engine_report(engine: Any, model: torch.nn.Module, zero_stage: int, rank: int, node: str) -> training_pb2.EngineReport:
    """Check the engine right after the first optimiser step and describe it. Collective: every rank has to call it.

    Raises Internal where the engine is not DeepSpeed's, runs another stage, or has spread nothing although it should have.
    """
    engine_class = class_name(engine)
    if engine_class != ENGINE_CLASS:
        raise Internal(
            f"the training engine is {engine_class} instead of {ENGINE_CLASS}; look for ACCELERATE_USE_* in the "
            "environment of the workers and unset it",
            "NOT_DEEPSPEED",
        )
    stage = int(engine.zero_optimization_stage())
    if stage != zero_stage:
        raise Internal(f"DeepSpeed runs ZeRO stage {stage} instead of {zero_stage}", "WRONG_ZERO_STAGE")
    base = base_optimizer(engine.optimizer)
    parameters = list(model.parameters())
    total = sum(numel(parameter) for parameter in parameters)
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    trainable_total = sum(numel(parameter) for parameter in trainable)
    held = sum(_held_numel(parameter) for parameter in parameters)
    moments = sum(tensor.numel() for tensor in _state_tensors(base))
    local = (
        training_pb2.RankReport(
            rank=rank,
            node=node,
            device=torch.cuda.get_device_name() if parameters[0].device.type == "cuda" else "cpu",
            parameter_bytes=sum(_held_bytes(parameter) for parameter in parameters),
            optimizer_bytes=sum(_bytes(tensor) for tensor in _state_tensors(base))
            + _master_bytes(engine.optimizer, base, parameters),
        ).SerializeToString(),
        held,
        moments,
    )
    ranks = gather(local)
    if stage and len(ranks) > 1:
        _check_spread(stage, total, trainable_total, [(held, moments) for _, held, moments in ranks])
    outer = class_name(engine.optimizer)
    return training_pb2.EngineReport(
        engine_class=engine_class,
        optimizer_class=outer if base is engine.optimizer else f"{outer}({class_name(base)})",
        zero_stage=stage,
        world_size=len(ranks),
        backend=dist.get_backend() if dist.is_initialized() else "",
        ranks=[training_pb2.RankReport.FromString(data) for data, _, _ in ranks],
        parameters=total,
        trainable_parameters=trainable_total,
    )


def base_optimizer(optimizer: Any) -> Any:
    """The optimiser at the core, below DeepSpeed's wrappers."""
    while not isinstance(optimizer, torch.optim.Optimizer) or isinstance(
        getattr(optimizer, "optimizer", None), torch.optim.Optimizer
    ):
        optimizer = optimizer.optimizer
    return optimizer


def class_name(thing: Any) -> str:
    """Module and name of a thing's class."""
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _check_spread(stage: int, total: int, trainable: int, ranks: list[tuple[int, int]]) -> None:
    for rank, (held, moments) in enumerate(ranks):
        # Adam keeps two numbers a parameter.
        if moments >= 2 * trainable:
            raise Internal(
                f"rank {rank} holds the whole optimiser state ({moments:,} numbers) although ZeRO stage {stage} spreads it over "
                f"{len(ranks)} ranks",
                "NOT_SHARDED",
            )
        if stage == 3 and held >= total:
            raise Internal(f"rank {rank} holds all {total:,} parameters although ZeRO stage 3 spreads them", "NOT_SHARDED")


def _held(parameter: Any) -> torch.Tensor:
    """The part of a parameter that this rank keeps: all of it, or its ZeRO-3 partition."""
    partition = getattr(parameter, "ds_tensor", None)
    return parameter.data if partition is None or getattr(parameter, "ds_persist", False) else partition


def _held_numel(parameter: Any) -> int:
    return int(_held(parameter).numel())


def _held_bytes(parameter: Any) -> int:
    return _bytes(_held(parameter))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _state_tensors(optimizer: Any) -> Iterable[torch.Tensor]:
    """The moments; step counters are no state worth the name."""
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.numel() > 1)


def _master_bytes(wrapper: Any, optimizer: Any, parameters: list[Any]) -> int:
    """Bytes of the copies that the optimiser updates in place of the model's own parameters."""
    own = {_held(parameter).untyped_storage().data_ptr() for parameter in parameters}
    copies = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for name in _MASTERS:
        copies += getattr(wrapper, name, None) or []
    masters = {tensor.untyped_storage().data_ptr(): _bytes(tensor) for tensor in copies if tensor.numel()}
    return sum(size for storage, size in masters.items() if storage not in own)
