"""Telling the database's faults from ours, and saying them in plain words."""

from __future__ import annotations

from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from common.errors import Unavailable

READ_ONLY = "25006"
"""PostgreSQL's code for a server that takes no writes, such as a standby."""


def is_fault(error: BaseException) -> bool:
    """Whether the database is to blame: away, full, locked, read-only, or without a free connection."""
    if isinstance(error, OperationalError | PoolTimeout):
        return True
    return isinstance(error, DBAPIError) and (error.connection_invalidated or getattr(error.orig, "sqlstate", "") == READ_ONLY)


def is_disconnect(error: BaseException) -> bool:
    """Whether a connection that was open was lost, so that another one may work."""
    return isinstance(error, DBAPIError) and error.connection_invalidated


def unavailable(error: SQLAlchemyError) -> Unavailable:
    """What a caller is told of whom nothing was recorded."""
    return Unavailable(
        f"the store does not take this now ({_cause(error)}); nothing was recorded, try again", "STORE_UNAVAILABLE"
    )


def unreadable(error: SQLAlchemyError) -> Unavailable:
    """What a caller is told who only wanted to read."""
    return Unavailable(f"the store does not answer now ({_cause(error)}); try again", "STORE_UNAVAILABLE")


def uncertain(error: SQLAlchemyError) -> Unavailable:
    """What a caller is told when the database was lost while it was committing, and cannot say how that ended."""
    why = f"the store was lost while it recorded this ({_cause(error)}); it may or may not be recorded"
    return Unavailable(f"{why}: look, or try again with the same request_id", "STORE_UNCERTAIN")


def _cause(error: SQLAlchemyError) -> str:
    """The first line of what the database said, without the statement and its values."""
    if isinstance(error, PoolTimeout):
        return "every connection is in use"
    lines = str(error.orig if isinstance(error, DBAPIError) else error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
