"""`python -m coordinator`: run a coordinator with the settings of its environment, or back its store up or restore it."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from common import tracing
from common.errors import InvalidArgument, LuthierError
from common.settings import Settings
from coordinator.offline import back_up, put_back
from coordinator.server import serve

GARBAGE_THRESHOLDS = (20_000, 20, 50)
"""How seldom Python looks for cycles. It looks through all that lives, a long queue among it, and everybody waits meanwhile."""


def main(arguments: Sequence[str] = ()) -> int:
    """Run until told to stop, or do what the arguments say; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m coordinator", description="Run a coordinator; its settings are LUTHIER_...")
    what = parser.add_subparsers(dest="what", title="instead")
    what.add_parser("backup", help="write the store's records to a file").add_argument("file", type=Path)
    what.add_parser("restore", help="put such a file into an empty store").add_argument("file", type=Path)
    asked = parser.parse_args(arguments)
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s%(trace)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_add_trace)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            field = "_".join(str(part) for part in problem["loc"]).upper()
            print(f"error: setting LUTHIER_{field}: {problem['msg']}", file=sys.stderr)
        return 2
    try:
        if asked.what == "backup":
            back_up(settings, asked.file)
        elif asked.what == "restore":
            put_back(settings, asked.file)
        else:
            asyncio.run(serve(settings))
    except LuthierError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, InvalidArgument) else 1
    return 0


def _add_trace(record: logging.LogRecord) -> bool:
    """Let a line say which trace it belongs to, if any."""
    found = tracing.trace_id()
    record.trace = f" [trace {found}]" if found else ""
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
