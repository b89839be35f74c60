"""Loads model folders into memory: safetensors only, no code of the model's own, nothing left uninitialised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common.errors import FailedPrecondition, InvalidArgument, LuthierError
from common.model_files import check_model_folder

SERVED_ADAPTERS = frozenset({"LORA"})


def pick_device(device: str) -> torch.device:
    """Return the device for `auto`, `cpu`, `cuda` or `cuda:N`; raises FailedPrecondition where it does not exist."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InvalidArgument(f"{device!r} is not a device; use auto, cpu, cuda or cuda:N", "BAD_DEVICE") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise FailedPrecondition(f"there is no device {device!r} here: {torch.cuda.device_count()} GPUs are visible", "NO_DEVICE")
    return chosen


def cache_budget(device: torch.device) -> int:
    """Return how many bytes keys and values may take: most of what is free on a GPU, a quarter of the memory elsewhere."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    return psutil.virtual_memory().available // 4


def load_tokenizer(model_dir: Path, base_dir: Path | None) -> Any:
    """Load the tokenizer of the model, or of its base where the model's folder holds none."""
    home = model_dir if (model_dir / "tokenizer_config.json").exists() or base_dir is None else base_dir
    try:
        return AutoTokenizer.from_pretrained(
            home, trust_remote_code=False, local_files_only=True, clean_up_tokenization_spaces=False
        )
    except Exception as error:
        raise InvalidArgument(f"the tokenizer in {home.name} cannot be loaded: {_brief(error)}", "BAD_TOKENIZER") from error


def load_model(model_dir: Path, base_dir: Path | None, device: torch.device) -> Any:
    """Load a full model, or the base with the adapter on it. Raises InvalidArgument where not all of it fits."""
    kind = check_model_folder(model_dir).kind
    if kind == "full":
        return _load_full(model_dir, device)
    if base_dir is None:
        raise InvalidArgument(f"{model_dir.name} is an adapter: name the folder of its base too", "NO_BASE")
    if check_model_folder(base_dir).kind != "full":
        raise InvalidArgument(f"{base_dir.name} is an adapter; the base has to be a full model", "NO_BASE")
    return _load_adapter(model_dir, _load_full(base_dir, device), device)


def context_length(model: Any, tokenizer: Any) -> int:
    """Return how many tokens the model can attend to, by its own configuration."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        length = getattr(config, name, None)
        if isinstance(length, int) and length > 0:
            return length
    length = tokenizer.model_max_length
    return int(length) if length and length < 10**9 else 2048


def end_tokens(model_dir: Path, model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that the model's files say end a text."""
    found: set[int | None] = set()
    sources: list[Any] = [model.config.get_text_config(), tokenizer]
    if (model_dir / "generation_config.json").exists():
        try:
            sources.append(GenerationConfig.from_pretrained(model_dir, local_files_only=True))
        except Exception as error:
            raise InvalidArgument(f"generation_config.json cannot be read: {_brief(error)}", "BAD_CONFIG") from error
    for source in sources:
        token = getattr(source, "eos_token_id", None)
        found |= set(token) if isinstance(token, list | tuple) else {token}
    return {token for token in found if token is not None}


def _load_full(folder: Path, device: torch.device) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            # bfloat16 is slower than float32 on most CPUs, and float16 is not exact enough there.
            dtype=torch.float32 if device.type == "cpu" else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except LuthierError:
        raise
    except Exception as error:
        raise InvalidArgument(f"the model in {folder.name} cannot be loaded: {_brief(error)}", "BAD_MODEL") from error
    model, report = loaded
    for what, problem in (("missing_keys", "are missing"), ("mismatched_keys", "have another shape than config.json says")):
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[what])
        if keys:
            raise InvalidArgument(f"the model in {folder.name} is not whole: {_list(keys)} {problem}", "BAD_MODEL")
    return model.to(device).eval()


def _load_adapter(folder: Path, base: Any, device: torch.device) -> Any:
    # Imported where needed: a second of start-up that full models do not pay.
    from peft import PeftConfig, PeftModelForCausalLM

    try:
        config = PeftConfig.from_pretrained(os.fspath(folder))
    except Exception as error:
        raise InvalidArgument(f"adapter_config.json in {folder.name} cannot be read: {_brief(error)}", "BAD_ADAPTER") from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in SERVED_ADAPTERS:
        raise InvalidArgument(
            f"{folder.name} is a {kind} adapter; only {', '.join(sorted(SERVED_ADAPTERS))} can be served", "BAD_ADAPTER"
        )
    if not (folder / "adapter_model.safetensors").exists():
        raise InvalidArgument(f"{folder.name} has no adapter_model.safetensors", "BAD_ADAPTER")
    config.inference_mode = True
    try:
        model = PeftModelForCausalLM(base, config, autocast_adapter_dtype=False)
        result = model.load_adapter(os.fspath(folder), "default", torch_device=str(device), autocast_adapter_dtype=False)
    except Exception as error:
        raise InvalidArgument(f"the adapter in {folder.name} does not fit its base: {_brief(error)}", "BAD_ADAPTER") from error
    for keys, problem in (
        (result.missing_keys, "are missing from the adapter"),
        (result.unexpected_keys, "have no place in the base"),
    ):
        if keys:
            raise InvalidArgument(
                f"the adapter in {folder.name} does not fit its base in full: {_list(sorted(keys))} {problem}", "BAD_ADAPTER"
            )
    return model.to(device).eval()


def _list(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
