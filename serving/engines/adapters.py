"""Many LoRA adapters on one base: each sequence of a batch is computed with its own (after S-LoRA, Sheng et al., 2023).

An adapted layer computes base(x) + scale * B(A(x)), with A and B of the row's adapter; rows without one get zeros, which change
nothing. Smaller ranks are padded with zeros. With DoRA (Liu et al., 2024) the sum is multiplied by magnitude /
norm(W + scale * B A), which is known once the adapter is loaded.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from common.errors import InvalidArgument, ResourceExhausted
from common.model_files import check_model_folder

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?")
# What PEFT can do beyond a pair of matrices beside a linear layer, and we cannot.
_REFUSED = (
    *("modules_to_save", "trainable_token_indices", "layer_replication", "megatron_config", "lora_bias", "target_parameters"),
    *("alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "velora_config"),
)


@dataclass
class _Part:
    """An adapter's share in one layer: A (rank x in), B (out x rank) with the scale in it, and DoRA's factor (out) or None."""

    a: torch.Tensor
    b: torch.Tensor
    factor: torch.Tensor | None


@dataclass
class Adapter:
    """A loaded adapter: its parts by module, and the bytes they take."""

    parts: Mapping[str, _Part]
    nbytes: int
    rank: int


def read_adapter(folder: Path, model: nn.Module) -> Adapter:
    """Read an adapter for `model`. Raises InvalidArgument where not all of it applies: never is a part of it left out."""
    name = folder.name
    check_model_folder(folder)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise InvalidArgument(f"adapter_config.json in {name} cannot be read: {error}"[:300], "BAD_ADAPTER") from error
    if not isinstance(config, LoraConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise InvalidArgument(f"{name} is a {kind} adapter; only LORA can be served", "BAD_ADAPTER")
    if odd := [option for option in _REFUSED if getattr(config, option, None)]:
        raise InvalidArgument(f"{name} cannot be served as an adapter: it uses {', '.join(odd)}", "BAD_ADAPTER")
    if config.bias != "none":
        raise InvalidArgument(f"{name} cannot be served as an adapter: it trains biases ({config.bias})", "BAD_ADAPTER")
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise InvalidArgument(f"{name} has no adapter_model.safetensors", "BAD_ADAPTER")
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(file).items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise InvalidArgument(f"the adapter in {name} does not fit its base in full: {key} has no place in it", "BAD_ADAPTER")
        found.setdefault(match["module"], {})[match["part"]] = tensor
    modules = dict(model.named_modules())
    wanted = {module for module, layer in modules.items() if _targets(config, module, layer)}
    for problem, odd_modules in (
        ("are missing from the adapter", wanted - found.keys()),
        ("have no place in the base", found.keys() - wanted),
    ):
        if odd_modules:
            raise InvalidArgument(
                f"the adapter in {name} does not fit its base in full: {_list(odd_modules)} {problem}", "BAD_ADAPTER"
            )
    if not found:
        raise InvalidArgument(f"the adapter in {name} adapts nothing", "BAD_ADAPTER")
    parts = {module: _part(name, module, modules[module], tensors, config) for module, tensors in found.items()}
    tensors = [tensor for part in parts.values() for tensor in (part.a, part.b, part.factor) if tensor is not None]
    return Adapter(parts, sum(tensor.nbytes for tensor in tensors), max(part.a.shape[0] for part in parts.values()))


def _targets(config: LoraConfig, module: str, layer: nn.Module) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    if not isinstance(layer, nn.Linear | Conv1D) or not module:
        return False
    if config.target_modules == "all-linear":
        return not module.endswith(("lm_head", "embed_out"))
    return bool(check_target_module_exists(config, module))


def _part(name: str, module: str, layer: nn.Module, tensors: Mapping[str, torch.Tensor], config: LoraConfig) -> _Part:
    if not {"lora_A", "lora_B"} <= tensors.keys() or ("lora_magnitude_vector" in tensors) != bool(config.use_dora):
        raise InvalidArgument(f"the adapter in {name} does not fit its base in full: {module} is not whole", "BAD_ADAPTER")
    weight = _weight(layer)
    a, b = tensors["lora_A"].to(weight), tensors["lora_B"].to(weight)
    rank = _of_pattern(config.rank_pattern, module, config.r)
    alpha = _of_pattern(config.alpha_pattern, module, config.lora_alpha)
    if a.shape != (rank, weight.shape[1]) or b.shape != (weight.shape[0], rank):
        raise InvalidArgument(
            f"the adapter in {name} does not fit its base: in {module} its matrices are {tuple(a.shape)} and {tuple(b.shape)}, "
            f"but rank {rank} on a layer of {weight.shape[1]} inputs and {weight.shape[0]} outputs needs "
            f"{(rank, weight.shape[1])} and {(weight.shape[0], rank)}",
            "BAD_ADAPTER",
        )
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise InvalidArgument(f"the adapter in {name} holds numbers that are none, in {module}", "BAD_ADAPTER")
    b = b * (alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)
    factor = None
    if config.use_dora:
        magnitude = tensors["lora_magnitude_vector"].to(weight)
        factor = magnitude / torch.linalg.norm(weight + b @ a, dim=1).to(weight.dtype)
    return _Part(a, b, factor)


def _of_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> Any:
    """The value for a module: that of the first pattern which names it or the end of its path, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _weight(layer: nn.Module) -> torch.Tensor:
    """A layer's weight as outputs x inputs."""
    weight: torch.Tensor = layer.weight.data  # type: ignore[assignment, union-attr]
    return weight.T if isinstance(layer, Conv1D) else weight


class _Stack:
    """The parts of all adapters in one layer, by place, in one tensor each; and the hook that adds the rows' own."""

    def __init__(self, layer: nn.Module, bank: AdapterBank) -> None:
        weight = _weight(layer)
        self._bank = bank
        self._bias = getattr(layer, "bias", None)
        self._a = weight.new_zeros(1, 0, weight.shape[1])
        self._b = weight.new_zeros(1, weight.shape[0], 0)
        self._factors: torch.Tensor | None = None
        layer.register_forward_hook(self._add)

    def set(self, place: int, part: _Part | None) -> None:
        """Put a part in its place; None empties it."""
        places, rank = max(place + 1, self._a.shape[0]), max(self._a.shape[1], part.a.shape[0] if part else 0)
        if (places, rank) != self._a.shape[:2]:
            a, b = self._a.new_zeros(places, rank, self._a.shape[2]), self._b.new_zeros(places, self._b.shape[1], rank)
            a[: self._a.shape[0], : self._a.shape[1]] = self._a
            b[: self._b.shape[0], :, : self._b.shape[2]] = self._b
            self._a, self._b = a, b
        self._a[place], self._b[place] = 0, 0
        if part is not None:
            self._a[place, : part.a.shape[0]] = part.a
            self._b[place, :, : part.b.shape[1]] = part.b
        if part is not None and part.factor is not None and self._factors is None:
            self._factors = self._b.new_ones(places, self._b.shape[1])
        if self._factors is not None:
            if self._factors.shape[0] < places:
                self._factors = torch.cat(
                    [self._factors, self._factors.new_ones(places - self._factors.shape[0], self._factors.shape[1])]
                )
            self._factors[place] = 1 if part is None or part.factor is None else part.factor

    def _add(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        places = self._bank.places
        if places is None or not self._a.shape[1]:
            return None
        x = inputs[0]
        if isinstance(places, int):
            added = nn.functional.linear(nn.functional.linear(x, self._a[places]), self._b[places])
            factor = self._factors[places] if self._factors is not None else None
        else:
            added = torch.bmm(torch.bmm(x, self._a[places].transpose(1, 2)), self._b[places].transpose(1, 2))
            factor = self._factors[places][:, None] if self._factors is not None else None
        if factor is None:
            return output + added
        if self._bias is None:
            return (output + added) * factor
        return (output - self._bias + added) * factor + self._bias


class AdapterBank:
    """The adapters of one loaded base. They come when they are asked for, and the one that was not used for longest makes room.

    All but `load` is for the thread that runs the model.
    """

    def __init__(self, model: nn.Module, budget_bytes: int) -> None:
        self._model = model
        self._budget = budget_bytes
        self._stacks: dict[str, _Stack] = {}
        self._places: OrderedDict[str, int] = OrderedDict()
        self._adapters: dict[str, Adapter] = {}
        self._pinned: set[str] = set()
        self._used: dict[str, int] = {}
        # What the rows of the next pass use: None for none of them any, a place for all of them the same, else a place each.
        self.places: int | torch.Tensor | None = None

    @property
    def names(self) -> list[str]:
        """Adapters that are loaded, the one that was used last at the end."""
        return list(self._places)

    def load(self, folder: Path) -> Adapter:
        """Read an adapter from its folder, without changing anything. Any thread may call it."""
        return read_adapter(folder, self._model)

    def add(self, name: str, adapter: Adapter, pinned: bool = False) -> None:
        """Make an adapter ready for use, letting others go where there is no room for all. A name stands for one content.

        Raises ResourceExhausted where those that are in use or pinned leave no room.
        """
        if pinned:
            self._pinned.add(name)
        if name in self._places:
            self._places.move_to_end(name)
            return
        while self._places and sum(each.nbytes for each in self._adapters.values()) + adapter.nbytes > self._budget:
            idle = next((each for each in self._places if each not in self._pinned and not self._used.get(each)), None)
            if idle is None:
                raise ResourceExhausted("all adapters that fit into memory are in use; try again", "ADAPTERS_BUSY")
            self.remove(idle)
        taken = set(self._places.values())
        place = next(number for number in range(1, len(taken) + 2) if number not in taken)
        modules = dict(self._model.named_modules())
        for module, part in adapter.parts.items():
            if module not in self._stacks:
                self._stacks[module] = _Stack(modules[module], self)
            self._stacks[module].set(place, part)
        for module, stack in self._stacks.items():
            if module not in adapter.parts:
                stack.set(place, None)
        self._places[name] = place
        self._adapters[name] = adapter

    def remove(self, name: str) -> None:
        """Let an adapter go. Nobody may be using it."""
        assert not self._used.get(name), f"{name} is in use"
        place = self._places.pop(name)
        for stack in self._stacks.values():
            stack.set(place, None)
        del self._adapters[name]
        self._pinned.discard(name)

    def hold(self, name: str) -> None:
        """Keep an adapter for a sequence until `release`. Raises KeyError where it is not loaded."""
        if name:
            self._places.move_to_end(name)
            self._used[name] = self._used.get(name, 0) + 1

    def release(self, name: str) -> None:
        """A sequence needs an adapter no longer."""
        if name:
            self._used[name] -= 1

    def aim(self, names: Sequence[str], device: torch.device) -> None:
        """Say which adapter each row of the next pass uses; empty names use none."""
        places = [self._places[name] if name else 0 for name in names]
        if not any(places):
            self.places = None
        elif len(set(places)) == 1:
            self.places = places[0]
        else:
            self.places = torch.tensor(places, device=device)


def _list(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
