"""Which files of a model are taken, and taking them from a folder."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from common.errors import InvalidArgument, NotFound
from common.model_files import PICKLES, WEIGHTS
from common.storage import check_relative

TEXTS = (".json", ".jinja", ".txt", ".model")
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
INDEX = "model.safetensors.index.json"


def choose_files(names: Iterable[str], where: str) -> list[str]:
    """Return the files that make up the model among all that lie there: its weights as safetensors, once, and its texts.

    Raises InvalidArgument where the model is no such model; `where` names it.
    """
    top = sorted(check_relative(name) for name in names if "/" not in name)
    if "config.json" not in top:
        if "adapter_config.json" in top:
            raise InvalidArgument(
                f"{where} is an adapter; a base has to be a whole model, so name the adapter's base", "NOT_A_MODEL"
            )
        raise InvalidArgument(f"{where} has no config.json, so it is not a model in the transformers format", "NOT_A_MODEL")
    weights = [name for name in top if name.endswith(WEIGHTS)]
    if INDEX in top:
        weights = [name for name in weights if SHARD.fullmatch(name)]
    elif "model.safetensors" in weights:
        weights = ["model.safetensors"]
    if not weights:
        pickles = [name for name in top if name.lower().endswith(PICKLES)]
        if pickles:
            raise InvalidArgument(
                f"{where} has its weights only as {pickles[0]}, which may run code when it is loaded; only {WEIGHTS} weights are "
                "taken. Choose a revision that has them, or convert the model with save_pretrained",
                "UNSAFE_WEIGHTS",
            )
        raise InvalidArgument(f"{where} holds no {WEIGHTS} weights", "NO_SAFETENSORS")
    return sorted(weights + [name for name in top if name.endswith(TEXTS)])


def gather(source: Path, target: Path) -> None:
    """Put the files of the model in the folder `source` into the new folder `target`, linked where the disk allows it."""
    if not source.is_absolute():
        raise InvalidArgument(f"the model's path {str(source)!r} is not absolute", "BAD_PATH")
    if not source.is_dir():
        raise NotFound(f"there is no model folder at {source} on the node that looked for it", "MODEL_NOT_FOUND")
    target.mkdir(parents=True, exist_ok=True)
    for name in choose_files((path.name for path in source.iterdir() if path.is_file()), str(source)):
        file = _inside(source, name)
        try:
            os.link(file, target / name)
        except OSError:
            shutil.copyfile(file, target / name)


def _inside(folder: Path, name: str) -> Path:
    """Follow a link only within the folder, or to the blobs beside it as the hub's own cache has them."""
    root = folder.resolve()
    file = (root / name).resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(file.is_relative_to(place) for place in allowed):
        raise InvalidArgument(f"{name} in {folder} is a link that leaves the folder; copy the file there instead", "UNSAFE_PATH")
    return file
