"""Writing the trained model: safetensors, tokenizer and chat template, and nothing that points at this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.chat import default_template, template_sha256
from common.model_files import check_model_folder

# training_args.bin is a pickle; the README would be a model card that names local paths.
_UNWANTED = ("training_args.bin", "README.md")


def save_model(trainer: Any, tokenizer: Any, folder: Path, base_name: str, is_main: bool) -> None:
    """Write the model of a trainer to `folder`. Collective: ZeRO-3 consolidates on all ranks, rank 0 writes.

    An adapter's config names `base_name` as its base.
    """
    trainer.save_model(str(folder))
    if not is_main:
        return
    tokenizer.save_pretrained(str(folder))
    for name in _UNWANTED:
        (folder / name).unlink(missing_ok=True)
    _rewrite(folder / "adapter_config.json", {"base_model_name_or_path": base_name, "revision": None})
    _rewrite(folder / "config.json", {"_name_or_path": None})
    _rewrite(folder / "tokenizer_config.json", {"name_or_path": None, "is_local": None, "local_files_only": None})
    check_model_folder(folder)


def chat_template_sha256(tokenizer: Any) -> str:
    """The hash of a tokenizer's chat template; empty where it has none."""
    template = default_template(tokenizer.chat_template)
    return template_sha256(template) if template else ""


def _rewrite(path: Path, values: dict[str, str | None]) -> None:
    """Set keys of a JSON file that is there; None removes them."""
    if not path.exists():
        return
    content = json.loads(path.read_text())
    content |= {key: value for key, value in values.items() if value is not None}
    for key in [key for key, value in values.items() if value is None]:
        content.pop(key, None)
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
