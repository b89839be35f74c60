"""Processes of a stack: started with a mark in their environment, found again by it, and stopped to the last one."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from cli.failures import Failure
from cli.stack.state import ProcessRef

# Every descendant inherits it, also those that changed their parent (Ray's workers, HAProxy, drivers of jobs).
MARK = "LUTHIER_STACK"
PART = "LUTHIER_STACK_PART"

KILL_SECONDS = 15.0


def spawn(command: Sequence[str], environment: Mapping[str, str], home: Path, part: str) -> ProcessRef:
    """Start a process that outlives this one, its output going to `<home>/logs/{part}.log`."""
    logs = home / "logs"
    logs.mkdir(mode=0o700, exist_ok=True)
    log = logs / f"{part}.log"
    log.touch(mode=0o600)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env={**environment, MARK: str(home), PART: part},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=home,
            start_new_session=True,
            close_fds=True,
        )
    return ProcessRef.of(process.pid)


def last_lines(home: Path, part: str, count: int = 3) -> str:
    """The end of a part's log on one line, for an error message."""
    log = home / "logs" / f"{part}.log"
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return " | ".join(lines[-count:])


def members(home: Path, part: str = "", folders: Iterable[str] = ()) -> list[psutil.Process]:
    """Every running process of the home's stack, or of one part of it.

    Processes that changed their title may have written over their environment; they are known by a marked ancestor, or by
    a file below `folders` that they hold open. This process and those it runs under are never among them.
    """
    spared = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    prefixes = tuple(f"{folder.rstrip('/')}/" for folder in folders if folder)
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        if process.pid in spared or process.pid in found:
            continue
        with suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE or not _belongs(process, str(home), part, prefixes):
                continue
            found[process.pid] = process
            for child in process.children(recursive=True):
                if child.pid not in spared and child.status() != psutil.STATUS_ZOMBIE:
                    found[child.pid] = child
    return list(found.values())


def _belongs(process: psutil.Process, home: str, part: str, prefixes: tuple[str, ...]) -> bool:
    environment = process.environ()
    if environment:
        return environment.get(MARK) == home and part in ("", environment.get(PART))
    return bool(prefixes) and any(file.path.startswith(prefixes) for file in process.open_files())


def stop(process: psutil.Process, grace: float) -> bool:
    """Ask a process to end, and wait for it. False where it is still there after `grace` seconds."""
    with suppress(psutil.NoSuchProcess):
        process.terminate()
        with suppress(psutil.TimeoutExpired):
            process.wait(grace)
            return True
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def reap(home: Path, part: str = "", folders: Iterable[str] = (), grace: float = 5.0) -> list[int]:
    """End every process of the home's stack (or a part of it): ask first, then kill. Returns the ids of those that were left.

    Raises Failure where one cannot be ended.
    """
    folders = tuple(folders)
    known: dict[int, psutil.Process] = {}
    asked: set[int] = set()
    patience = time.monotonic() + grace
    while True:
        known |= {process.pid: process for process in members(home, part, folders)}
        # Also those that can no longer be told from others, because the parent that they were known by has ended.
        left = [process for process in known.values() if _runs(process)]
        if not left:
            return sorted(known)
        if time.monotonic() > patience + KILL_SECONDS:
            raise Failure(f"these processes of {home} cannot be ended: {', '.join(str(process.pid) for process in left)}")
        for process in left:
            with suppress(psutil.Error):
                if time.monotonic() >= patience:
                    process.kill()
                elif process.pid not in asked:
                    asked.add(process.pid)
                    process.terminate()
        psutil.wait_procs(left, timeout=0.3)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
