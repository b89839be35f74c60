"""The folder on each node that Luthier may use for caches and scratch files."""

from __future__ import annotations

import os
from pathlib import Path


def node_home() -> Path:
    """Return this node's folder, made if absent: `LUTHIER_NODE_HOME`, else `~/.cache/luthier`.

    Nothing in it is shared between nodes and all of it can be made again from storage.
    """
    home = Path(os.environ.get("LUTHIER_NODE_HOME") or Path.home() / ".cache" / "luthier")
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return home
