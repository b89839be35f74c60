"""`luthier backup` and `luthier restore`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from cli.command import command
from cli.context import Cli
from cli.failures import Failure
from cli.output import Output, message_dict
from cli.render.text import size

PATIENCE_SECONDS = 2.0
"""What takes no longer than that shows no bar."""

Show = Callable[[str, int, int], None]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    command(app)(backup)
    command(app)(restore)


def backup(
    cli: Cli, file: Annotated[Path, typer.Argument(help="Where to write it; a file that is there is not written over.")]
) -> None:
    """Write the records of all projects to a file, while everything goes on. It is a secret: keep it as safe as the store."""
    with slow_bar(cli.out) as show:
        summary = cli.client.backup(file, show)
    rows = sum(summary.rows.values())
    said = f"{file}: {rows} rows of {len(summary.rows)} tables, {size(summary.size_bytes)}, schema {summary.schema}"
    cli.out.answer(message_dict(summary) | {"file": str(file)}, None if cli.json else f"{said}\nnot in it: {summary.without}")


def restore(
    cli: Cli,
    file: Annotated[Path, typer.Argument(help="A file that `luthier backup` has written.")],
    store_url: Annotated[
        str, typer.Option(help="Database to restore into; that of the home (--home) where absent. It has to be empty.")
    ] = "",
) -> None:
    """Put a backup into an empty store, SQLite or PostgreSQL, whichever it came from; start its coordinator afterwards."""
    environment = {**os.environ, "LUTHIER_HOME": str(cli.home)} | ({"LUTHIER_STORE_URL": store_url} if store_url else {})
    with slow_bar(cli.out) as show:
        answer = _restored(file, environment, show)
    rows = sum(answer["rows"].values())
    said = (
        f"{answer['restored']}: {rows} rows of {answer['time']}, brought from schema {answer['schema']} to {answer['schema_now']}"
    )
    cli.out.answer(answer, None if cli.json else f"{said}\nnot in it: {answer['without']}")


def _restored(file: Path, environment: dict[str, str], show: Show) -> dict[str, Any]:
    """Have the coordinator's own program do it, and return its last word."""
    answer: dict[str, Any] = {}
    words = [sys.executable, "-m", "coordinator", "restore", str(file.absolute())]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                answer = json.loads(line)
                if "progress" in answer:
                    show("rows", answer["progress"]["rows"], answer["progress"]["total_rows"])
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if process.returncode:
        raise Failure(said[-1].removeprefix("error: ") if said else "it could not be restored", process.returncode)
    return answer


@contextmanager
def slow_bar(out: Output) -> Iterator[Show]:
    """A bar for what may take long; elsewhere than on a terminal it says nothing."""
    if not out.live:
        yield lambda _what, _done, _total: None
        return
    began, task = time.monotonic(), None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=out.stderr, transient=True) as bar:

        def show(what: str, done: int, total: int) -> None:
            nonlocal task
            if time.monotonic() - began < PATIENCE_SECONDS:
                return
            if task is None:
                task = bar.add_task(what, total=total)
            bar.update(task, description=what, completed=done, total=total)

        yield show
