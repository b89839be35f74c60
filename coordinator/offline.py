"""What is done with a store while no coordinator runs on it: `python -m coordinator backup FILE` and `restore FILE`.

Both print one JSON document a line on standard output: how far they are, and at last what was done.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from common.errors import FailedPrecondition, InvalidArgument
from common.settings import Settings
from coordinator.server import only_one
from coordinator.store.backup import Manifest, dump
from coordinator.store.engines import make_engine
from coordinator.store.faults import is_fault, unreadable
from coordinator.store.migrate import head
from coordinator.store.restore import restore

TELL_SECONDS = 0.5

Say = Callable[[dict[str, Any]], None]


def say(document: dict[str, Any]) -> None:
    """Print one document."""
    print(json.dumps(document), flush=True)


def back_up(settings: Settings, file: Path, say: Say = say) -> None:
    """Write a backup of the settings' store to a new file, private to its owner. Where a coordinator runs on it, it goes on.

    Raises FailedPrecondition where there is no store, InvalidArgument where there is such a file.
    """
    if file.exists():
        raise InvalidArgument(f"there is a file {file} already; choose another name", "FILE_EXISTS")
    url = make_url(settings.database_url)
    if url.get_backend_name() == "sqlite" and not Path(url.database or "").is_file():
        raise FailedPrecondition(f"there is no store at {url.database}", "NO_STORE")
    engine = make_engine(settings.database_url)
    unfinished: Path | None = None
    try:
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        unfinished = Path(name)
        with os.fdopen(descriptor, "w+b") as target:
            manifest = dump(engine, target, _seldom(say))
            os.fsync(target.fileno())
        unfinished.rename(file)
    except SQLAlchemyError as error:
        if not is_fault(error):
            raise
        raise unreadable(error) from error
    finally:
        engine.dispose()
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
    say({"backup": str(file), "size_bytes": file.stat().st_size, **_document(manifest)})


def put_back(settings: Settings, file: Path, say: Say = say) -> None:
    """Restore a backup into the settings' store, which has to be empty. Raises as `restore` does."""
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with only_one(settings.home):
        manifest = restore(settings.database_url, file, _seldom(say))
    where = make_url(settings.database_url).render_as_string(hide_password=True)
    say({"restored": where, **_document(manifest), "schema_now": head()})


def _document(manifest: Manifest) -> dict[str, Any]:
    content = asdict(manifest)
    content["rows"] = {name: part["rows"] for name, part in content.pop("parts").items()}
    return {name: content[name] for name in ("schema", "luthier", "store", "time", "rows", "without")}


def _seldom(say: Say) -> Callable[[int, int], None]:
    last = 0.0

    def told(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= TELL_SECONDS:
            last = time.monotonic()
            say({"progress": {"rows": done, "total_rows": total}})

    return told
