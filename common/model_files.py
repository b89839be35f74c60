"""What a model folder may hold: safetensors weights with sane headers, and no code that loading it would run."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import InvalidArgument

MAX_HEADER_BYTES = 100 * 2**20
MAX_JSON_BYTES = 64 * 2**20
WEIGHTS = ".safetensors"
PICKLES = (
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".joblib",
    ".npy",
    ".npz",
    ".h5",
    ".keras",
    ".msgpack",
    ".model.pth",
)
CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh", ".exe")
DTYPE_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16},
    **{"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64},
}


@dataclass(frozen=True)
class ModelFolder:
    """A folder that passed: `kind` is full or adapter, `files` its relative paths in order."""

    kind: str
    files: tuple[str, ...]


def check_model_folder(path: Path) -> ModelFolder:
    """Return what the folder is, or raise InvalidArgument that names the file and what is wrong with it."""
    if not path.is_dir():
        raise _bad("FILE_NOT_FOUND", f"there is no model folder at {path}")
    files = sorted(file for file in path.rglob("*") if not file.is_dir())
    names = tuple(file.relative_to(path).as_posix() for file in files)
    for file, name in zip(files, names, strict=True):
        check_model_file_name(name)
        if file.is_symlink() or not file.is_file():
            raise _bad("UNSAFE_PATH", f"{name!r} is a link or device; a model folder holds plain files only")
        if file.suffix == ".json":
            _check_json(file, name)
    full, adapter = "config.json" in names, "adapter_config.json" in names
    if not (full or adapter):
        raise _bad("NOT_A_MODEL", "the folder has neither config.json nor adapter_config.json; is it a model folder?")
    kind = "adapter" if adapter else "full"
    weights = [file for file in files if file.suffix == WEIGHTS]
    if not any(file.parent == path for file in weights):
        raise _bad("NO_SAFETENSORS", f"the folder holds no {WEIGHTS} weights; save the model with save_pretrained")
    for file in weights:
        check_safetensors(file)
    if kind == "full":
        _check_index(path, names)
    return ModelFolder(kind, names)


def check_model_file_name(name: str) -> None:
    """Raise InvalidArgument where a file of this name has no place in a model folder."""
    lower = name.lower()
    if lower.endswith(PICKLES):
        raise _bad(
            "UNSAFE_WEIGHTS",
            f"{name!r} may run code when it is loaded; only {WEIGHTS} weights are taken. "
            "Convert the model with save_pretrained, and leave the other files out",
        )
    if lower.endswith(CODE):
        raise _bad("REMOTE_CODE", f"{name!r} is code; a model is taken as data only, so leave it out")


def check_safetensors(path: Path) -> None:
    """Check a weights file's header against its size without reading the weights. Raises InvalidArgument."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise _bad("BAD_SAFETENSORS", f"{path.name} is too short to be a safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise _bad("BAD_SAFETENSORS", f"{path.name} says its header has {length:,} bytes, but the file has {size:,}")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise _bad("BAD_SAFETENSORS", f"the header of {path.name} is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _bad("BAD_SAFETENSORS", f"the header of {path.name} is not a JSON object")
    _check_header(path.name, header, size - 8 - length)


def _check_header(name: str, header: dict[str, Any], data_bytes: int) -> None:
    header.pop("__metadata__", None)
    if not header:
        raise _bad("BAD_SAFETENSORS", f"{name} holds no tensors")
    spans = []
    for tensor, info in header.items():
        try:
            bits, shape, (begin, end) = DTYPE_BITS.get(info["dtype"]), info["shape"], info["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise _bad("BAD_SAFETENSORS", f"tensor {tensor[:80]!r} in {name} lacks dtype, shape or data_offsets") from error
        if bits is None:
            raise _bad("BAD_SAFETENSORS", f"tensor {tensor[:80]!r} in {name} has the unknown dtype {str(info['dtype'])[:40]!r}")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in [*shape, begin, end]) or begin > end:
            raise _bad("BAD_SAFETENSORS", f"tensor {tensor[:80]!r} in {name} has a bad shape or data_offsets")
        count = 1
        for dimension in shape:
            count *= dimension
        if count * bits != (end - begin) * 8:
            raise _bad("BAD_SAFETENSORS", f"tensor {tensor[:80]!r} in {name} does not have the bytes its shape and dtype say")
        spans.append((begin, end, tensor))
    spans.sort()
    at = 0
    for begin, end, tensor in spans:
        if begin != at:
            what = "overlaps another" if begin < at else "leaves a gap before it"
            raise _bad("BAD_SAFETENSORS", f"tensor {tensor[:80]!r} in {name} {what}")
        at = end
    if at != data_bytes:
        raise _bad("BAD_SAFETENSORS", f"{name} holds {data_bytes:,} bytes of tensors, but its header speaks of {at:,}")


def _check_json(file: Path, name: str) -> None:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise _bad("BAD_CONFIG", f"{name} is larger than {MAX_JSON_BYTES:,} bytes")
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _bad("BAD_CONFIG", f"{name} is not JSON: {error}") from error
    # Vocabularies and indexes hold free keys; only configurations can ask for code.
    if file.name.endswith("config.json") and _has_key(content, "auto_map"):
        raise _bad(
            "REMOTE_CODE", f"{name} has auto_map, which asks for the model's own code to be run; such models are not taken"
        )


def _has_key(content: Any, key: str) -> bool:
    pending = [content]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if key in item:
                return True
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
    return False


def _check_index(path: Path, names: tuple[str, ...]) -> None:
    index = "model.safetensors.index.json"
    if index not in names:
        return
    content = json.loads((path / index).read_bytes())
    shards = content.get("weight_map", {}) if isinstance(content, dict) else {}
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise _bad("BAD_CONFIG", f"{index} has no weight_map from tensor to file")
    missing = sorted(set(shards.values()) - set(names))
    if missing:
        raise _bad("NO_SAFETENSORS", f"{index} names {missing[0]!r}, which is not in the folder; is the download complete?")


def _bad(reason: str, message: str) -> InvalidArgument:
    return InvalidArgument(message, reason)


def read_chat_template(path: Path) -> str:
    """Return the chat template of a model folder as its tokenizer will have it; empty where there is none."""
    own_file = path / "chat_template.jinja"
    if own_file.is_file():
        return own_file.read_text(encoding="utf-8")
    config = path / "tokenizer_config.json"
    template = json.loads(config.read_bytes()).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else ""
