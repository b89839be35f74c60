"""`python -m coordinator`: run a coordinator with the settings of its environment."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys

from pydantic import ValidationError

from common.errors import LuthierError
from common.settings import Settings
from coordinator.server import serve

GARBAGE_THRESHOLDS = (20_000, 20, 50)
"""How seldom Python looks for cycles. It looks through all that lives, a long queue among it, and everybody waits meanwhile."""


def main() -> int:
    """Run until told to stop; the exit status."""
    gc.set_threshold(*GARBAGE_THRESHOLDS)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            field = "_".join(str(part) for part in problem["loc"]).upper()
            print(f"error: setting LUTHIER_{field}: {problem['msg']}", file=sys.stderr)
        return 2
    try:
        asyncio.run(serve(settings))
    except LuthierError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
