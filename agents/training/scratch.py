"""Scratch folders of runs on a node: shared by its ranks, removed by the last one out or, after a crash, by the next run."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from common.node import node_home


@contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """Hold a folder that all processes of this node share under `name`; its content goes with the last of them.

    A lock that the kernel drops with a process tells who is alive, so what killed processes left is found and removed.
    """
    runs = node_home() / "runs"
    runs.mkdir(mode=0o700, exist_ok=True)
    _remove_abandoned(runs, but=name)
    lock_path = runs / f"{name}.lock"
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        folder = runs / name
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            yield folder
        finally:
            if _only_holder(lock):
                shutil.rmtree(folder, ignore_errors=True)
                lock_path.unlink(missing_ok=True)


def _remove_abandoned(runs: Path, but: str) -> None:
    for path in runs.glob("*.lock"):
        if path.stem == but:
            continue
        with suppress(OSError), path.open("r+") as lock:
            if _only_holder(lock):
                shutil.rmtree(runs / path.stem, ignore_errors=True)
                path.unlink(missing_ok=True)


def _only_holder(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
