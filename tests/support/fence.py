"""Copied as `sitecustomize.py` into the processes of a node: nothing below a forbidden folder can be opened."""

import os
import sys

FORBIDDEN = tuple(os.path.join(path, "") for path in os.environ.get("FENCE_FORBIDDEN", "").split(os.pathsep) if path)


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if event not in ("open", "os.listdir", "os.scandir", "os.rename", "os.mkdir") or not arguments:
        return
    path = arguments[0]
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if isinstance(path, str) and os.path.join(os.path.abspath(path), "").startswith(FORBIDDEN):
        with open(os.environ["FENCE_LOG"], "a") as log:
            log.write(f"{event} {path}\n")
        raise PermissionError(f"{path} belongs to another node")


if FORBIDDEN:
    sys.addaudithook(_hook)
