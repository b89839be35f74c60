"""What a training method is, and how one is found by name."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol

from agents.training.context import TrainContext, TrainedModel
from common.errors import InvalidArgument, Violation

ENTRY_POINTS = "luthier.methods"
# Imported when asked for: a method pulls in torch.
_BUILTIN = {
    "full": "agents.training.methods.full:FullMethod",
    "lora": "agents.training.methods.lora:LoraMethod",
    "rslora": "agents.training.methods.lora:RsLoraMethod",
    "dora": "agents.training.methods.lora:DoraMethod",
    "qlora": "agents.training.methods.lora:QloraMethod",
    "pretrain": "agents.training.methods.pretrain:PretrainMethod",
    "dpo": "agents.training.methods.dpo:DpoMethod",
    "kto": "agents.training.methods.kto:KtoMethod",
    "reward": "agents.training.methods.reward:RewardMethod",
    "grpo": "agents.training.methods.grpo:GrpoMethod",
    "rloo": "agents.training.methods.rloo:RlooMethod",
}


class Method(Protocol):
    """A way to train. It owns its loop; it reports and stops through the context."""

    name: str
    # full or adapter: what its result is, and so how it is served.
    model_kind: str

    def run(self, context: TrainContext) -> TrainedModel:
        """Train on this rank. Every rank runs it; rank 0 leaves the model in the context's output folder."""


def method_names() -> list[str]:
    """Names of all methods, the built-in ones first, then those of installed packages (entry points `luthier.methods`)."""
    return [*_BUILTIN, *sorted(point.name for point in entry_points(group=ENTRY_POINTS) if point.name not in _BUILTIN)]


def find_method(name: str) -> Method:
    """Return a method by its name. Raises InvalidArgument listing those there are."""
    if name in _BUILTIN:
        module, _, attribute = _BUILTIN[name].partition(":")
        method: Method = getattr(import_module(module), attribute)()
        return method
    for point in entry_points(group=ENTRY_POINTS):
        if point.name == name:
            found: Method = point.load()()
            return found
    raise InvalidArgument.of(
        [Violation("method", f"{name!r} is not a method; there are {', '.join(method_names())}")], "UNKNOWN_METHOD"
    )
